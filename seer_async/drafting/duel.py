"""Drafting against not drafting, decided by trying: whatever a model of costs believes, the clock has the last word.

A trial times short blocks of steps, without drafting and with, in pairs; drafting goes on after it if it won by
`MARGIN` in three pairs of four. Pairs, and the turn of who begins, keep out what changes meanwhile: contexts grow,
machines are shared. The measure is the time that one request waits for one token: a block's time, over the tokens it
gave each request. A trial in which drafting loses, or wins by `CLEAR`, beyond doubt ends in the middle of a block.

What the losing side of a trial loses is paid from a purse that all batch sizes share, and that each step fills by
`COST` of itself: a batch size that is met for the first time is tried when there is something to spend, and little is
spent where a loss is large.

Between trials the tokens that drafting brings are watched: where they fall to what would no longer pay, the next trial
begins at once, and where that is beyond doubt drafting ends without one; where they bring far less than in their trial,
they are tried anew. While there is no drafting, a guess of what it would bring says whether to try, and so does a win
at the next larger batch size.

Invariants: drafting goes on only where a trial was won, at this batch size or lately at the next larger one (or, with a
`trusting` start, not yet made); trials cost at most `COST` of the time, beyond the first and as far as a trial's price
is capped (at what `LONGEST` steps earn).
"""

from __future__ import annotations

import functools
from math import hypot, inf, sqrt
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

SETTLE = 4  # steps under way when sides change, and the first of the new side
COUNTED = 20  # steps of a block whose time is taken
COUNTED_TOKENS = 60  # or more with drafts: what they bring to few requests varies
LOOK = 6  # steps of a block after which a trial may be over: drafting has then won or lost,
LUCK = 12  # even if so many tokens less or more had been right,
ERRORS = 3.0  # by so many standard errors
CLEAR = 1.15  # and won by this factor at least: what disturbs a machine for a few steps is no win
WINS, LOSSES = 3, 2  # pairs that end a trial
MARGIN = 1.02
COST = 0.005
FIRST = 32  # steps at a batch size before its first trial
SHORTEST, LONGEST = 256, 4096  # steps between trials
WARM_UP = 24  # steps with drafts, the first of all, in which code and kernels are loaded
OUTLIER = 5.0  # times the usual: a step that is compiled for, or that the machine had no time for
USUAL = 0.05  # share of the newest step in what is usual
CHANGED = 0.7  # of the tokens that drafts brought in their trial: with fewer it says nothing of them any more
NEEDED = 1.3  # tokens of a request and step that pay, before a trial has told: steps take 1.3 to 1.9 times as long
PROMISING = 1.2  # a guess of so many times what pays is followed even on credit


class Purse:
    """What trials may cost, in steps of any batch size; the first `cold` steps with drafts say nothing."""

    def __init__(self, *, cold: int = 0) -> None:
        self.steps = 0  # that were counted
        self._balance = 0.0
        self._cold = cold

    def warms_up(self) -> bool:
        """Count a step with drafts; whether it is one of the first."""
        self._cold -= 1
        return self._cold >= 0

    @property
    def open(self) -> bool:
        """Whether there is something to spend."""
        return self._balance >= 0

    def earn(self) -> None:
        """Count a step."""
        self.steps += 1
        self._balance = min(self._balance + COST, COST * SHORTEST)

    def pay(self, steps: float) -> None:
        """Count what a trial lost."""
        self._balance -= min(steps, COST * LONGEST)


class _Block:
    """Steps of one side in a row."""

    def __init__(self) -> None:
        self.steps = 0
        self.tokens = 0.0
        self._wait = 0.0
        self._squares = [0.0, 0.0, 0.0]  # wait by wait, by tokens, tokens by tokens

    def add(self, wait: float, tokens: float) -> None:
        self.steps += 1
        self._wait += wait
        self.tokens += tokens
        for place, square in enumerate((wait * wait, wait * tokens, tokens * tokens)):
            self._squares[place] += square

    @property
    def rate(self) -> float:
        """Seconds a token."""
        return self.rate_with(0.0)

    def rate_with(self, luck: float) -> float:
        """Seconds a token, if each request had got `luck` tokens more."""
        tokens = self.tokens + luck
        return self._wait / tokens if tokens > 0 else inf

    @property
    def error(self) -> float:
        """The rate's standard error."""
        own, mixed, tokens = self._squares
        return sqrt(max(0.0, own - 2 * self.rate * mixed + self.rate**2 * tokens)) / self.tokens


