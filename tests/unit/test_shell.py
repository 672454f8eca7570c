"""The shell: what happens in the same moment as its end, and cancellations that are lost."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, cast

import pytest

from seer_async.config import resolve
from seer_async.core import Core
from seer_async.errors import EngineError, FailureKind
from seer_async.events import AbortRequested, GroupAdded, InputClosed, RequestsCancelled
from seer_async.runfolder import RunFolder
from seer_async.shell import Clock, Shell
from seer_async.trace import TraceWriter
from seer_async.types import ChunkReply, EngineInfo, EngineStats, Prompt

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from seer_async.engine import EngineClient

INFO = EngineInfo(boot="b", model="m", max_model_len=100, block_size=16, num_blocks=100)
STATS = EngineStats(
    boot="b",
    running=0,
    waiting=0,
    kv_used=0.0,
    preemptions=0,
    generated_tokens=0,
    prompt_tokens=0,
    cached_tokens=0,
    weight_version="unknown",
)


class Engine:
    """Answers every call in the moment in which another call has thrown suspicion on it."""

    info = INFO
    shell: Shell

    async def generate(self, *_: Any, **__: Any) -> ChunkReply:
        await asyncio.sleep(0.05)
        self.shell.hurry()
        return ChunkReply(token_ids=[5], logprobs=[-1.0], finish_reason="stop", version_after="unknown")

    async def stats(self, **_: Any) -> EngineStats:
        return STATS


class Deaf(Engine):
    """Its telemetry fails in the moment in which it is given up, so that the first cancellation is lost."""

    heard = False

    async def stats(self, **_: Any) -> EngineStats:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            if not self.heard:
                self.heard = True
                raise EngineError(FailureKind.TIMEOUT, "too late") from None
            raise
        return STATS


@pytest.mark.timeout(30)
@pytest.mark.parametrize("kind", [Engine, Deaf])
async def test_what_comes_in_the_last_moment_keeps_no_monitor_alive(tmp_path: Path, kind: type[Engine]) -> None:
    config = resolve({"engine": {"telemetry_s": 10.0}})
    engine = kind()
    folder = RunFolder.create(tmp_path / "run", config, [], dataset="test", command=[])
    core = Core(config, ["a"], run="r", seed=1, tokenizer=None, lengths=None)
    engine.shell = Shell(core, {"a": cast("EngineClient", engine)}, folder, clock=Clock())
    engine.shell.post(GroupAdded(prompt=Prompt(id="p", token_ids=[1, 2]), n=1, limit=10), InputClosed())
    async with asyncio.timeout(20):
        assert await engine.shell.run({"a": INFO}) == "done"
    folder.close()


class Stubborn(Engine):
    """A call or a reading that is cancelled fails instead, each time but the last."""

    def __init__(self) -> None:
        self.asked = 0
        self.cancelled = 0

    async def attach(self, **_: Any) -> EngineInfo:
        return INFO

    async def generate(self, *_: Any, **__: Any) -> ChunkReply:
        return await self._hang()

    async def stats(self, **_: Any) -> EngineStats:
        return await self._hang()

    async def _hang(self) -> Any:
        self.asked += 1
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.cancelled += 1
            if self.cancelled == 1:
                raise EngineError(FailureKind.CONNECTION, "reset") from None
            raise


@asynccontextmanager
async def shell_over(tmp_path: Path, engine: Engine, **options: Any) -> AsyncIterator[Shell]:
    """The shell of a lasting core, which must end well."""
    config = resolve({"engine": {"telemetry_s": 10.0}})
    folder = RunFolder.create(tmp_path / "run", config, [], dataset="test", command=[])
    core = Core(config, ["a"], run="r", seed=1, lasting=True)
    shell = Shell(core, {"a": cast("EngineClient", engine)}, folder, clock=Clock(), **options)
    running = asyncio.create_task(shell.run({"a": INFO}))
    await asyncio.sleep(0.05)
    yield shell
    await asyncio.sleep(0.05)
    assert not running.done()
    shell.post(AbortRequested())
    async with asyncio.timeout(20):
        assert await running == "aborted"
    folder.close()


@pytest.mark.timeout(30)
async def test_a_call_whose_cancellation_is_lost_is_not_told_of_again(tmp_path: Path) -> None:
    tracer = TraceWriter(tmp_path / "trace.json")
    async with shell_over(tmp_path, Stubborn(), tracer=tracer) as shell:
        shell.post(GroupAdded(prompt=Prompt(id="p", token_ids=[1, 2]), n=1, limit=10))
        await asyncio.sleep(0.05)
        shell.post(RequestsCancelled(requests=("p/0",)))
    tracer.close()
    assert (tmp_path / "trace.json").read_text().count('"outcome"') == 1


@pytest.mark.timeout(30)
async def test_a_removed_engine_whose_monitor_outlives_it_ends_nothing(tmp_path: Path) -> None:
    engine = Stubborn()
    async with shell_over(tmp_path, engine) as shell:
        shell.remove_engine("a")
    assert (engine.asked, engine.cancelled) == (1, 1)


@pytest.mark.timeout(30)
async def test_an_engine_that_is_not_accepted_any_more_has_one_monitor(tmp_path: Path) -> None:
    engine = Deaf()
    engine.attach = Stubborn().attach  # type: ignore[attr-defined]
    async with shell_over(tmp_path, engine, accepts=lambda *_: "not now") as shell:
        shell.check_engine("a")
        await asyncio.sleep(0.05)
        assert engine.heard
        assert [task.get_name() for task in asyncio.all_tasks()].count("monitor a") == 1
