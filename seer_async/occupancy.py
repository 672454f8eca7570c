"""KV blocks that calls in flight hold from now on: they grow together, a token a step, and each ends at its own step.

An engine decodes all its calls in lockstep. So one that began earlier ends earlier, and its blocks are free again
before the others need theirs in full: the peak of what they hold together is below the sum of their bounds. Time is
counted in steps of the engine; `slope` is the blocks by which a call grows in a step, or less, where less of the
difference between calls is to be relied on.

Invariants: a peak is at most the sum of the bounds; a call that is overdue counts in full, until it is removed.
"""

from __future__ import annotations

from bisect import bisect_right


class Occupancy:
    """The calls of one engine, by their number."""

    def __init__(self) -> None:
        self._calls: dict[int, tuple[float, int]] = {}  # the step at which each ends at the latest, and its blocks then
        self._profile: _Profile | None = None

    def add(self, call: int, blocks: int, end: float) -> None:
        """A call that holds at most `blocks`, when it ends, at step `end` or before."""
        self._calls[call] = end, blocks
        self._profile = None

    def remove(self, call: int) -> None:
        """The call has ended."""
        del self._calls[call]
        self._profile = None

    def clear(self) -> None:
        """All calls have ended."""
        self._calls.clear()
        self._profile = None

    def peak_with(self, blocks: int, end: float, now: float, slope: float) -> float:
        """The most blocks held at any step from `now` to `end`, if one more call began that ends then with `blocks`."""
        if self._profile is None or not self._profile.holds(now, slope):
            self._profile = _Profile(sorted(self._calls.values()), now, slope)
        return self._profile.peak_with(blocks, end)


class _Profile:
    """What calls hold when each of them ends: there, and nowhere else, are the peaks.

    `late[k]` is the blocks that the calls which end at `ends[k]` or later hold at `ends[k]`; `worst[k]` the most of
    `late[j] + slope * ends[j]` for j up to k, to which a new call adds the same whatever j is.
    """

    def __init__(self, calls: list[tuple[float, int]], now: float, slope: float) -> None:
        overdue = bisect_right(calls, now, key=lambda call: call[0])
        self._overdue = sum(blocks for _, blocks in calls[:overdue])
        self._slope = slope
        self._calls = calls[overdue:]
        self._ends = [end for end, _ in self._calls]
        bounds = spread = 0.0
        late: list[float] = []
        for count, (end, blocks) in enumerate(reversed(self._calls), 1):
            bounds += blocks
            spread += end
            late.append(bounds - slope * (spread - count * end))
        self._worst: list[float] = []
        highest = 0.0
        for end, held in zip(self._ends, reversed(late), strict=True):
            highest = max(highest, held + slope * end)
            self._worst.append(highest)

    def holds(self, now: float, slope: float) -> bool:
        """Whether it is still true: no call has become overdue since."""
        return slope == self._slope and (not self._ends or now < self._ends[0])

    def peak_with(self, blocks: int, end: float) -> float:
        before = bisect_right(self._ends, end)
        at_its_end = blocks + sum(held - self._slope * (later - end) for later, held in self._calls[before:])
        earlier = self._worst[before - 1] + blocks - self._slope * end if before else 0.0
        return self._overdue + max(at_its_end, earlier)