class Duel:
    """Drafting against not drafting, at a batch size of about `requests`.

    `larger` is the duel at the next larger batch size, if there is one: where drafting pays, it pays in a smaller batch
    too. Until its first trial a duel drafts if `trusting` says so or that one does, and one without drafts is tried
    when that one has won since, even on credit. `guess` says how many tokens of a request and step drafting would
    bring, or None.
    """

    _resting: bool
    _needed: float  # tokens of a request and step with drafting: so many, or it would lose

    def __init__(
        self,
        requests: int,
        purse: Purse | None = None,
        *,
        trusting: bool = False,
        larger: Callable[[], Duel | None] = lambda: None,
        guess: Callable[[], float | None] = lambda: None,
    ) -> None:
        self._larger = larger
        like = self._winner
        self.drafting: bool = trusting or like is not None
        self._purse = purse or Purse()
        self._decided = 0  # when it was last found out what pays, by the purse's count of steps
        self._guess = guess
        self._drafts_counted = max(COUNTED, COUNTED_TOKENS // requests)
        self._luck = LUCK / requests
        self._gains: list[float] = []  # of drafting, pair by pair: 1.1 is a tenth faster
        self._pair: dict[bool, _Block] = {}  # this pair's blocks by side
        self._off: _Block | None = None  # the trial's last block without drafts
        self._tried = {False: 0, True: 0}  # steps of this trial by side
        self._brought = self._recent = 1.0  # tokens of a request and step with drafting: in the trial, lately
        self._needed = like._needed if like else 0.0  # noqa: SLF001 - of this class
        self._resting, self._rest, self._untried = True, FIRST, True
        self._usual: float | None = None  # seconds of a step, drafting or not
        self._begin()

    @property
    def _winner(self) -> Duel | None:
        """The duel at the next larger batch size, while drafting goes on there."""
        larger = self._larger()
        return larger if larger and larger.drafting and larger._resting else None  # noqa: SLF001 - of this class

    def step(self, *, drafted: bool, wait: float, tokens: float) -> None:
        """Count a step: `wait` seconds, `tokens` for each request."""
        if drafted != self.drafting:
            return  # it was under way when the switch turned
        if (drafted and self._purse.warms_up()) or self._is_outlier(wait):
            return
        self._settle -= 1
        if self._settle >= 0:
            return
        self._purse.earn()
        self._block.add(wait, tokens)
        self._recent += (tokens - self._recent) / self._drafts_counted
        if self._resting:
            if self._brings_at_most < self._needed / MARGIN:
                self._decide(drafting=False)  # it has lost, without a trial
            elif self._is_due or self._brings_now < self._needed or self._has_changed:
                self._try()
        elif self._block.steps >= (self._drafts_counted if self.drafting else COUNTED):
            self._ended()
        elif self._block.steps >= LOOK and (verdict := self._verdict()) is not None:
            self._stop(drafting=verdict)

    @property
    def _is_due(self) -> bool:
        if self._block.steps < self._rest:
            return False
        if self.drafting:
            return self._purse.open or self._untried
        if (winner := self._winner) and winner._decided > self._decided:  # noqa: SLF001 - of this class
            return True
        brings = self._guess()
        if brings is None:
            return self._purse.open
        pays = MARGIN * (self._needed or NEEDED)
        return brings >= PROMISING * pays or (self._purse.open and (brings >= pays or self._block.steps >= LONGEST))

    @property
    def _brings_now(self) -> float:
        """Tokens of a request and step that drafting has brought lately; enough to go on, while that is not known."""
        return self._recent if self.drafting and self._block.steps >= self._drafts_counted else inf

    @property
    def _brings_at_most(self) -> float:
        """The same, had a dozen more been right."""
        return self._brings_now + self._luck / self._drafts_counted

    @property
    def _has_changed(self) -> bool:
        """Whether drafts bring so much less than in their trial that they are to be tried anew.

        What they need was measured once, and a machine that hung behind the other side then makes it look like little.
        """
        return not self._untried and self._brings_at_most < CHANGED * self._brought

    def _is_outlier(self, wait: float) -> bool:
        most = OUTLIER * (self._usual or wait)
        self._usual = min(wait, most) if self._usual is None else self._usual + USUAL * (min(wait, most) - self._usual)
        return wait > most

    @property
    def _sides(self) -> tuple[_Block | None, _Block | None]:
        """The block with drafts and the one without, of which the last is not over yet; None before there is one."""
        return (self._block, self._off) if self.drafting else (self._pair.get(True), self._block)

    def _verdict(self) -> bool | None:
        """Whether drafting has won, beyond doubt, in a block that is not over yet; None while it may go either way."""
        drafted, off = self._sides
        if drafted is None or off is None:
            return None
        doubt = ERRORS * hypot(drafted.error, off.error)
        if drafted.rate_with(self._luck) - off.rate > doubt:
            return False
        return True if off.rate / CLEAR - drafted.rate_with(-self._luck) > doubt else None

    def _stop(self, *, drafting: bool) -> None:
        """The trial is over before its block is."""
        drafted, off = self._sides
        assert drafted is not None
        assert off is not None
        self._gains.append(off.rate / drafted.rate)
        self._tried[self.drafting] += SETTLE + self._block.steps
        self._brought = drafted.tokens / drafted.steps
        self._settle_for(drafting=drafting)

    def _try(self) -> None:
        self._resting = self._untried = False
        self._gains, self._pair, self._off = [], {}, None
        self._tried = {False: 0, True: 0}
        self._begin()

    def _ended(self) -> None:
        """A block of a trial is over."""
        self._pair[self.drafting] = self._block
        self._tried[self.drafting] += SETTLE + self._block.steps
        if self.drafting:
            self._brought = self._block.tokens / self._block.steps
        else:
            self._off = self._block
        if len(self._pair) == 1:
            self.drafting = not self.drafting
        else:  # the next pair begins with the side that is on
            self._gains.append(self._pair[False].rate / self._pair[True].rate)
            self._pair = {}
            wins = sum(gain >= MARGIN for gain in self._gains)
            if wins >= WINS or len(self._gains) - wins >= LOSSES:
                self._settle_for(drafting=wins >= WINS)
                return
        self._begin()

    def _settle_for(self, *, drafting: bool) -> None:
        """The trial is over."""
        gain = median(self._gains)
        self._purse.pay(self._tried[not drafting] * (max(gain, 1 / gain) - 1))
        self._recent, self._needed = self._brought, self._brought / gain
        self._decide(drafting=drafting)

    def _decide(self, *, drafting: bool) -> None:
        """Go on so until the next trial."""
        self.drafting, self._untried = drafting, False
        self._decided = self._purse.steps
        self._resting, self._rest = True, SHORTEST
        self._begin()

    def _begin(self) -> None:
        self._settle, self._block = SETTLE, _Block()


class Duels:
    """A duel for each batch size, by powers of two, and the purse of them all.

    With `trusting`, drafting goes on until it has lost a trial; otherwise it begins when it has won one. `guess` is the
    duels'.
    """

    def __init__(self, *, trusting: bool = False, guess: Callable[[], float | None] = lambda: None) -> None:
        self._trusting = trusting
        self._guess = guess
        self._purse = Purse(cold=WARM_UP)
        self._by_size: dict[int, Duel] = {}

    def at(self, requests: int) -> Duel:
        """The duel at this batch size, of at least 1."""
        size = (requests - 1).bit_length()
        if size not in self._by_size:
            self._by_size[size] = Duel(
                requests,
                self._purse,
                trusting=self._trusting,
                larger=functools.partial(self._by_size.get, size + 1),
                guess=self._guess,
            )
        return self._by_size[size]
