"""Local engines: their place and command line, their start, death, restart and end; and no process left behind."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
import urllib.request
from typing import TYPE_CHECKING

import msgspec
import psutil
import pytest

from seer_async.errors import FleetError
from seer_servers import fleet as fleet_module
from seer_servers import placement, process
from seer_servers.fleet import EngineSpec, LocalFleet
from seer_servers.model import ensure_default_model
from seer_servers.placement import Placement
from seer_servers.process import Process

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# Stands in for vLLM's server: the same command line and /health, a grandchild as vLLM has, and trouble on demand.
FAKE_VLLM = """
import http.server, os, subprocess, sys, json
options = dict(zip(sys.argv[1:], sys.argv[2:]))
if "--die" in sys.argv:
    print("\\x1b[31mINFO\\x1b[0m starting\\nValueError: the model is too large\\nINFO bye")
    sys.exit(3)
subprocess.Popen(["sleep", "600"])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        seen = {name: os.environ.get(name) for name in json.loads(os.environ.get("SHOW", "[]"))}
        self.wfile.write(json.dumps({"pid": os.getpid(), "argv": sys.argv, "env": seen}).encode())
http.server.ThreadingHTTPServer((options["--host"], int(options["--port"])), Handler).serve_forever()
"""


@pytest.fixture
def spec(tmp_path: Path) -> EngineSpec:
    """A spec whose engines run `FAKE_VLLM`, found before the real package."""
    package = tmp_path / "path" / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").touch()
    (package / "api_server.py").write_text(FAKE_VLLM)
    return EngineSpec(model="m", extra_env={"PYTHONPATH": str(tmp_path / "path")})


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_module, "FIRST_BACKOFF_S", 0.05)
    monkeypatch.setattr(fleet_module, "HEALTH_POLL_S", 0.05)


def ask(url: str) -> dict[str, object]:
    with urllib.request.urlopen(f"{url}/health", timeout=30) as reply:
        return json.load(reply)


def members(group: int) -> list[psutil.Process]:
    """The living processes of a process group."""
    found = []
    for each in psutil.process_iter(["status"]):
        try:
            if os.getpgid(each.pid) == group and each.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(each)
        except ProcessLookupError:
            pass
    return found


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


async def eventually(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.02)


PLACE = Placement({}, {"--kv-cache-memory-bytes": str(1 << 30), "--dtype": "float32", "--enforce-eager": None})


class TestSpec:
    def test_arguments(self) -> None:
        spec = EngineSpec(model="/m", max_model_len=2048, num_blocks=64, extra_args=("--seed", "7"))
        words = spec.arguments(8000, PLACE)
        options = dict(itertools.pairwise(words))
        assert options["--host"] == "127.0.0.1"
        assert options["--port"] == "8000"
        assert options["--max-model-len"] == "2048"
        assert options["--block-size"] == "32"
        assert options["--num-gpu-blocks-override"] == "64"
        assert options["--kv-cache-memory-bytes"] == str(1 << 30)
        assert options["--dtype"] == "float32"
        assert "--max-num-seqs" not in words
        assert {"--enable-scale-out", "--enforce-eager"} <= set(words)
        assert words[-2:] == ["--seed", "7"]

    def test_what_is_asked_for_goes_before_what_suits_the_place(self) -> None:
        words = EngineSpec(model="/m", kv_cache_gib=0.5, dtype="bfloat16").arguments(8000, PLACE)
        assert words.count("--kv-cache-memory-bytes") == words.count("--dtype") == 1
        assert words[words.index("--kv-cache-memory-bytes") + 1] == str(1 << 29)
        assert words[words.index("--dtype") + 1] == "bfloat16"

    def test_drafts_from_siblings_are_found_where_the_model_runs(self) -> None:
        spec = EngineSpec(model="/m", draft="grouped", draft_tokens=5)
        cpu, gpu = (dict(itertools.pairwise(spec.arguments(8000, Placement({}, {}, gpu=gpu)))) for gpu in (False, True))
        methods = [json.loads(each["--speculative-config"]) for each in (cpu, gpu)]
        assert [each["method"] for each in methods] == ["custom_class", "ngram_gpu"]
        assert [each["num_speculative_tokens"] for each in methods] == [5, 5]
        assert "--additional-config" not in cpu
        assert json.loads(gpu["--additional-config"]) == {"seer_drafts": True}


class TestPlacement:
    @pytest.fixture
    def no_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(placement, "visible_gpus", list)

    def test_cores_are_shared_out(self, no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(placement, "usable_cores", lambda: [2, 3, 5, 7, 8])
        envs = [each.env for each in placement.place(2, "m")]
        assert [env["OMP_PLACES"] for env in envs] == ["{2,3}", "{5,7}"]
        assert [env["OMP_NUM_THREADS"] for env in envs] == ["2", "2"]

    def test_more_engines_than_cores(self, no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(placement, "usable_cores", lambda: [0, 1])
        envs = [each.env for each in placement.place(3, "m")]
        assert [env["OMP_NUM_THREADS"] for env in envs] == ["1"] * 3
        assert not any("OMP_PLACES" in env for env in envs), "one thread is not bound"

    @pytest.mark.parametrize(("bfloat16", "dtype"), [(True, None), (False, "float32")])
    def test_the_cpu_decides_the_dtype(
        self, no_gpu: None, monkeypatch: pytest.MonkeyPatch, bfloat16: bool, dtype: str | None
    ) -> None:
        monkeypatch.setattr(placement, "has_bfloat16", lambda: bfloat16)
        (only,) = placement.place(1, "m")
        assert only.options.get("--dtype") == dtype
        assert "--enforce-eager" in only.options

    @pytest.fixture
    def driver(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text("#!/bin/sh\necho '0, 81559, GPU-aa'\necho '1, 40960, GPU-bb'\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def test_one_gpu_each_and_vllm_measures(self, driver: None) -> None:
        placements = placement.place(2, "m")
        assert [each.env for each in placements] == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
        assert [each.options for each in placements] == [{}, {}]

    def test_a_shared_gpu_is_not_promised_twice(
        self, driver: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-aa")
        (tmp_path / "model.safetensors").write_bytes(b"w" * 1000)
        placements = placement.place(3, str(tmp_path))
        assert {each.env["CUDA_VISIBLE_DEVICES"] for each in placements} == {"GPU-aa"}
        sizes = [int(each.options["--kv-cache-memory-bytes"] or 0) for each in placements]
        assert min(sizes) > 20 << 30
        assert sum(size + 1000 + placement.GPU_OVERHEAD_BYTES for size in sizes) <= 81559 << 20

    def test_room_is_left_for_an_engine_that_starts_later(self, driver: None, tmp_path: Path) -> None:
        """One that is told its KV asks for no more than it takes; vLLM would want nine tenths to be free."""
        (tmp_path / "model.safetensors").write_bytes(b"w" * 1000)
        first, second = placement.place(2, str(tmp_path), 8 << 30)
        assert first.options["--kv-cache-memory-bytes"] == str(8 << 30)
        assert 0.13 < float(first.options["--gpu-memory-utilization"] or 0) < 0.15
        assert 0.27 < float(second.options["--gpu-memory-utilization"] or 0) < 0.28
        with pytest.raises(FleetError, match="do not fit on GPU 1"):
            placement.place(2, str(tmp_path), 40 << 30)

    def test_too_many_for_the_gpus(self, driver: None) -> None:
        with pytest.raises(FleetError, match="do not fit on GPU 1"):
            placement.place(40, "m")

    def test_a_gpu_hidden_from_us_is_left_alone(self, driver: None, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
        assert placement.visible_gpus() == [("1", 40960 << 20)]
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        assert placement.visible_gpus() == []

    def test_a_driver_that_does_not_answer(self, driver: None, tmp_path: Path) -> None:
        (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
        assert placement.visible_gpus() == []


class TestProcess:
    STUBBORN = "import signal, subprocess, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    STUBBORN += "subprocess.Popen(['sleep', '600']); print('up', flush=True); time.sleep(600)"

    WITH_CHILD = "import subprocess, time; subprocess.Popen(['sleep', '600']); time.sleep(600)"

    async def start(self, tmp_path: Path, code: str) -> Process:
        started = await Process.start([sys.executable, "-c", code], os.environ, tmp_path / "logs" / "p.log")
        log = tmp_path / "logs" / "p.log"
        await eventually(lambda: "up" in log.read_text() or not started.alive)
        return started

    async def test_a_child_that_will_not_end_is_killed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(process, "GRACE_S", 0.3)
        child = await self.start(tmp_path, self.STUBBORN)
        assert len(members(child.pid)) == 3, "guard, child, grandchild"
        await child.stop()
        wait_until(lambda: not members(child.pid))

    async def test_the_guard_asks_before_it_kills(self, tmp_path: Path) -> None:
        code = "import signal, sys, time\ndef end(*_): print('tidy', flush=True); sys.exit()\n"
        code += "signal.signal(signal.SIGTERM, end); print('up', flush=True); time.sleep(600)"
        child = await self.start(tmp_path, code)
        await child.stop()
        assert "tidy" in (tmp_path / "logs" / "p.log").read_text()
        wait_until(lambda: not members(child.pid))

    async def test_what_a_dead_child_leaves_is_killed(self, tmp_path: Path) -> None:
        child = await self.start(tmp_path, "import subprocess; subprocess.Popen(['sleep', '600']); print('up')")
        await asyncio.wait_for(child.wait(), 20)
        wait_until(lambda: not members(child.pid))
        assert child.last_words() == "exited with code 0"

    async def test_a_killed_guard_takes_all_with_it(self, tmp_path: Path) -> None:
        child = await self.start(tmp_path, self.STUBBORN)
        os.kill(child.pid, signal.SIGKILL)
        await asyncio.wait_for(child.wait(), 20)
        wait_until(lambda: not members(child.pid))

    @pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
    def test_nothing_outlives_the_owner(self, tmp_path: Path, how: signal.Signals) -> None:
        owner_code = f"""
            import asyncio, os, sys
            from pathlib import Path
            from seer_servers.process import Process
            async def main():
                child = await Process.start([sys.executable, "-c", {self.WITH_CHILD!r}], os.environ, Path("log"))
                print(child.pid, flush=True)
                await asyncio.sleep(600)
            asyncio.run(main())
        """
        command = [sys.executable, "-c", textwrap.dedent(owner_code)]
        env = os.environ | {"TMPDIR": str(tmp_path)}
        quiet = subprocess.DEVNULL
        owner = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, stderr=quiet, env=env)
        assert owner.stdout
        group = int(owner.stdout.readline())
        wait_until(lambda: len(members(group)) == 3)
        (sockets,) = tmp_path.glob("seer-*")
        assert any(p.environ().get("VLLM_RPC_BASE_PATH") == str(sockets) for p in members(group))
        (sockets / "left behind").touch()
        owner.send_signal(how)
        owner.wait(20)
        wait_until(lambda: not members(group))
        assert not sockets.exists()

    async def test_last_words_are_the_errors_without_control_characters(self, tmp_path: Path) -> None:
        code = r"print('up\n\x1b[31mRuntimeError: no \x07memory\x1b[0m\nINFO cleaning up'); raise SystemExit(1)"
        child = await self.start(tmp_path, code)
        await child.wait()
        assert child.last_words() == "RuntimeError: no memory\nexited with code 1"

    async def test_last_words_are_of_this_life_only(self, tmp_path: Path) -> None:
        await (await self.start(tmp_path, "print('OSError: old'); raise SystemExit(1)")).wait()
        child = await self.start(tmp_path, "print('fine')")
        await child.wait()
        assert "old" not in child.last_words()
        assert "old" in (tmp_path / "logs" / "p.log").read_text()


class FakePool:
    """Writes down its life and, told by `lived`, its engines'."""

    kind = "fake"
    fleet: LocalFleet

    def __init__(self, *, broken: bool = False) -> None:
        self.life: list[str] = []
        self.lived = self.life.append
        self._broken = broken

    async def start(self) -> None:
        self.life.append("pool starts")
        if self._broken:
            raise FleetError("no memory")

    async def stop(self) -> None:
        left = [engine for engine in self.fleet.engines if engine.pid and engine.process.alive]
        self.life.append(f"pool stops with {len(left)} engines left")

    def arguments(self, index: int) -> list[str]:
        return ["--pooled", str(index)]

    def env(self, index: int) -> dict[str, str]:
        return {"POOLED": str(index), "BOTH": "the pool's"}


