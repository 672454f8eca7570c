"""Drafting against not drafting, decided by trying: whatever a model of costs believes, the clock has the last word.

A trial times short blocks of steps, with drafting and without, in pairs; drafting goes on after it if it won by
`MARGIN` in three pairs of four. Pairs, and the turn of who begins, keep out what changes meanwhile: contexts grow,
machines are shared. The measure is the time that one request waits for one token: a block's time, over the tokens it
gave each request.

Between trials the tokens that drafting brings are watched: where they fall to what would no longer pay, the next trial
begins at once.

Invariants: drafting stays on only after a trial that it won; trials take the losing side at most `COST` of the time, as
far as the rests between them, of at most `LONGEST` steps, allow.
"""

from __future__ import annotations

from statistics import median

SETTLE = 4  # steps under way when sides change
COUNTED = 20  # steps of a block whose time is taken
COUNTED_TOKENS = 80  # or more: what drafts bring to few requests varies
WINS, LOSSES = 3, 2  # pairs that end a trial
MARGIN = 1.02
COST = 0.005
SHORTEST, LONGEST = 256, 4096  # steps between trials


class Duel:
    """Drafting against not drafting, at a batch size of about `requests`."""

    def __init__(self, requests: int) -> None:
        self.drafting = True
        self._counted = max(COUNTED, COUNTED_TOKENS // requests)
        self._resting = False
        self._gains: list[float] = []  # of drafting, pair by pair: 1.1 is a tenth faster
        self._waits: dict[bool, float] = {}  # of this pair, by side [s a token]
        self._brought = self._recent = 1.0  # tokens of a request and step with drafting: in the trial, lately
        self._needed = 0.0  # so many at least, or it would lose
        self._begin(self._counted)

    def step(self, *, drafted: bool, wait: float, tokens: float) -> None:
        """Count a step: `wait` seconds, `tokens` for each request."""
        if drafted != self.drafting:
            return  # it was under way when the switch turned
        self._settle -= 1
        if self._settle >= 0:
            return
        self._left -= 1
        self._wait += wait
        self._tokens += tokens
        self._recent += (tokens - self._recent) / self._counted
        if self._left <= 0 or self._pays_no_more:
            self._ended()

    @property
    def _pays_no_more(self) -> bool:
        return self._resting and self.drafting and self._recent < self._needed

    def _ended(self) -> None:
        if self._resting:
            self._resting, self._gains = False, []
        elif not self._waits:
            self._note()
            self.drafting = not self.drafting
        else:
            self._note()
            self._gains.append(self._waits[False] / self._waits[True])
            self._waits = {}
            self._judge()
        self._begin(self._counted if not self._resting else self._rest())

    def _note(self) -> None:
        self._waits[self.drafting] = self._wait / self._tokens
        if self.drafting:
            self._brought = self._tokens / self._counted

    def _judge(self) -> None:
        """End the trial if its outcome is known; else the next pair begins with the side that is on."""
        wins = sum(gain >= MARGIN for gain in self._gains)
        if wins >= WINS or len(self._gains) - wins >= LOSSES:
            self.drafting, self._resting = wins >= WINS, True
            self._recent, self._needed = self._brought, self._brought / median(self._gains)

    def _rest(self) -> int:
        """Steps until the next trial, so that what the loser would lose in it is `COST` of them."""
        gain = median(self._gains)
        tried = self._counted * len(self._gains)
        return max(SHORTEST, min(LONGEST, round(tried * (max(gain, 1 / gain) - 1) / COST)))

    def _begin(self, steps: int) -> None:
        self._left, self._settle = steps, SETTLE
        self._wait = self._tokens = 0.0
