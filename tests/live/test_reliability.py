"""Whole rollouts over mock engine processes that are killed, hang, lie and come back; orchestrators killed and resumed.

Mock output is a pure function of prefix and seed, so every sample can be compared with an undivided run. The counts are
those of a quick run; SEER_KILLS and SEER_SAMPLES raise them.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import resource
import signal
import sys
from typing import TYPE_CHECKING, Any

import httpx
import msgspec
import pytest

from seer_async.events import Dispatch
from seer_async.types import Prompt
from seer_servers.mock import LanguageModel, reference_response
from seer_servers.mock.faults import DESCRIPTIONS
from tests.live.engines import MockProcess, mock_engines, running
from tests.runs import roll, samples

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from seer_async.events import Command, Event
    from seer_async.rollout import Rollout

KILLS = int(os.environ.get("SEER_KILLS", "8"))
SAMPLES = int(os.environ.get("SEER_SAMPLES", "480"))
ORCHESTRATOR_KILLS = int(os.environ.get("SEER_ORCHESTRATOR_KILLS", "5"))
MAX_TOKENS = 640
N = 8
MEAN = "250"
MODEL = LanguageModel(mean_length=float(MEAN))
SPEED = ["--step-ms", "2", "--per-request-ms", "0.01", "--mean-length", MEAN]
SLOW = ["--step-ms", "10", "--mean-length", MEAN]
TREE: dict[str, Any] = {
    "rollout": {"n": N, "chunk_size": 32},
    "sampling": {"max_tokens": MAX_TOKENS, "seed": 21},
    "engine": {"telemetry_s": 0.2, "probe_timeout_s": 20.0, "chunk_timeout_s": 5.0},
}


def prompts(count: int) -> list[Prompt]:
    rng = random.Random(5)
    sizes = [rng.randrange(4, 40) for _ in range(count)]
    return [Prompt(id=f"g{i}", token_ids=[rng.randrange(3, 2000) for _ in range(size)]) for i, size in enumerate(sizes)]


def assert_right(by_id: dict[str, dict[str, Any]], groups: int) -> None:
    """Every sample is there, of one weight version, and exactly the undivided response of those weights."""
    assert set(by_id) == {f"g{g}/{i}" for g in range(groups) for i in range(N)}
    for sample in by_id.values():
        tokens, logprobs, reason = reference_response(
            sample["prompt_token_ids"],
            sample["seed"],
            MAX_TOKENS,
            model=msgspec.structs.replace(MODEL, version=sample["weight_version"]),
        )
        assert {chunk["weight_version"] for chunk in sample["chunks"]} == {sample["weight_version"]}
        assert sample["token_ids"] == tokens, sample["id"]
        assert sample["logprobs"] == pytest.approx(logprobs)
        assert sample["finish_reason"] == reason
        assert not sample["error"]


async def test_engines_killed_at_random(tmp_path: Path) -> None:
    groups = SAMPLES // N
    rng = random.Random(1)

    async def havoc(engines: list[MockProcess]) -> None:
        async def kill_and_restart(engine: MockProcess) -> None:
            engine.kill()
            await asyncio.sleep(rng.uniform(0.2, 1.0))
            await engine.start()

        async with asyncio.TaskGroup() as tasks:
            while len(restarts) < KILLS:
                await asyncio.sleep(rng.uniform(0.05, 0.4))
                down = {task.get_name() for task in restarts if not task.done()}
                alive = [engine for engine in engines if engine.url not in down]
                if alive:
                    victim = rng.choice(alive)
                    restarts.append(tasks.create_task(kill_and_restart(victim), name=victim.url))

    restarts: list[asyncio.Task[None]] = []
    with mock_engines(*[SLOW] * 4) as engines:
        chaos = asyncio.create_task(havoc(engines))
        storm = TREE | {"rollout": TREE["rollout"] | {"max_attempts": 50}}  # no engine lives for more than seconds
        result = await roll(tmp_path / "run", [e.url for e in engines], prompts(groups), storm)
        chaos.cancel()
        await asyncio.wait([chaos])
    assert result.exit_code == 0
    assert len(restarts) > 0
    assert_right(samples(tmp_path / "run"), groups)
    print(f"{len(restarts)} kills, {result.snapshot.retries} calls lost, {result.snapshot.migrations} migrations")


@pytest.fixture(scope="module")
def pair() -> Iterator[list[MockProcess]]:
    """Two engines; the second one is made to misbehave."""
    with mock_engines(SPEED, SPEED) as engines:
        yield engines


# A reply under the right id with a sibling's content cannot be told from the truth by anyone but the engine.
FORGERIES = {"duplicate-reply"}


@pytest.mark.parametrize("fault", sorted(DESCRIPTIONS.keys() - FORGERIES))
async def test_a_hostile_engine_spoils_nothing(pair: list[MockProcess], tmp_path: Path, fault: str) -> None:
    """One engine misbehaves in half of its replies; the run still ends with the right samples."""
    tree = TREE | {"engine": {"telemetry_s": 0.2, "probe_timeout_s": 5.0, "chunk_timeout_s": 1.5}}
    turns: list[asyncio.Task[None]] = []
    async with httpx.AsyncClient(timeout=60) as client:

        def turn_hostile(_: Rollout) -> None:  # called after it was attached
            turns.append(asyncio.get_running_loop().create_task(_switch_on(client, pair[1].url, fault)))

        rolling = roll(tmp_path / "run", [e.url for e in pair], prompts(6), tree, during=turn_hostile)
        result = await asyncio.wait_for(rolling, 200)
        await turns[0]
        fired = (await client.get(f"{pair[1].url}/mock/faults")).json()["fired"]
        (await client.post(f"{pair[1].url}/mock/faults", json={"active": {}})).raise_for_status()
    assert fired[fault] > 0
    by_id = samples(tmp_path / "run")
    assert result.exit_code == 0, [sample["error"] for sample in by_id.values() if sample["error"]]
    assert_right(by_id, 6)


async def _switch_on(client: httpx.AsyncClient, url: str, fault: str) -> None:
    (await client.post(f"{url}/mock/faults", json={"active": {fault: 0.5}})).raise_for_status()


async def test_a_sick_engine_is_ejected_soon(tmp_path: Path) -> None:
    """One of four engines fails every call from the middle of the run on.

    Replies arrive in waves here, and a wave of new calls leaves before the first of them has failed; after that the
    engine is closed, and hears of us only to be tried again.
    """
    sent_after_ejection, ejected = 0, False
    with mock_engines(*[SLOW] * 4) as engines:

        def watch(rollout: Rollout) -> None:
            handle_all, sick = rollout.core.handle_all, rollout.core.instances["engine-2"]

            def counting(events: Iterable[Event], now: float) -> list[Command]:
                nonlocal sent_after_ejection, ejected
                commands = handle_all(events, now)
                if sick.ejections:
                    ejected = True
                    sent_after_ejection += sum(isinstance(c, Dispatch) and c.engine == "engine-2" for c in commands)
                return commands

            async def sicken() -> None:
                await asyncio.sleep(0.7)
                async with httpx.AsyncClient(timeout=60) as client:
                    answer = await client.post(f"{engines[2].url}/mock/faults", json={"active": {"error-500": 1.0}})
                    answer.raise_for_status()

            rollout.core.handle_all = counting  # type: ignore[method-assign]
            tasks.append(asyncio.get_running_loop().create_task(sicken()))

        tasks: list[asyncio.Task[None]] = []
        result = await roll(tmp_path / "run", [e.url for e in engines], prompts(40), TREE, during=watch)
    assert result.exit_code == 0
    by_id = samples(tmp_path / "run")
    assert_right(by_id, 40)
    assert ejected
    assert sent_after_ejection <= 10
    assert result.snapshot.retries <= 0.2 * sum(len(sample["chunks"]) for sample in by_id.values())


# The orchestrator as a process


def write_dataset(path: Path, groups: int) -> None:
    lines = [json.dumps({"id": p.id, "prompt_token_ids": p.token_ids}) for p in prompts(groups)]
    path.write_text("\n".join(lines) + "\n")


async def seer(*arguments: str, display: str = "none", limit_bytes: int | None = None) -> asyncio.subprocess.Process:
    def limited() -> None:
        if limit_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

    command = [sys.executable, "-m", "seer_cli.main", "rollout", *arguments, "--display", display]
    return await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, preexec_fn=limited
    )


def run_options(tmp_path: Path, engines: list[MockProcess], groups: int) -> list[str]:
    write_dataset(tmp_path / "data.jsonl", groups)
    options = [str(tmp_path / "data.jsonl"), "-n", str(N), "--chunk-size", "32", "--max-tokens", str(MAX_TOKENS)]
    options += ["--seed", "21", "--out", str(tmp_path / "run")]
    return options + [word for engine in engines for word in ("--server", engine.url)]


async def until_started(path: Path) -> None:
    for _ in range(2400):
        if (path / "journal").exists() and (path / "journal").stat().st_size:
            return
        await asyncio.sleep(0.05)
    raise AssertionError("the run did not start")


async def test_the_orchestrator_killed_and_resumed(tmp_path: Path) -> None:
    rng = random.Random(3)
    with mock_engines(SLOW, SLOW) as engines:
        process = await seer(*run_options(tmp_path, engines, 24))
        kills = 0
        while True:
            await until_started(tmp_path / "run")
            try:
                await asyncio.wait_for(process.wait(), rng.uniform(0.2, 1.2))
                break
            except TimeoutError:
                process.kill()
                await process.wait()
                kills += 1
            process = await seer("--resume", str(tmp_path / "run"))
            await asyncio.sleep(1.0)  # time to start, so that each life makes progress
            if kills == ORCHESTRATOR_KILLS:
                await asyncio.wait_for(process.wait(), 200)
                break
        assert process.returncode == 0, (await process.communicate())[1].decode()
    assert kills >= 2
    assert_right(samples(tmp_path / "run"), 24)
    print(f"{kills} kills of the orchestrator")


@pytest.mark.parametrize("how", ["drain", "abort", "terminate"])
async def test_interrupted_cleanly(tmp_path: Path, how: str) -> None:
    speed = [*SLOW, "--step-ms", "60"] if how == "abort" else SLOW  # chunks last longer than it takes to signal twice
    with mock_engines(speed, speed) as engines:
        process = await seer(*run_options(tmp_path, engines, 12), display="plain")
        await until_started(tmp_path / "run")
        process.send_signal(signal.SIGTERM if how == "terminate" else signal.SIGINT)
        if how == "abort":
            await asyncio.wait_for(_said(process, b"finishing the chunks in flight"), 120)  # two at once may be one
            process.send_signal(signal.SIGINT)
        _, errors = await asyncio.wait_for(process.communicate(), 120)
        assert process.returncode == 130, errors.decode()
        async with asyncio.timeout(60):
            while any([await running(engine) for engine in engines]):
                await asyncio.sleep(0.05)
        status = json.loads((tmp_path / "run" / "run.json").read_text())["status"]
        assert status == ("drained" if how == "drain" else "aborted")
        for engine in engines if speed != SLOW else ():
            await _sped_up(engine, SLOW)
        again = await seer("--resume", str(tmp_path / "run"))
        assert await asyncio.wait_for(again.wait(), 120) == 0
    assert_right(samples(tmp_path / "run"), 12)


async def _said(process: asyncio.subprocess.Process, words: bytes) -> None:
    """Read what a process says of itself, as far as these words."""
    assert process.stderr is not None
    while words not in (line := await process.stderr.readline()):
        assert line, "it has ended"


async def _sped_up(engine: MockProcess, speed: list[str]) -> None:
    """Start it again, as one that need not take its time any more."""
    engine.kill()
    engine.options = speed
    await engine.start()


async def test_a_full_disk(tmp_path: Path) -> None:
    """Exit code 5, whole lines only, and the run goes on when there is room."""
    with mock_engines(SPEED, SPEED) as engines:
        process = await seer(*run_options(tmp_path, engines, 24), limit_bytes=300_000)
        _, errors = await asyncio.wait_for(process.communicate(), 120)
        assert process.returncode == 5, errors.decode()
        assert b"--resume" in errors
        for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines():
            json.loads(line)
        again = await seer("--resume", str(tmp_path / "run"))
        assert await asyncio.wait_for(again.wait(), 120) == 0
    assert_right(samples(tmp_path / "run"), 24)


async def test_no_usable_engine(tmp_path: Path) -> None:
    with mock_engines(SPEED) as engines:
        options = run_options(tmp_path, engines, 2)
    process = await seer(*options, "--json")
    output, _ = await asyncio.wait_for(process.communicate(), 120)
    assert process.returncode == 4
    assert json.loads(output)["error"] == "FleetError"
    assert not (tmp_path / "run").exists()


async def test_two_writers_of_one_folder(tmp_path: Path) -> None:
    with mock_engines([*SLOW, "--step-ms", "120"]) as engines:  # the first still writes when the others have started
        (engine,) = engines
        first = await seer(*run_options(tmp_path, engines, 8))
        await until_started(tmp_path / "run")
        second = await seer("--resume", str(tmp_path / "run"))
        _, errors = await asyncio.wait_for(second.communicate(), 120)
        assert second.returncode == 5
        assert b"another process" in errors
        third = await seer(*run_options(tmp_path, engines, 8))
        _, errors = await asyncio.wait_for(third.communicate(), 120)
        assert third.returncode == 5
        assert b"holds another run" in errors
        await _sped_up(engine, SPEED)
        assert await asyncio.wait_for(first.wait(), 120) == 0
    assert_right(samples(tmp_path / "run"), 8)
