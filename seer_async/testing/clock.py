"""Virtual time: what happens next is the earliest thing that was asked for.

Invariants: time never goes back; the same seed and the same requests give the same order, also among things that are
due at the same moment, which come in an order drawn from the seed (a real network promises none).
"""

from __future__ import annotations

import heapq
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Timer:
    """Something that is due at a moment, unless it is cancelled."""

    __slots__ = ("action",)

    def __init__(self, action: Callable[[], None]) -> None:
        self.action: Callable[[], None] | None = action

    def cancel(self) -> None:
        """Make nothing of it."""
        self.action = None


class VirtualClock:
    """A heap of timers. `now` is in seconds since the clock was made."""

    def __init__(self, seed: int = 0) -> None:
        self.now = 0.0
        self._rng = random.Random(f"clock {seed}")  # noqa: S311 - a simulation must repeat itself
        self._heap: list[tuple[float, float, int, Timer]] = []
        self._count = 0

    def after(self, seconds: float, action: Callable[[], None]) -> Timer:
        """Do `action` in `seconds` from now."""
        timer = Timer(action)
        self._count += 1
        heapq.heappush(self._heap, (self.now + max(0.0, seconds), self._rng.random(), self._count, timer))
        return timer

    def step(self) -> bool:
        """Do what is due next, at its time; False when nothing is."""
        while self._heap:
            due, _, _, timer = heapq.heappop(self._heap)
            if timer.action is not None:
                self.now = due
                timer.action()
                return True
        return False
