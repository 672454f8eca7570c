"""`seer fleet`: fleets that outlive their command, what ends them, and the files and commands that describe others.

The engines are mock engines behind vLLM's command line, so all processes, signals and calls are real.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from seer_async.config import resolve
from seer_async.errors import ConfigError, FleetError, UsageError
from seer_servers.fleet import EngineSpec
from seer_servers.fleetfile import FleetFolder, fleet_urls, read_fleet_file
from seer_servers.nodes import parse_node, script
from seer_servers.process import GRACE_S
from tests.test_fleet import members, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# Where vLLM's server would be: a mock engine with a grandchild, as vLLM has, and trouble on demand.
FAKE_VLLM = """
import os, signal, subprocess, sys, time
options = dict(zip(sys.argv[1:], sys.argv[2:]))
if "--die" in sys.argv:
    print("ValueError: the model is too large")
    sys.exit(3)
subprocess.Popen(["sleep", "600"])
if "--hang" in sys.argv:
    time.sleep(600)
if "--slow-end" in sys.argv and os.fork():
    signal.signal(signal.SIGTERM, lambda *_: time.sleep(3) or sys.exit())
    time.sleep(600)
from seer_cli.main import main
sys.argv = ["seer", "mock-engine", "--port", options["--port"], "--time-scale", "0"]
main()
"""
COMMAND = [sys.executable, "-m", "seer_cli.main"]
UP = ("fleet", "up", "--model", "m", "--kv-pool", "none")


class Seer:
    """The command, with a home of its own."""

    def __init__(self, folder: Path) -> None:
        self.fleets = folder / "state" / "seer" / "fleets"
        path = os.pathsep.join([str(folder / "path"), os.environ.get("PYTHONPATH", "")])
        self.env = os.environ | {"XDG_STATE_HOME": str(folder / "state"), "PYTHONPATH": path}

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*COMMAND, *words], env=self.env, capture_output=True, text=True, check=False, timeout=60)

    def __call__(self, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = self.run(*words)
        assert done.returncode == code, done.stdout + done.stderr
        return done

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*COMMAND, *words], env=self.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def file(self, name: str = "default") -> dict[str, Any]:
        found = json.loads((self.fleets / name / "fleet.json").read_text())
        assert isinstance(found, dict)
        return found

    def groups(self, name: str = "default") -> list[int]:
        return [engine["pid"] for engine in self.file(name)["engines"]]

    def processes(self) -> list[psutil.Process]:
        """All living processes of these fleets: they are told apart by their environment."""
        found = []
        for each in psutil.process_iter(["status"]):
            try:
                mine = each.environ().get("XDG_STATE_HOME") == self.env["XDG_STATE_HOME"]
            except psutil.Error:
                continue
            if mine and each.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(each)
        return found


@pytest.fixture
def seer(tmp_path: Path) -> Iterator[Seer]:
    package = tmp_path / "path" / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").touch()
    (package / "api_server.py").write_text(FAKE_VLLM)
    seer = Seer(tmp_path)
    yield seer
    for each in seer.processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()


class TestLife:
    def test_up_used_and_down(self, seer: Seer, tmp_path: Path) -> None:
        started = seer(*UP, "--engines", "2")
        urls = started.stdout.split()
        assert len(set(urls)) == 2
        assert "engine-1 is ready" in started.stderr
        assert seer.file()["engines"][1]["url"] == urls[1]
        assert stat.S_IMODE((seer.fleets / "default").stat().st_mode) == 0o700

        (told,) = json.loads(seer("fleet", "status", "--json").stdout)["fleets"]
        assert told["running"] is True
        for engine in told["engines"]:
            assert (engine["health"], engine["epoch"], engine["running"]) == ("up", 1, 0)
            assert 0 <= engine["uptime_s"] < 60
            assert engine["pool"] is None, "a mock engine has no pool, and that is no trouble"

        work = ("-n", "2", "--limit", "2", "--max-tokens", "16", "--json", "--out", str(tmp_path / "run"))
        result = json.loads(seer("rollout", "--fleet", "default", *work).stdout)
        assert result["done"] == 4
        run = json.loads((tmp_path / "run" / "run.json").read_text())
        assert [engine["url"] for engine in run["engines"]] == urls

        assert "is down" in seer("fleet", "down").stdout
        wait_until(lambda: not seer.processes(), 10)
        assert {each.name for each in (seer.fleets / "default").iterdir()} == {"lock", "logs"}
        assert "does not run" in seer("fleet", "down").stdout
        assert "does not run" in seer("fleet", "status", "default", code=4).stderr
        assert "no fleet runs here" in seer("fleet", "status", code=4).stderr
        assert "seer fleet up default" in seer("rollout", "--fleet", "default", code=4).stderr

    def test_a_second_one_needs_another_name(self, seer: Seer) -> None:
        seer(*UP, "--engines", "1")
        before = seer.file()
        error = seer(*UP, "--engines", "1", code=4).stderr
        assert "seer fleet status default" in error and "seer fleet down default" in error
        assert seer.file() == before
        seer("fleet", "up", "other", *UP[2:], "--engines", "1")
        fleets = json.loads(seer("fleet", "status", "--json").stdout)["fleets"]
        assert [(each["name"], each["running"]) for each in fleets] == [("default", True), ("other", True)]

    def test_a_killed_engine_starts_again(self, seer: Seer) -> None:
        (url,) = seer(*UP, "--engines", "1").stdout.split()
        os.killpg(seer.groups()[0], signal.SIGKILL)
        wait_until(lambda: (seer.file()["engines"][0]["state"], seer.file()["engines"][0]["epoch"]) == ("up", 2))
        (told,) = json.loads(seer("fleet", "status", "--json").stdout)["fleets"]
        assert (told["engines"][0]["url"], told["engines"][0]["epoch"]) == (url, 2)
        assert "died and starts again" in (seer.fleets / "default" / "logs" / "fleet.log").read_text()

    def test_some_engines_down_is_exit_code_3(self, seer: Seer) -> None:
        seer(*UP, "--engines", "2")
        guard = seer.groups()[1]
        for each in members(guard):
            each.suspend()  # answers no more, and nobody starts it again
        told = ""

        def seen() -> bool:
            nonlocal told
            done = seer.run("fleet", "status")
            told = done.stdout
            return done.returncode == 3

        wait_until(seen, 60)  # on busy cores the other may be late too
        assert "no answer" in told and "up" in told
        for each in members(guard):
            each.resume()

    def test_foreground_ends_with_ctrl_c(self, seer: Seer) -> None:
        command = seer.start(*UP, "--engines", "1", "--foreground")
        assert command.stdout
        assert command.stdout.readline().startswith("http://127.0.0.1:")
        (group,) = seer.groups()
        assert seer.file()["pid"] == command.pid
        command.send_signal(signal.SIGINT)
        assert command.wait(30) == 0
        wait_until(lambda: not members(group), 10)
        assert not (seer.fleets / "default" / "fleet.json").exists()

    def test_down_from_elsewhere_ends_the_foreground(self, seer: Seer) -> None:
        command = seer.start(*UP, "--engines", "1", "--foreground")
        assert command.stdout
        command.stdout.readline()
        seer("fleet", "down")
        assert command.wait(30) == 0


class TestTrouble:
    def test_an_engine_that_does_not_start(self, seer: Seer) -> None:
        failed = seer(*UP, "--engines", "2", "--vllm-arg=--die", code=4)
        assert "ValueError: the model is too large" in failed.stderr
        assert "engine-" in failed.stderr and ".log" in failed.stderr
        assert not failed.stdout
        wait_until(lambda: not seer.processes(), 10)
        assert not (seer.fleets / "default" / "fleet.json").exists()
        seer(*UP, "--engines", "1")

    @pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
    def test_an_interrupted_start_leaves_nothing(self, seer: Seer, how: signal.Signals) -> None:
        command = seer.start(*UP, "--engines", "1", "--vllm-arg=--hang")
        assert command.stderr
        assert "engine-0 starts" in command.stderr.readline()
        (told,) = json.loads(seer("fleet", "status", "--json", code=4).stdout)["fleets"]
        assert told["engines"][0]["health"] == "starting"
        command.send_signal(how)
        assert command.wait(30) == 128 + how
        wait_until(lambda: not seer.processes())
        assert not (seer.fleets / "default" / "fleet.json").exists()

    def test_down_ends_a_start(self, seer: Seer) -> None:
        command = seer.start(*UP, "--engines", "1", "--vllm-arg=--hang")
        assert command.stderr
        command.stderr.readline()
        seer("fleet", "down")
        assert command.wait(30) == 4
        wait_until(lambda: not seer.processes(), 10)

    @pytest.mark.parametrize("then", ["down", "up"])
    def test_a_killed_supervisor_leaves_no_orphan(self, seer: Seer, then: str) -> None:
        seer(*UP, "--engines", "2", "--vllm-arg=--slow-end")
        groups, pid = seer.groups(), seer.file()["pid"]
        os.kill(pid, signal.SIGKILL)
        if then == "down":
            assert "is down" in seer("fleet", "down").stdout
            assert not any(members(group) for group in groups), "down waits for them"
            assert not (seer.fleets / "default" / "fleet.json").exists()
        else:
            wait_until(lambda: not any(members(group) for group in groups), GRACE_S + 10)
            told = seer("fleet", "status", code=4).stdout
            assert "supervisor was killed" in told
            assert "seer fleet up default" in seer("rollout", "--fleet", "default", code=4).stderr
            seer(*UP, "--engines", "1")
            assert seer.file()["pid"] != pid
            assert len(seer.groups()) == 1

    def test_a_fleet_of_another_machine_is_left_alone(self, seer: Seer) -> None:
        seer(*UP, "--engines", "1")
        path = seer.fleets / "default" / "fleet.json"
        mine = path.read_text()
        path.write_text(mine.replace(f'"{socket.gethostname()}"', '"node-7"'))
        assert "runs on node-7" in seer("fleet", "down", code=4).stderr
        assert "runs on node-7" in seer("rollout", "--fleet", "default", code=4).stderr
        path.write_text(mine)
        seer("fleet", "down")

    def test_wrong_usage(self, seer: Seer) -> None:
        assert "no name for a fleet" in seer("fleet", "up", "../x", code=2).stderr
        assert "fleet.kv_pool must be one of" in seer("fleet", "up", "--kv-pool", "floppy", code=2).stderr
        error = seer("rollout", "--fleet", "default", "--server", "http://a:1", "--dry-run", code=2).stderr
        assert "--server" in error and "--fleet" in error
        assert not seer.fleets.exists()


class TestFleetFile:
    @pytest.mark.parametrize(
        "text",
        [
            '["http://a:8000", "http://b:8000"]',
            '{"engines": [{"url": "http://a:8000"}, {"url": "http://b:8000", "name": "b"}], "note": "mine"}',
        ],
    )
    def test_written_by_hand(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "fleet.json"
        path.write_text(text)
        assert fleet_urls(str(path)) == ["http://a:8000", "http://b:8000"]

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("", "it must be a JSON list of URLs"),
            ("[1]", r"\$\[0\]"),
            ('{"engines": [{"name": "a"}]}', "missing required field `url`"),
            ('{"servers": []}', "missing required field `engines`"),
            ("[]", "lists no engine"),
            ('["http://a:1", "a:2"]', "'a:2' is no URL that starts with http:// or https://"),
            ('["http://a:1", "http://a:1"]', "http://a:1 and http://a:1 are the same server"),
            ("[" * 5000, "it must be a JSON list of URLs"),
        ],
    )
    def test_wrong_ones_are_explained(self, tmp_path: Path, text: str, said: str) -> None:
        path = tmp_path / "fleet.json"
        path.write_text(text)
        with pytest.raises(UsageError, match=said) as raised:
            read_fleet_file(path)
        assert str(path) in str(raised.value)

    def test_a_missing_one(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"cannot read fleet file .*none\.json: No such file"):
            fleet_urls(str(tmp_path / "none.json"))

    def test_a_rollout_reads_it(self, seer: Seer, tmp_path: Path) -> None:
        urls = seer(*UP, "--engines", "1").stdout.split()
        path = tmp_path / "mine.json"
        path.write_text(json.dumps(urls))
        work = ("-n", "1", "--limit", "1", "--max-tokens", "8", "--json", "--out", str(tmp_path / "run"))
        assert json.loads(seer("rollout", "--fleet", str(path), *work).stdout)["done"] == 1
        (told,) = json.loads(seer("fleet", "status", str(path), "--json").stdout)["fleets"]
        assert (told["running"], told["engines"][0]["health"]) == (None, "up")
        path.write_text("[]")
        assert "lists no engine" in seer("rollout", "--fleet", str(path), code=2).stderr

    def test_servers_and_a_fleet_exclude_each_other(self) -> None:
        with pytest.raises(ConfigError, match="both name engines"):
            resolve({"fleet": {"servers": ["http://a:1"], "file": "default"}})

    def test_resuming_elsewhere(self, seer: Seer, tmp_path: Path) -> None:
        first, second = (seer("fleet", "up", name, *UP[2:], "--engines", "1").stdout.strip() for name in "ab")
        out = str(tmp_path / "run")
        seer(
            "rollout", "--fleet", "a", "-n", "1", "--limit", "1", "--max-tokens", "8", "--out", out, "--display", "none"
        )
        for words, url in ((("--server", second), second), (("--fleet", "a"), first), (("--fleet", "b"), second)):
            (tmp_path / "run" / "samples.jsonl").write_bytes(b"")  # one that has ended needs no engine
            seer("rollout", "--resume", out, *words, "--display", "none")
            run = json.loads((tmp_path / "run" / "run.json").read_text())
            assert [engine["url"] for engine in run["engines"]] == [url]


class TestLock:
    def test_one_holder_at_a_time(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
        folder = FleetFolder("x")
        assert not folder.held
        lock = folder.claim()
        assert lock is not None
        assert folder.held
        assert folder.claim() is None
        os.close(lock)
        assert not folder.held

    def test_looking_does_not_keep_others_out(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
        folder = FleetFolder("x")
        os.close(folder.claim() or 0)
        looking = (
            "import sys; from seer_servers.fleetfile import FleetFolder\nfor _ in iter(int, 1): FleetFolder('x').held"
        )
        other = subprocess.Popen([sys.executable, "-c", looking])
        try:
            time.sleep(0.5)
            for _ in range(3000):
                lock = folder.claim()
                assert lock is not None
                os.close(lock)
        finally:
            other.kill()
            other.wait()

    def test_a_folder_that_cannot_be_made(self, seer: Seer, tmp_path: Path) -> None:
        (tmp_path / "state").write_text("a file")
        assert "XDG_STATE_HOME" in seer(*UP, code=5).stderr


class TestCommands:
    SPEC = EngineSpec(model="/models/a b", dtype="float32", extra_args=("--seed", "7"))

    def run(self, tmp_path: Path, text: str) -> list[dict[str, Any]]:
        """What a shell makes of the script: the calls of its programs."""
        stub = f"#!{sys.executable}\nimport json, os, sys\n"
        stub += "print(json.dumps([sys.argv[0].rpartition('/')[2], sys.argv[1:], dict(os.environ)]))\n"
        for name in ("vllm", "mooncake_master", "mooncake_client"):
            (tmp_path / name).write_text(stub)
            (tmp_path / name).chmod(0o755)
        env = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
        done = subprocess.run(
            ["bash", "-eu"], input=text, cwd=tmp_path, env=env, capture_output=True, text=True, check=True
        )
        calls = [json.loads(line) for line in done.stdout.splitlines()]
        return [{"program": program, "argv": argv, "env": env} for program, argv, env in calls]

    def test_engines_and_their_fleet_file(self, tmp_path: Path) -> None:
        nodes = [parse_node("10.0.0.1"), parse_node("10.0.0.2:9000")]
        first, second = self.run(tmp_path, script(self.SPEC, nodes, "none", 4.0))
        assert first["argv"][:2] == ["serve", "/models/a b"]
        assert first["argv"][-2:] == ["--seed", "7"]
        options = dict(zip(second["argv"], second["argv"][1:], strict=False))
        assert (options["--host"], options["--port"], options["--dtype"]) == ("10.0.0.2", "9000", "float32")
        assert "--enable-scale-out" in second["argv"]
        assert "--model" not in second["argv"]
        assert first["env"]["VLLM_PLUGINS"] == "seer"
        assert fleet_urls(str(tmp_path / "fleet.json")) == ["http://10.0.0.1:8000", "http://10.0.0.2:9000"]

    def test_mooncake(self, tmp_path: Path) -> None:
        nodes = [parse_node("10.0.0.1"), parse_node("10.0.0.2")]
        calls = self.run(tmp_path, script(self.SPEC, nodes, "mooncake", 2.0))
        assert [call["program"] for call in calls] == ["mooncake_master", *["mooncake_client"] * 2, *["vllm"] * 2]
        assert "--rpc_address=10.0.0.1" in calls[0]["argv"]
        assert f"--global_segment_size={2 << 30} B" in calls[2]["argv"]
        assert "--master_server_address=10.0.0.1:50051" in calls[2]["argv"]
        extras = []
        for call, host in zip(calls[3:], ("10.0.0.1", "10.0.0.2"), strict=True):
            config = json.loads(call["argv"][call["argv"].index("--kv-transfer-config") + 1])
            assert config["kv_load_failure_policy"] == "recompute"
            extras.append(config["kv_connector_extra_config"])
            assert call["env"]["MOONCAKE_REQUESTER_LOCAL_HOSTNAME"] == host
            assert "127.0.0.1" not in json.dumps(config) + json.dumps(call["env"])
        assert extras[0]["cache_prefix"] == extras[1]["cache_prefix"]
        assert extras[0]["lookup_rpc_port"] != extras[1]["lookup_rpc_port"]
        said = json.loads((tmp_path / "mooncake.json").read_text())
        assert said["master_server_address"] == "10.0.0.1:50051"
        assert calls[3]["env"]["MOONCAKE_CONFIG_PATH"] == "mooncake.json"

    def test_shared_memory_stays_on_a_machine(self, tmp_path: Path) -> None:
        nodes = [parse_node("10.0.0.1"), parse_node("10.0.0.1:8001")]
        calls = self.run(tmp_path, script(self.SPEC, nodes, "shm", 1.0))
        configs = [json.loads(call["argv"][call["argv"].index("--kv-transfer-config") + 1]) for call in calls]
        assert configs[0] == configs[1]
        assert configs[0]["kv_connector_extra_config"]["capacity_bytes"] == 1 << 30
        with pytest.raises(UsageError, match="of one machine"):
            script(self.SPEC, [parse_node("a"), parse_node("b")], "shm", 1.0)

    @pytest.mark.parametrize("text", ["", ":8000", "a:b", "a:"])
    def test_wrong_nodes(self, text: str) -> None:
        with pytest.raises(UsageError, match="must be HOST or HOST:PORT"):
            parse_node(text)

    def test_one_address_twice(self) -> None:
        with pytest.raises(UsageError, match="different ports"):
            script(self.SPEC, [parse_node("a"), parse_node("a:8000")], "none", 1.0)

    def test_the_command(self, seer: Seer) -> None:
        said = seer("fleet", "commands", "--model", "/m").stdout
        assert "# NODE-1: engine-1" in said and "vllm serve /m --host NODE-1" in said
        assert "--kv-pool must be" in seer("fleet", "commands", "--model", "/m", "--kv-pool", "auto", code=2).stderr


def test_a_name_that_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with pytest.raises(FleetError, match="fleet x does not run: start it with `seer fleet up x`"):
        fleet_urls("x")
