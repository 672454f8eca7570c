"""The command line: what is wrong is said in one sentence with the remedy, before any engine is started."""

from __future__ import annotations

import json
import socket
from typing import TYPE_CHECKING

import pytest

from seer_async.config import read_toml, resolve
from seer_cli.main import main

if TYPE_CHECKING:
    from pathlib import Path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["seer", *arguments])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["-n", "0"], 2, "rollout.n must be at least 1"),
        (["--set", "rollout.chunks=3"], 2, "unknown config key 'rollout.chunks'"),
        (["--set", "n"], 2, "section.key=value"),
        (["--policy", "best"], 2, "choose one of"),
        (["--policy", "oracle"], 2, "scheduler.lengths=FILE"),
        (["--set", "sampling.response_format={}"], 2, "does not survive a chunk border"),
        (["--set", "scheduler.force_lengths=true"], 2, "lacks 'arith-001/0'"),
        (["--display", "loud"], 2, "--display must be"),
        (["none.jsonl"], 2, "cannot read dataset none.jsonl"),
        (["--config", "none.toml"], 2, "cannot read config none.toml"),
        (["--resume", "nowhere"], 2, "cannot be resumed"),
        (["--resume", "nowhere", "--temperature", "0"], 2, "only engine options go with it"),
        (["--resume", "nowhere", "--seed", "0"], 2, "only engine options go with it"),
        (["--resume", "nowhere", "--chunk-size", "0"], 2, "only engine options go with it"),
        (
            ["--server", "http://a:1", "--engines", "2"],
            2,
            "--engines is for engines that are started here, and --server",
        ),
        (["--server", "http://a:1", "--model", "m"], 2, "--model is for engines that are started here"),
        (["--fleet", "f", "--kv-pool", "shm"], 2, "--kv-pool is for engines that are started here, and --fleet names"),
        (["--model", "/no/such/folder"], 2, "there is no such folder; name one with config.json"),
        (["--model", "no such model"], 2, "there is no such folder; name one with config.json"),
        (["--model", "."], 2, "holds no config.json"),
        (["--server", "127.0.0.1:8391"], 2, "give a server's base URL, like http://10.0.0.1:8000"),
        (["--server", "http://127.0.0.1:8391/v1"], 2, "without /v1"),
        (["--server", "http://localhost:1", "--server", "http://127.0.0.1:1/"], 2, "are the same server: give it once"),
        (["--resume", "nowhere", "-n", "3"], 2, "only engine options go with it"),
    ],
)
def test_wrong_usage(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: list[str],
    code: int,
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "rollout", *arguments) == code
    assert says in capsys.readouterr().err
    assert run(monkeypatch, "rollout", "--json", *arguments) == code
    answer = json.loads(capsys.readouterr().out)
    assert says in answer["message"]
    assert answer["exit_code"] == code
    assert not (tmp_path / "runs").exists()


def test_dry_run_shows_every_key_and_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "rollout", "--limit", "3", "-n", "4", "--stop", "a", "--dry-run", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["groups"], plan["samples"]) == (3, 12)
    assert plan["config"]["sampling"]["stop"] == ["a"]
    assert plan["config"]["engine"]["patience_s"] == 300.0
    assert run(monkeypatch, "rollout", "--dry-run") == 0
    assert "patience_s = 300.0" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_what_a_dry_run_prints_is_a_config(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    stops = ['"', "\\n", "\n\t\x7f\x00", "é\U0001f600", "'''"]
    given = [word for stop in stops for word in ("--stop", stop)]
    given += ["--seed", "0", "--set", "sampling.logit_bias={198=-5.0, 7=1e-7}", "--set", "sampling.temperature=1e22"]
    given += ["--set", "fleet.vllm_args=['--a', 'b c']", "--set", "output.trace=false"]
    printed = []
    for options in (given, ["--config", "printed.toml"]):
        assert run(monkeypatch, "rollout", "--dry-run", *options, "--out", "run") == 0
        printed.append(capsys.readouterr().out)
        (tmp_path / "printed.toml").write_text(printed[-1])
    assert printed[0] == printed[1]
    config = resolve(read_toml(tmp_path / "printed.toml"))
    assert config.sampling.stop == stops
    assert config.sampling.logit_bias == {198: -5.0, 7: 1e-7}
    assert (config.sampling.seed, config.sampling.temperature, config.output.trace) == (0, 1e22, False)


def test_a_folder_that_is_taken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "run.json").write_text("{}")
    assert run(monkeypatch, "rollout", "--dry-run", "--out", str(tmp_path)) == 5
    assert "--resume" in capsys.readouterr().err
    (tmp_path / "run.json").rename(tmp_path / "notes")
    assert run(monkeypatch, "rollout", "--dry-run", "--out", str(tmp_path)) == 5
    assert "not an empty folder" in capsys.readouterr().err


def test_errors_are_shown_and_not_obeyed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "rollout", "--dry-run", "\x1b[2J\u202e.jsonl") == 2
    assert capsys.readouterr().err == "seer: cannot read dataset \ufffd[2J\ufffd.jsonl: No such file or directory\n"


@pytest.mark.parametrize("command", [["serve", "--engines", "1"], ["mock-engine"]])
def test_a_port_that_is_taken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, command: list[str]
) -> None:
    """Told before engines are started: `serve` would make its run folder first."""
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert run(monkeypatch, *command, "--port", str(port)) == 2
    said = f"seer: cannot listen on 127.0.0.1:{port}: Address already in use; choose another --port, or another --host"
    assert capsys.readouterr().err.splitlines() == [said]
    assert not (tmp_path / "runs").exists()


def test_help_teaches(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "rollout", "--help") == 0
    text = capsys.readouterr().out
    for word in ("Exit codes", "--resume", "--policy", "samples.jsonl", "130"):
        assert word in text
