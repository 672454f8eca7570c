"""How likely a drafted token is to be what the policy draws, learned from what happened to earlier drafts.

A draft is judged by two things the index says of it: how many tokens of context its occurrences share with the request
(`match`), and which share of their votes it got (`share`). Neither is a probability under the policy, whose temperature
and habits change from run to run: so each pair of buckets keeps a fading count of accepted and rejected tokens, which
starts from a guess.

Invariant: probabilities are in (0, 1), and only tokens that were verified are counted.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

MATCHES = (2, 3, 4, 6, 8, 12, 16, 24)  # lower ends of the buckets of match length, in tokens, after the first
SHARES = (0.3, 0.5, 0.68, 0.82, 0.92)  # and of vote share
MEMORY = 400  # observations in a bucket after which an old one weighs a third (1/e)
GUESS_WEIGHT = 6.0  # observations that the first guess is worth
GUESS_FACTOR = 0.8  # of its share, what a token nobody has judged yet is worth: never tried is never learned


class Acceptance:
    """Acceptance probabilities by match length and vote share."""

    def __init__(self) -> None:
        middles = [(low + high) / 2 for low, high in zip((0.0, *SHARES), (*SHARES, 1.0), strict=True)]
        self._guess = [GUESS_FACTOR * middle for middle in middles]
        self._seen = [[0.0] * len(middles) for _ in range(len(MATCHES) + 1)]
        self._hits = [[0.0] * len(middles) for _ in range(len(MATCHES) + 1)]
        self._table = [list(self._guess) for _ in self._seen]

    def probability(self, match: int, share: float) -> float:
        """Chance that a token with this match and share is accepted, once the tokens before it were."""
        return self._table[bisect_right(MATCHES, match)][bisect_right(SHARES, share)]

    def table(self) -> list[list[float]]:
        """The chances, a row for each bucket of match length and a column for each of vote share."""
        return [[round(chance, 3) for chance in row] for row in self._table]

    def survival(self, match: int, scores: Sequence[float]) -> list[float]:
        """Chance that each token of a path is accepted with all before it.

        `scores` are a path's (see `seer_async.drafting.index`): the votes' estimate of the same thing.
        """
        chances: list[float] = []
        chance = before = 1.0
        for step, score in enumerate(scores):
            chance *= self.probability(match + step, score / before)
            before = score
            chances.append(chance)
        return chances

    def observe(self, match: int, scores: Sequence[float], accepted: int) -> None:
        """Learn from a path whose first `accepted` tokens were followed, and the next one, if there is one, not."""
        for share, step in zip(_shares(scores[: accepted + 1]), range(accepted + 1), strict=False):
            self._count(bisect_right(MATCHES, match + step), bisect_right(SHARES, share), hit=step < accepted)

    def _count(self, row: int, column: int, *, hit: bool) -> None:
        fade = 1 - 1 / MEMORY
        self._seen[row][column] = seen = self._seen[row][column] * fade + 1
        self._hits[row][column] = hits = self._hits[row][column] * fade + hit
        guess = self._guess[column]
        self._table[row][column] = (hits + GUESS_WEIGHT * guess) / (seen + GUESS_WEIGHT)


def _shares(scores: Iterable[float]) -> list[float]:
    shares, before = [], 1.0
    for score in scores:
        shares.append(score / before)
        before = score
    return shares
