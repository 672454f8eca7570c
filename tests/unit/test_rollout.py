"""The end of a rollout on a disk that is full by then."""

from __future__ import annotations

import errno
import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from seer_async.config import resolve
from seer_async.errors import StorageError
from seer_async.rollout import Rollout
from seer_async.runfolder import RunFolder
from seer_async.trace import TraceWriter
from seer_async.types import ChunkReply, EngineInfo, Prompt

if TYPE_CHECKING:
    from pathlib import Path

    from seer_async.fleet import Fleet

INFO = EngineInfo(boot="b", model="m", max_model_len=100, block_size=16, num_blocks=100, weight_version="v")


class Engine:
    """Ends each response at once, and is silent otherwise."""

    info = INFO
    url = "http://engine"

    async def generate(self, *_: Any, **__: Any) -> ChunkReply:
        return ChunkReply(token_ids=[5], logprobs=[-1.0], finish_reason="stop", version_after="v")

    async def stats(self, **_: Any) -> Any:
        return SimpleNamespace(
            boot="b", weight_version=None, preemptions=0, kv_used=0.0, waiting=0, pool=None, drafts=None
        )


@pytest.mark.parametrize("step", ["measure", "sync", "save", "trace"])
async def test_a_disk_that_is_full_at_the_end_is_told_of_and_hinders_no_other_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    async def flush_pools(_: str) -> None:
        pass

    config = resolve({"rollout": {"n": 2}, "output": {"trace": True}})
    folder = RunFolder.create(tmp_path / "run", config, [Prompt(id="g", token_ids=[1, 2])], dataset="test", command=[])
    fleet = SimpleNamespace(clients={"a": Engine()}, attached={"a": INFO}, info=INFO, flush_pools=flush_pools)
    rollout = Rollout(folder, cast("Fleet", fleet), None)
    emit = folder.emit

    def last(sample: Any) -> None:
        emit(sample)
        monkeypatch.setattr(*((TraceWriter, "close") if step == "trace" else (RunFolder, step)), refuse)

    monkeypatch.setattr(folder, "emit", last)
    with pytest.raises(StorageError, match=r"cannot write .*No space left on device; make room, .*--resume"):
        await rollout.run()
    folder.close()
    status = json.loads((tmp_path / "run" / "run.json").read_text())["status"]
    assert status == ("running" if step == "save" else "done")
    if step != "trace":
        assert json.loads((tmp_path / "run" / "trace.json").read_text())
    assert len((tmp_path / "run" / "samples.jsonl").read_text().splitlines()) == 2
