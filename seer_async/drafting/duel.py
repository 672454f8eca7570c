"""Drafting against not drafting, decided by trying: whatever a model of costs believes, the clock has the last word.

Steps with and without drafts are timed in turn, and what was faster stays, for longer and longer while trials agree.
The measure is the time that one request waits for one token: a step's time, over the tokens it gave each request.

Invariant: drafting stays on only while it was faster by `MARGIN` in the latest trial of both.
"""

from __future__ import annotations

from collections import deque
from statistics import median

WINDOW = 8  # steps whose time is taken together
WINDOWS = 16  # the latest ones are compared, by their median
SETTLE = 4  # steps under way when sides change
TRIAL = SETTLE + 96  # steps
PATIENCE = 1024  # steps before the other side is tried again; doubled while trials agree
MAX_PATIENCE = 8192
MARGIN = 1.01


class Duel:
    """Drafting against not drafting, at one batch size."""

    def __init__(self) -> None:
        self.drafting = True
        self._waits: dict[bool, deque[float]] = {True: deque(maxlen=WINDOWS), False: deque(maxlen=WINDOWS)}
        self._trying = True
        self._patience = PATIENCE
        self._left, self._settle = TRIAL, SETTLE
        self._steps, self._wait, self._tokens = 0, 0.0, 0.0

    def step(self, *, drafted: bool, wait: float, tokens: float) -> None:
        """Count a step: `wait` seconds, `tokens` for each request."""
        if drafted != self.drafting:
            return  # it was under way when the switch turned
        self._left -= 1
        self._settle -= 1
        if self._settle < 0:
            self._steps, self._wait, self._tokens = self._steps + 1, self._wait + wait, self._tokens + tokens
            if self._steps == WINDOW:
                self._waits[self.drafting].append(self._wait / self._tokens)
                self._steps, self._wait, self._tokens = 0, 0.0, 0.0
        if self._left <= 0:
            self._turn()

    def _turn(self) -> None:
        if self._trying and all(self._waits.values()):
            best = MARGIN * median(self._waits[True]) < median(self._waits[False])
            agrees = best != self.drafting  # the one that was not on trial has won again
            self._patience = min(self._patience * 2, MAX_PATIENCE) if agrees else PATIENCE
            self._trying, self.drafting = False, best
            self._restart(self._patience)
        else:
            self._trying, self.drafting = True, not self.drafting
            self._waits[self.drafting].clear()
            self._restart(TRIAL)

    def _restart(self, steps: int) -> None:
        self._left, self._settle = steps, SETTLE
        self._steps, self._wait, self._tokens = 0, 0.0, 0.0
