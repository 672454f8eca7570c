"""Seconds of a run: Unix times, with the pauses between an interruption and its resumption left out.

Invariant: `at` never falls; it is 0 at the run's first event and `total` at its last.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from seer_async.report.run import Run


class Elapsed:
    """The parts of a run, one more than it was resumed."""

    def __init__(self, events: Iterable[float], resumed: Iterable[float] = ()) -> None:
        borders = sorted(resumed)
        spans: dict[int, tuple[float, float]] = {}
        for event in events:
            part = bisect_right(borders, event)
            low, high = spans.get(part, (event, event))
            spans[part] = (min(low, event), max(high, event))
        self._parts = [spans[part] for part in sorted(spans)]
        self._before = [0.0]
        for low, high in self._parts:
            self._before.append(self._before[-1] + high - low)

    @property
    def total(self) -> float:
        """Seconds of all parts together."""
        return self._before[-1]

    @property
    def pauses(self) -> list[float]:
        """Where the run was interrupted and resumed, in its own seconds."""
        return self._before[1:-1]

    def at(self, time: float) -> float:
        """Seconds of the run up to a Unix time."""
        part = bisect_right(self._parts, time, key=lambda span: span[0]) - 1
        if part < 0:
            return 0.0
        low, high = self._parts[part]
        return self._before[part] + min(time, high) - low


def elapsed_of(run: Run) -> Elapsed:
    """The seconds of a run, from the moment its requests could go to the last thing that is known of it."""
    return Elapsed(_events(run), run.info.resumed)


def _events(run: Run) -> Iterator[float]:
    for reading in run.readings:
        yield reading.now
    for response in run.responses:
        if response.finished is not None:
            yield response.finished
        for chunk in response.chunks:
            yield from (chunk.queued, chunk.start, chunk.end)
