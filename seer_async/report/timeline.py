"""The fleet over time: each engine's KV and its running requests.

KV is what engines reported, about once a second. Running requests are exact, from the chunks' own times; in a run that
has not ended, calls in flight are no chunks yet, so there they are what the core counted, about once a second, too. An
engine is idle while no call that succeeded was in flight there.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING

import msgspec

from seer_async.report.counters import increase, settled
from seer_async.report.thin import Point, thin_line

if TYPE_CHECKING:
    from collections.abc import Sequence

    from seer_async.report.elapsed import Elapsed
    from seer_async.report.run import EngineReading, Run

_MOST_POINTS = 400
_FEW = 8  # engines that are shown one by one
Span = tuple[float, float]


class EngineLine(msgspec.Struct, frozen=True, kw_only=True):
    """One engine. Points are (seconds, share of KV) and (seconds, calls in flight); empty in a large fleet."""

    name: str
    tokens: int
    chunks: int
    idle: float
    kv_mean: float
    kv_peak: float
    running_peak: int
    preemptions: int
    kv: list[Point]
    running: list[Point]


class Timeline(msgspec.Struct, frozen=True, kw_only=True):
    """All engines, and the fleet: mean, lowest and highest KV of its engines, and all running requests together."""

    engines: list[EngineLine]
    kv_mean: list[Point]
    kv_low: list[Point]
    kv_high: list[Point]
    running: list[Point]

    @property
    def idle(self) -> float:
        """Mean idle share of the engines, in [0, 1]."""
        return sum(engine.idle for engine in self.engines) / len(self.engines) if self.engines else 0.0


def timeline(run: Run, elapsed: Elapsed, seconds: float) -> Timeline:
    """The fleet during the `seconds` that the run took."""
    spans, tokens = _work(run, elapsed)
    read = [(at, r.engines) for r in run.readings if r.engines and (at := elapsed.at(r.now)) <= seconds]
    kv = _field(read, "kv_used")
    running = {name: _steps(own) for name, own in spans.items()}
    together = _steps([span for own in spans.values() for span in own])
    if run.info.status != "done":
        running = _field(read, "in_flight")
        together = [(at, float(sum(e.in_flight for e in engines))) for at, engines in read]
    names = sorted({*spans, *kv}, key=_natural)
    shown = len(names) <= _FEW
    engines = [
        EngineLine(
            name=name,
            tokens=tokens[name],
            chunks=len(spans[name]),
            idle=max(0.0, 1 - _busy(spans[name]) / seconds) if seconds else 0.0,
            kv_mean=_mean_over_time(kv[name], seconds),
            kv_peak=max((used for _, used in kv[name]), default=0.0),
            running_peak=int(max((count for _, count in running.get(name, ())), default=0)),
            preemptions=_preemptions(run, name),
            kv=thin_line(kv[name], _MOST_POINTS) if shown else [],
            running=thin_line(running.get(name, []), _MOST_POINTS) if shown else [],
        )
        for name in names
    ]
    used = [(at, [e.kv_used for e in engines]) for at, engines in read]
    return Timeline(
        engines=engines,
        kv_mean=thin_line([(at, sum(each) / len(each)) for at, each in used], _MOST_POINTS),
        kv_low=thin_line([(at, min(each)) for at, each in used], _MOST_POINTS),
        kv_high=thin_line([(at, max(each)) for at, each in used], _MOST_POINTS),
        running=thin_line(together, _MOST_POINTS),
    )


def _work(run: Run, elapsed: Elapsed) -> tuple[dict[str, list[Span]], dict[str, int]]:
    spans: dict[str, list[Span]] = defaultdict(list)
    tokens: dict[str, int] = defaultdict(int)
    for response in run.responses:
        for chunk in response.chunks:
            spans[chunk.engine].append((elapsed.at(chunk.start), elapsed.at(chunk.end)))
            tokens[chunk.engine] += chunk.tokens
    return spans, tokens


def _field(read: Sequence[tuple[float, list[EngineReading]]], name: str) -> dict[str, list[Point]]:
    """A field of each engine's readings, over time."""
    lines: dict[str, list[Point]] = defaultdict(list)
    for at, engines in read:
        for engine in engines:
            lines[engine.name].append((at, float(getattr(engine, name))))
    return lines


def _preemptions(run: Run, name: str) -> int:
    return increase([e.preemptions for reading in settled(run) for e in reading.engines if e.name == name])


def _busy(spans: Sequence[Span]) -> float:
    """Seconds covered by at least one span."""
    covered, until = 0.0, 0.0
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    return covered


def _steps(spans: Sequence[Span]) -> list[Point]:
    """How many spans cover each moment, as the corners of a staircase."""
    changes: dict[float, int] = defaultdict(int)
    for start, end in spans:
        changes[start] += 1
        changes[end] -= 1
    corners: list[Point] = []
    count = 0
    for time, change in sorted(changes.items()):
        corners += [(time, float(count)), (time, float(count + change))]
        count += change
    return corners


def _mean_over_time(points: Sequence[Point], seconds: float) -> float:
    """Mean of readings, each of which holds until the next one."""
    if not points or not seconds:
        return 0.0
    ends = [*(time for time, _ in points[1:]), seconds]
    return sum(value * max(0.0, end - time) for (time, value), end in zip(points, ends, strict=True)) / seconds


def _natural(name: str) -> list[tuple[int, str]]:
    """Order in which engine-2 comes before engine-10."""
    return [(int(part) if part.isdecimal() else 0, part) for part in re.split(r"(\d+)", name)]
