"""A run folder as a report reads it: leniently, because the run may be going on, or may have died at any byte.

Invariants: only run.json must be there and whole; whatever else cannot be read is left out and named in `problems`.
Each request appears once. Nothing is written, locked or repaired.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from seer_async.errors import StorageError, UsageError
from seer_async.journal import Step, read_steps
from seer_async.runfolder import RunInfo
from seer_async.types import Chunk, DraftStats

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_COMPLETE = {"stop", "length"}
_T = TypeVar("_T")


class Response(msgspec.Struct, frozen=True, kw_only=True):
    """One response: a line of samples.jsonl, or what the journal knows of one that has no line yet.

    `finish_reason` is that of the sample, empty while the response is in flight; `finished`, Unix seconds, is None
    then. `prompt_tokens` is 0 where it is not known.
    """

    id: str
    group: str
    finish_reason: str
    chunks: tuple[Chunk, ...]
    finished: float | None
    prompt_tokens: int = 0
    on_policy: bool = True

    @property
    def tokens(self) -> int:
        """Its length so far, in generated tokens."""
        return sum(chunk.tokens for chunk in self.chunks)

    @property
    def complete(self) -> bool:
        """Whether it ended by itself, so that its length is known."""
        return self.finish_reason in _COMPLETE


class EngineReading(msgspec.Struct, frozen=True):
    """One engine in one line of metrics.jsonl; see `snapshot.EngineView`."""

    name: str
    kv_used: float = 0.0
    in_flight: int = 0
    preemptions: int = 0
    drafts: DraftStats | None = None


class Reading(msgspec.Struct, frozen=True):
    """One line of metrics.jsonl; `now` in Unix seconds."""

    now: float
    engines: list[EngineReading] = []
    retries: int = 0
    restarts: int = 0
    drafts: DraftStats | None = None


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """Everything read from one run folder."""

    path: str
    info: RunInfo
    responses: list[Response]
    readings: list[Reading]
    problems: list[str]

    def setting(self, section: str, key: str) -> Any:
        """A value of the resolved config, or None."""
        table = self.info.config.get(section)
        return table.get(key) if isinstance(table, dict) else None

    @property
    def engine_infos(self) -> list[dict[str, Any]]:
        """What is known of the engines that could be attached; empty before the run has ended."""
        return [entry["info"] for entry in self.info.engines if entry.get("info")]


def read_run(path: Path) -> Run:
    """Read a run folder.

    Raises:
        UsageError: It is no run folder.
    """
    info = _read_info(path)
    problems: list[str] = []
    responses = [_response(line) for line in _lines(path / "samples.jsonl", _Line, problems)]
    by_id = {response.id: response for response in reversed(responses)}
    if len(by_id) < info.samples:
        by_id |= {r.id: r for r in _in_flight(path / "journal", problems) if r.id not in by_id}
    readings = sorted(_lines(path / "metrics.jsonl", Reading, problems), key=lambda reading: reading.now)
    return Run(path=str(path), info=info, responses=list(by_id.values()), readings=readings, problems=problems)


def _read_info(path: Path) -> RunInfo:
    file = path / "run.json"
    try:
        return msgspec.json.decode(file.read_bytes(), type=RunInfo)
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{path} is no run folder: it has no run.json; name one that `seer rollout` wrote") from None
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} does not describe a run: {error}; name a folder that `seer rollout` wrote") from error


class _Timed(msgspec.Struct, frozen=True):
    finished: float


class _Line(msgspec.Struct, frozen=True):
    """As much of a sample as a report needs; token ids and texts are skipped, not decoded."""

    id: str
    group: str
    finish_reason: str
    chunks: tuple[Chunk, ...]
    timings: _Timed
    on_policy: bool = True
    prompt_token_ids: msgspec.Raw = msgspec.Raw(b"")


def _response(line: _Line) -> Response:
    return Response(
        id=line.id,
        group=line.group,
        finish_reason=line.finish_reason,
        chunks=line.chunks,
        finished=line.timings.finished,
        prompt_tokens=bytes(line.prompt_token_ids).count(b",") + 1,
        on_policy=line.on_policy,
    )


def _in_flight(path: Path, problems: list[str]) -> list[Response]:
    """Requests as the journal knows them; those that have accepted nothing yet are not in it."""
    try:
        steps = read_steps(path)
    except StorageError as error:
        problems.append(str(error))
        return []
    chunks: dict[str, list[Chunk]] = {}
    ended: dict[str, Step] = {}
    for step in steps:
        if step.chunk is None:  # a restart
            chunks[step.request] = []
        else:
            chunks.setdefault(step.request, []).append(step.chunk)
        if step.finish_reason is not None:
            ended[step.request] = step
    return [_partial(id_, tuple(own), ended.get(id_)) for id_, own in chunks.items()]


def _partial(id_: str, chunks: tuple[Chunk, ...], end: Step | None) -> Response:
    return Response(
        id=id_,
        group=id_.rpartition("/")[0],
        finish_reason=(end.finish_reason if end else None) or "",
        chunks=chunks,
        finished=end.chunk.end if end and end.chunk else None,
    )


def _lines(path: Path, kind: type[_T], problems: list[str]) -> Iterator[_T]:
    """The lines of a file that can be read; how many cannot is a problem."""
    decoder = msgspec.json.Decoder(kind)
    bad = 0
    try:
        with path.open("rb") as file:
            for line in file:
                try:
                    yield decoder.decode(line)
                except (msgspec.DecodeError, UnicodeDecodeError):
                    bad += 1
    except OSError as error:
        problems.append(f"{path.name} cannot be read: {error.strerror}")
    if bad:
        problems.append(f"{path.name}: {bad} unreadable {'line is' if bad == 1 else 'lines are'} left out")
