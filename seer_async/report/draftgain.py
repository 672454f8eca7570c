"""What counters of drafting gained over some readings."""

from __future__ import annotations

from itertools import zip_longest
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from seer_async.types import DraftStats

_COUNTS = ("verified", "drafted", "accepted", "generated", "steps", "steps_off", "switch_offs")


class DraftGain:
    """A sum of gains; see `types.DraftStats`."""

    def __init__(self) -> None:
        self.verified = self.drafted = self.accepted = self.generated = 0
        self.steps = self.steps_off = self.switch_offs = 0
        self.drafter_s = 0.0
        self.drafted_at: list[int] = []
        self.accepted_at: list[int] = []

    def add(self, before: DraftStats, now: DraftStats) -> None:
        """Add what came between two readings; counters that fell belong to engines that have started again."""
        if now.generated < before.generated or now.drafted < before.drafted:
            return
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(now, name) - getattr(before, name))
        self.drafter_s += now.drafter_s - before.drafter_s
        self.drafted_at = _added(self.drafted_at, before.drafted_at, now.drafted_at)
        self.accepted_at = _added(self.accepted_at, before.accepted_at, now.accepted_at)


def _added(sums: Sequence[int], before: Sequence[int], now: Sequence[int]) -> list[int]:
    return [total + new - old for total, old, new in zip_longest(sums, before, now, fillvalue=0)]
