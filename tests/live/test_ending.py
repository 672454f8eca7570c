"""What run.json and the last lines say of a run: its weights, its failures, and its figures over all its parts."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from typer.testing import CliRunner

from seer_async.errors import FleetError
from seer_async.types import Prompt
from seer_cli.closing import closing_words
from seer_cli.main import app
from tests.live.engines import MockProcess, mock_engines
from tests.runs import resume, roll, samples

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from seer_async.rollout import Rollout

N = 8
PROMPTS = [Prompt(id=f"g{number}", token_ids=[5 + number, 6, 7]) for number in range(4)]
TREE: dict[str, Any] = {
    "rollout": {"n": N, "chunk_size": 32},
    "sampling": {"max_tokens": 320, "seed": 3},
    "engine": {"telemetry_s": 0.1, "probe_timeout_s": 60.0},
}
MARK = TREE | {"rollout": TREE["rollout"] | {"mixed_versions": "mark"}}
FAST = ["--step-ms", "1", "--mean-length", "50"]
SLOW = ["--step-ms", "5", "--mean-length", "250"]


def run_json(path: Path) -> dict[str, Any]:
    said = json.loads((path / "run.json").read_text())
    assert isinstance(said, dict)
    return said


def meanwhile(what: Callable[[], Awaitable[Any]]) -> Callable[[Rollout], None]:
    """Do something in the middle of a rollout: when there are tokens."""

    async def later(rollout: Rollout) -> None:
        while not rollout.core.responses.tokens:
            await asyncio.sleep(0.01)
        await what()

    def begin(rollout: Rollout) -> None:
        tasks.append(asyncio.get_running_loop().create_task(later(rollout)))

    tasks: list[asyncio.Task[None]] = []
    return begin


async def post(url: str, path: str, body: dict[str, Any]) -> None:
    async with httpx.AsyncClient(timeout=60) as client:
        (await client.post(url + path, json=body)).raise_for_status()


async def test_new_weights_in_the_middle_of_a_marked_run(tmp_path: Path) -> None:
    with mock_engines(SLOW) as (engine,):
        update = meanwhile(lambda: post(engine.url, "/update_weight_version", {"new_version": "v2"}))
        result = await roll(tmp_path / "run", [engine.url], PROMPTS, MARK, during=update)
    off = sum(not sample["on_policy"] for sample in samples(tmp_path / "run").values())
    said = run_json(tmp_path / "run")
    assert off > 0
    assert said["summary"]["off_policy"] == off
    assert said["on_policy"] is False
    assert any(f"{off} samples are off-policy" in line for line in closing_words(result))


async def test_engines_that_differ_in_their_weights_are_refused(tmp_path: Path) -> None:
    with mock_engines(FAST, [*FAST, "--weight-version", "v2"]) as engines:
        urls = [engine.url for engine in engines]
        with pytest.raises(FleetError, match=f"{urls[0]} has default, {urls[1]} has v2") as raised:
            await roll(tmp_path / "refused", urls, PROMPTS, TREE)
        assert "rollout.mixed_versions=mark" in str(raised.value)
        assert not (tmp_path / "refused").exists()
        result = await roll(tmp_path / "run", urls, PROMPTS, MARK)
    said = run_json(tmp_path / "run")
    versions = [sample["weight_version"] for sample in samples(tmp_path / "run").values()]
    assert said["summary"]["weight_versions"] == {name: versions.count(name) for name in ("default", "v2")}
    assert min(said["summary"]["weight_versions"].values()) > 0
    assert said["on_policy"] is False
    assert any("not of one policy" in line for line in closing_words(result))


async def test_an_engine_that_comes_back_with_other_weights_gets_nothing(tmp_path: Path) -> None:
    with mock_engines(SLOW, SLOW) as (one, other):
        again = MockProcess(int(other.url.rsplit(":", 1)[1]), *SLOW, "--weight-version", "old")

        async def replace() -> None:
            other.kill()
            await again.start()

        tree = TREE | {"engine": TREE["engine"] | {"max_in_flight": 4}}
        try:
            result = await roll(tmp_path / "run", [one.url, other.url], PROMPTS, tree, during=meanwhile(replace))
        finally:
            again.kill()
    assert result.summary["weight_versions"] == {"default": N * len(PROMPTS)}
    assert run_json(tmp_path / "run")["on_policy"] is True
    assert not any("policy" in line for line in closing_words(result))


async def test_failures_are_explained(tmp_path: Path) -> None:
    tree = TREE | {"rollout": TREE["rollout"] | {"max_attempts": 1}}
    with mock_engines(SLOW) as (engine,):
        fail = meanwhile(lambda: post(engine.url, "/mock/faults", {"active": {"error-500": 0.5}}))
        result = await roll(tmp_path / "run", [engine.url], PROMPTS, tree, during=fail)
    assert result.exit_code == 3
    words = "\n".join(closing_words(result))
    failed = next(sample for sample in samples(tmp_path / "run").values() if sample["error"])
    assert f"the first that failed is {failed['id']}: {failed['error']}" in words
    assert f"again with: seer rollout --resume {tmp_path / 'run'}" in words


@pytest.mark.parametrize("killed", [False, True])
async def test_a_resumed_run_is_one_run(tmp_path: Path, killed: bool) -> None:
    path = tmp_path / "run"

    def interrupt(rollout: Rollout) -> None:
        asyncio.get_running_loop().call_later(0.3, rollout.drain)

    with mock_engines(SLOW) as (engine,):
        tree = TREE | {"output": {"trace": False, "metrics_s": 0.05}}
        first = await roll(path, [engine.url], PROMPTS, tree, during=interrupt)
        assert first.reason == "drained"
        if killed:  # then it wrote no summary
            said = run_json(path)
            (path / "run.json").write_text(json.dumps(said | {"status": "running", "summary": None}))
        second = await resume(path, [engine.url])
    before, after, summary = first.snapshot, second.snapshot, second.summary
    assert run_json(path)["summary"] == summary
    generated = sum(view.generated for snapshot in (before, after) for view in snapshot.engines)
    assert summary["generated"] == generated == summary["tokens"]
    assert summary["seconds"] >= first.summary["seconds"] + 0.05
    assert summary["tokens_per_second"] == pytest.approx(generated / summary["seconds"], abs=0.1)


async def test_a_run_that_has_ended_is_left_alone(tmp_path: Path) -> None:
    with mock_engines(FAST) as (engine,):
        result = await roll(tmp_path / "run", [engine.url], PROMPTS, TREE)
    assert result.exit_code == 0
    files = {file: file.read_bytes() for file in (tmp_path / "run").iterdir()}
    command = ["rollout", "--resume", str(tmp_path / "run"), "--json"]
    again = await asyncio.to_thread(CliRunner().invoke, app, command)  # its engine is gone: it needs none
    assert again.exit_code == 0
    assert json.loads(again.stdout) == {"run": str(tmp_path / "run"), "reason": "done", "exit_code": 0} | (
        result.summary
    )
    assert {file: file.read_bytes() for file in (tmp_path / "run").iterdir()} == files