class TestFleet:
    async def test_two_engines_come_and_go(
        self, spec: EngineSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("VLLM_API_KEY", "of somebody else")
        monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "40")
        names = ["VLLM_API_KEY", "VLLM_CPU_KVCACHE_SPACE", "VLLM_PLUGINS", "HF_HUB_OFFLINE"]
        env = spec.extra_env | {"SHOW": json.dumps(names)}
        lines: list[str] = []
        async with LocalFleet(msgspec.structs.replace(spec, extra_env=env), 2, tmp_path, say=lines.append) as fleet:
            assert len(set(fleet.urls)) == 2
            for engine in fleet.engines:
                assert engine.url.startswith("http://127.0.0.1:")
                seen = ask(engine.url)
                assert seen["env"] == dict(zip(names, [None, None, "seer", "1"], strict=True))
                assert engine.log.is_file()
            groups = [engine.process.pid for engine in fleet.engines]
        async with asyncio.timeout(30):  # what was killed may take a moment to be gone
            while any(members(group) for group in groups):
                await asyncio.sleep(0.05)
        assert sum(bool(re.fullmatch(r"engine-\d is ready after \d+ s", line)) for line in lines) == 2

    async def test_an_engine_that_dies_while_starting_ends_the_wait(self, spec: EngineSpec, tmp_path: Path) -> None:
        dying = msgspec.structs.replace(spec, extra_args=("--die",))
        started = time.monotonic()
        with pytest.raises(FleetError, match="ended while it started") as raised:
            await LocalFleet(dying, 1, tmp_path).__aenter__()
        assert time.monotonic() - started < 60
        assert "ValueError: the model is too large\nexited with code 3\n" in str(raised.value)
        assert "engine-0.log" in str(raised.value)

    async def test_one_bad_engine_takes_the_others_down(self, spec: EngineSpec, tmp_path: Path) -> None:
        fleet = LocalFleet(spec, 2, tmp_path)
        fleet.engines[1]._arguments.append("--die")
        with pytest.raises(FleetError, match="engine-1 ended"):
            await fleet.__aenter__()
        wait_until(lambda: not members(fleet.engines[0].process.pid))

    async def test_a_killed_engine_comes_back_at_its_url(self, spec: EngineSpec, tmp_path: Path) -> None:
        lines: list[str] = []
        async with LocalFleet(spec, 1, tmp_path, say=lines.append) as fleet:
            (engine,) = fleet.engines
            first = await asyncio.to_thread(ask, engine.url)
            old_group = engine.process.pid
            engine.process.kill()
            await eventually(lambda: sum("is ready" in line for line in lines) == 2)
            assert engine.epoch == 2
            assert (await asyncio.to_thread(ask, engine.url))["pid"] != first["pid"]
            wait_until(lambda: not members(old_group))
            group = engine.process.pid
        wait_until(lambda: not members(group))  # an engine that was started again ends with the fleet, too
        assert any("engine-0 died and starts again" in line for line in lines)

    async def test_an_engine_that_keeps_dying_is_given_up(
        self, spec: EngineSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(fleet_module, "MAX_RESTARTS", 2)
        lines: list[str] = []
        async with LocalFleet(spec, 1, tmp_path, say=lines.append) as fleet:
            (engine,) = fleet.engines
            engine._arguments.append("--die")
            engine.process.kill()
            await asyncio.wait_for(fleet._keepers[0], 30)
            assert engine.epoch == 3
        assert lines[-1].startswith(
            "engine-0 is given up, it died 3 times in a row: ValueError: the model is too large"
        )

    async def test_leaving_while_engines_start_ends_them(self, spec: EngineSpec, tmp_path: Path) -> None:
        fleet = LocalFleet(spec, 1, tmp_path)
        (engine,) = fleet.engines
        engine.url = "http://127.0.0.1:9"  # never answers
        entering = asyncio.create_task(fleet.__aenter__())
        await eventually(lambda: engine._process is not None)
        entering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await entering
        wait_until(lambda: not members(engine.process.pid))

    async def test_the_pool_comes_first_goes_last_and_reaches_every_life(
        self, spec: EngineSpec, tmp_path: Path
    ) -> None:
        pool = FakePool()
        env = spec.extra_env | {"SHOW": '["POOLED", "BOTH"]', "BOTH": "mine"}
        fleet = LocalFleet(msgspec.structs.replace(spec, extra_env=env), 2, tmp_path, pool=pool, say=pool.lived)
        pool.fleet = fleet
        async with fleet:
            for index, engine in enumerate(fleet.engines):
                seen = await asyncio.to_thread(ask, engine.url)
                assert seen["argv"][1:3] == ["--pooled", str(index)]  # type: ignore[index]
                assert seen["env"] == {"POOLED": str(index), "BOTH": "mine"}, "what the caller asks for comes last"
            fleet.engines[1].process.kill()
            await eventually(lambda: fleet.engines[1].epoch == 2 and fleet.engines[1].state == "up")
            assert (await asyncio.to_thread(ask, fleet.engines[1].url))["env"]["POOLED"] == "1"  # type: ignore[index]
        assert pool.life[0] == "pool starts"
        assert pool.life[1].startswith("engine-")
        assert pool.life[-1] == "pool stops with 0 engines left"

    async def test_a_pool_that_does_not_start_takes_no_engine_with_it(self, spec: EngineSpec, tmp_path: Path) -> None:
        pool = FakePool(broken=True)
        fleet = pool.fleet = LocalFleet(spec, 1, tmp_path, pool=pool)
        with pytest.raises(FleetError, match="no memory"):
            await fleet.__aenter__()
        assert fleet.engines[0].pid is None
        assert pool.life == ["pool starts", "pool stops with 0 engines left"], "a half-started one is cleaned up"


OWNER = """
import asyncio, sys
from pathlib import Path
from seer_servers.fleet import EngineSpec, LocalFleet
async def main():
    spec = EngineSpec(
        model=sys.argv[1], max_model_len=512, max_num_seqs=4, num_blocks=64, kv_cache_gib=0.5,
        extra_env={"OMP_NUM_THREADS": "1"},
    )
    async with LocalFleet(spec, 1, Path(sys.argv[2])) as fleet:
        print(fleet.engines[0].process.pid, fleet.urls[0], flush=True)
        await asyncio.sleep(600)
asyncio.run(main())
"""


@pytest.mark.vllm
def test_a_real_engine_follows_its_spec_and_its_owner_into_death(vllm_installed: None, tmp_path: Path) -> None:
    command = [sys.executable, "-c", OWNER, str(ensure_default_model()), str(tmp_path)]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert owner.stdout
    group, url = owner.stdout.readline().split()
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as reply:
        (cache,) = (line for line in reply.read().decode().splitlines() if line.startswith("vllm:cache_config_info{"))
    assert 'num_gpu_blocks="64"' in cache
    assert 'block_size="32"' in cache
    assert "VLLM::EngineCore" in " ".join(word for each in members(int(group)) for word in each.cmdline())
    assert len(members(int(group))) >= 3, "guard, server, engine"
    owner.kill()
    wait_until(lambda: not members(int(group)), process.GRACE_S + 10)
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(url, timeout=30)
