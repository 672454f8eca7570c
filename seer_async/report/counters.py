"""Counters in metrics.jsonl: what they gained during a run.

The core's counters start at 0 with each part of a run. Engines count from their own start, which may be long before the
run's, and nothing is known of them in the first line of a part, which is written before they have been asked.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from seer_async.report.run import Reading, Run


def increase(counts: Sequence[int]) -> int:
    """What a counter gained since its first value; where it fell, it has started again from 0."""
    return sum(now - before if now >= before else now for before, now in pairwise(counts))


def settled(run: Run) -> list[Reading]:
    """The readings without the first one of each part of the run, which knows nothing of the engines."""
    borders = sorted(run.info.resumed)
    parts = [bisect_right(borders, reading.now) for reading in run.readings]
    return [reading for reading, before, part in zip(run.readings, [-1, *parts], parts, strict=False) if part == before]
