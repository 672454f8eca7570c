"""The shell's end: whatever happens in the same moment, a rollout that has stopped returns."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

import pytest

from seer_async.config import resolve
from seer_async.core import Core
from seer_async.errors import EngineError, FailureKind
from seer_async.events import GroupAdded, InputClosed
from seer_async.runfolder import RunFolder
from seer_async.shell import Clock, Shell
from seer_async.types import ChunkReply, EngineInfo, EngineStats, Prompt

if TYPE_CHECKING:
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
    async with asyncio.timeout(5):
        assert await engine.shell.run({"a": INFO}) == "done"
    folder.close()
