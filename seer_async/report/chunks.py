"""Chunks: which of them moved, between which engines, and how long they waited in the Request Buffer."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from seer_async.report.run import Run
    from seer_async.types import Chunk

_MOST_BARS = 32


class ChunkClass(msgspec.Struct, frozen=True, kw_only=True):
    """The chunks numbered `first` to `last` in their responses, from 0: how many, how many moved, waits in seconds."""

    first: int
    last: int
    chunks: int
    moved: int
    wait_median: float
    wait_p90: float
    wait_max: float


class Chunks(msgspec.Struct, frozen=True, kw_only=True):
    """All chunks. `routes` counts moves by (engine before, engine after); tokens of prefixes by where their KV was."""

    count: int
    moved: int
    wait_mean: float
    wait_p90: float
    cached_tokens: int
    pooled_tokens: int
    classes: list[ChunkClass]
    routes: list[tuple[str, str, int]]


def chunks(run: Run) -> Chunks:
    """The chunks of a run."""
    every = [chunk for response in run.responses for chunk in response.chunks]
    waits = sorted(_wait(chunk) for chunk in every)
    routes = Counter(
        (a.engine, b.engine)
        for response in run.responses
        for a, b in zip(response.chunks, response.chunks[1:], strict=False)
        if a.engine != b.engine
    )
    return Chunks(
        count=len(every),
        moved=routes.total(),
        wait_mean=sum(waits) / max(1, len(waits)),
        wait_p90=_quantile(waits, 0.9),
        cached_tokens=sum(chunk.cached for chunk in every),
        pooled_tokens=sum(chunk.pooled for chunk in every),
        classes=_classes(run),
        routes=[(*route, count) for route, count in routes.most_common()],
    )


def _classes(run: Run) -> list[ChunkClass]:
    by_number: dict[int, list[tuple[Chunk, bool]]] = defaultdict(list)
    for response in run.responses:
        before = None
        for n, chunk in enumerate(response.chunks):
            by_number[n].append((chunk, before not in {None, chunk.engine}))
            before = chunk.engine
    width = -(-len(by_number) // _MOST_BARS) or 1
    return [
        _class(first, min(first + width, len(by_number)) - 1, by_number) for first in range(0, len(by_number), width)
    ]


def _class(first: int, last: int, by_number: dict[int, list[tuple[Chunk, bool]]]) -> ChunkClass:
    own = [pair for n in range(first, last + 1) for pair in by_number[n]]
    waits = sorted(_wait(chunk) for chunk, _ in own)
    return ChunkClass(
        first=first,
        last=last,
        chunks=len(own),
        moved=sum(moved for _, moved in own),
        wait_median=_quantile(waits, 0.5),
        wait_p90=_quantile(waits, 0.9),
        wait_max=max(waits),
    )


def _wait(chunk: Chunk) -> float:
    return max(0.0, chunk.start - chunk.queued)


def _quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[int(share * (len(ordered) - 1))] if ordered else 0.0


def matrix(routes: Iterable[tuple[str, str, int]]) -> dict[str, dict[str, int]]:
    """Moves as a table: by the engine before, then by the engine after."""
    table: dict[str, dict[str, int]] = defaultdict(dict)
    for before, after, count in routes:
        table[before][after] = count
    return table
