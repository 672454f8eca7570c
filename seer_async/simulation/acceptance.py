"""Drafting as a factor: tokens a step by the number of siblings that can be drafted from, and how deep to draft.

The table is the paper's: the mean acceptance length, bonus token included, of one drafted path by the number of sibling
references. Read as a chance `a` per position (1 + a + a^2 + ... = length), it says what each position is worth.
Invariant: `depths` takes the likeliest positions of the batch first and stops where one more would not speed it up,
the marginal-benefit budget of `seer_async.drafting.budget` for classes of requests instead of single ones.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from seer_async.simulation.cost import EngineCost

LENGTHS = {0: 1.70, 1: 2.04, 5: 2.32, 15: 2.53}
"""Mean acceptance length by sibling references, one path."""

DEEPEST = 8
_LEVELS = (0, 1, 3, 7, 15)  # references at which a request is faster


class Drafting(msgspec.Struct, frozen=True):
    """How engines draft. `grouped` sees all siblings that have started; otherwise a request knows only itself."""

    grouped: bool
    chances: tuple[float, ...]

    @classmethod
    def from_table(cls, *, grouped: bool, lengths: dict[int, float] | None = None) -> Drafting:
        """Drafting whose acceptance is that of a table from references to mean lengths."""
        table = lengths or LENGTHS
        levels = _LEVELS if grouped else _LEVELS[:1]
        return cls(grouped, tuple(1 - 1 / between(table, level) for level in levels))

    def level(self, references: int) -> int:
        """The row for a request with so many siblings."""
        return bisect_right(_LEVELS, references) - 1 if self.grouped else 0

    def depths(self, counts: Sequence[int], cost: EngineCost, step_s: float) -> tuple[int, ...]:
        """Drafted tokens for a request of each level, where `counts` run and a step without drafts takes `step_s`."""
        depths = [0] * len(self.chances)
        tokens, seconds = float(sum(counts)), step_s
        for worth, level in _positions(self.chances):
            count = counts[level]
            if worth * seconds <= tokens * cost.draft_token_s:
                break
            depths[level] += bool(count)
            tokens += count * worth
            seconds += count * cost.draft_token_s
        return tuple(depths)

    def gain(self, level: int, depth: int) -> float:
        """Tokens a step of a request of that level with so many drafted."""
        chance = self.chances[level]
        return (1 - chance ** (depth + 1)) / (1 - chance)

    @property
    def best_gains(self) -> list[float]:
        """The most tokens a step by depth, from 0 on."""
        best = self.chances.index(max(self.chances))
        return [self.gain(best, depth) for depth in range(DEEPEST + 1)]


def between(table: dict[int, float], references: int) -> float:
    """The table's value, linear between its rows and constant beyond them."""
    rows = sorted(table)
    if references >= rows[-1]:
        return table[rows[-1]]
    high = bisect_right(rows, references)
    low, up = rows[high - 1], rows[high]
    return table[low] + (table[up] - table[low]) * (references - low) / (up - low)


_ORDER: dict[tuple[float, ...], list[tuple[float, int]]] = {}


def _positions(chances: tuple[float, ...]) -> list[tuple[float, int]]:
    """All drafted positions as (chance that it is accepted with those before it, level), the likeliest first."""
    if chances not in _ORDER:
        places = [(chance**depth, level) for level, chance in enumerate(chances) for depth in range(1, DEEPEST + 1)]
        _ORDER[chances] = sorted(places, reverse=True)
    return _ORDER[chances]
