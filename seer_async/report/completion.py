"""When responses finished, and the tail: the time after nine tenths of them had.

Invariant: failed responses count as ended, as in every other figure of total and tail time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from seer_async.report.thin import Point, thin_line
from seer_async.workload import tail_start

if TYPE_CHECKING:
    from seer_async.report.elapsed import Elapsed
    from seer_async.report.run import Run

_MOST_POINTS = 800


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """How a run came to its end.

    `curve` has (seconds, samples ended so far). `seconds` is the total, or the time so far. `tail_start` and `tail_s`,
    in seconds, are None until every sample has ended, because until then nobody knows.
    """

    total: int
    ended: int
    seconds: float
    tail_start: float | None
    tail_s: float | None
    curve: list[Point]

    @property
    def tail_share(self) -> float | None:
        """The tail's share of the total time, in [0, 1]."""
        return None if self.tail_s is None else self.tail_s / self.seconds if self.seconds else 0.0


def completion(run: Run, elapsed: Elapsed) -> Completion:
    """How `run` came to its end."""
    times = sorted(elapsed.at(r.finished) for r in run.responses if r.finished is not None)
    whole = bool(times) and len(times) >= run.info.samples
    seconds = times[-1] if whole else elapsed.total
    start = tail_start(times) if whole else None
    curve = [(0.0, 0.0), *((time, float(n)) for n, time in enumerate(times, 1)), (seconds, float(len(times)))]
    return Completion(
        total=max(run.info.samples, len(times)),
        ended=len(times),
        seconds=seconds,
        tail_start=start,
        tail_s=None if start is None else seconds - start,
        curve=thin_line(curve, _MOST_POINTS),
    )
