"""How many tokens to draft for each request of a step, so that the batch moves fastest.

A drafted token is worth its chance to be accepted with all before it, and costs what the step grows by. Taking the
batch's most likely tokens first, n of them are worth sum(p) and the step takes T(B, n): the best n is where tokens per
second, (B + sum(p)) / T(B, n), peak. Every chance falls along a path, so the n best of the batch are a prefix of each
request's path. It is the paper's marginal-benefit-aware budget, taken a token at a time instead of a position of a
whole class at a time: its two classes are weights on what a token is worth.

Invariants: no drafts where the model does not expect to gain at least `MARGIN`; a batch that has not gained for
`OFF_AFTER` steps is only tried now and then; a batch that gains is now and then run without, so that both are known;
and at a batch size (by powers of two) where steps with drafting were not faster in fact, there is none (see `duel`).
"""

from __future__ import annotations

from heapq import heapify, heappop, heapreplace
from typing import TYPE_CHECKING

from seer_async.drafting.duel import Duels

if TYPE_CHECKING:
    from collections.abc import Sequence

    from seer_async.drafting.steptime import StepTime

HIGH_WEIGHT = 2.0  # what a token of a probe or a tail request is worth, against one of any other (the paper's lambda)
MARGIN = 1.02
FEW = 4  # tokens of a step that may always be drafted; more only up to twice what a step's cost is known for
OFF_AFTER = 16  # steps
TRY_EVERY = 32  # steps, while off
TRY_MOST = 2  # tokens of a request, then
REST_EVERY = 64  # steps, while on
PEEK_EVERY = 16  # steps in which the clock has switched drafting off, and what drafts would bring is looked up
RECENT = 0.2  # share of the newest look in the average


class Budget:
    """The speculation budget of one engine."""

    def __init__(self, times: StepTime) -> None:
        self.times = times
        self.switch_offs = 0
        # Drafts are made only where the model expects a gain, so it is trusted at first.
        self._duels = Duels(trusting=True, guess=lambda: self._brings)
        self._brings: float | None = None  # tokens of a request and step, with drafts, as the chances say
        self._drafting = True  # allowed in the step that runs now
        self._step = 0
        self._idle = 0  # steps in a row without a gain

    @property
    def off(self) -> bool:
        """Whether speculation has switched itself off."""
        return self._tired or not self._drafting

    @property
    def _tired(self) -> bool:
        return self._idle >= OFF_AFTER

    def learn(self, requests: int, drafts: int, brought: float, milliseconds: float) -> None:
        """Take in a step in which every one of `requests` decoded: drafts verified, tokens it brought, and its time."""
        self.times.learn(requests, drafts, milliseconds)
        self._duels.at(requests).step(drafted=self._drafting, wait=milliseconds, tokens=brought / requests)

    def wants_drafts(self, requests: int) -> bool:
        """Whether drafts for the next step, of `requests`, are worth looking for; call it once a step."""
        self._step += 1
        before, self._drafting = self._drafting, not requests or self._duels.at(requests).drafting
        self.switch_offs += before and not self._drafting
        if not self._drafting:
            return self._step % PEEK_EVERY == 0
        return self._step % (TRY_EVERY if self._tired else 1) == 0

    def allot(self, survival: Sequence[Sequence[float]], weights: Sequence[float]) -> list[int]:
        """Drafted tokens for each request of the batch.

        `survival[i][j]` is the chance that request i's tokens up to j are all accepted; `weights[i]` what one of its
        tokens is worth. Requests that do not decode are no part of the batch.
        """
        trying, none = self._tired, [0] * len(survival)
        best, gain = self._best(survival, weights)
        self._expect(survival, best)
        if not self._drafting:
            return none
        if gain >= MARGIN:
            self._idle = 0
            return best if self._step % REST_EVERY else none
        self._idle += 1
        self.switch_offs += self._idle == OFF_AFTER
        # While off, what is tried is the best there is, gain or not: it is what keeps the chances and times true.
        return [min(TRY_MOST, count) for count in best] if trying else none

    def _expect(self, survival: Sequence[Sequence[float]], counts: Sequence[int]) -> None:
        right = sum(sum(path[:count]) for path, count in zip(survival, counts, strict=True))
        brings = 1 + right / max(1, len(survival))
        self._brings = brings if self._brings is None else self._brings + RECENT * (brings - self._brings)

    def _best(self, survival: Sequence[Sequence[float]], weights: Sequence[float]) -> tuple[list[int], float]:
        """The drafts with the most tokens a millisecond, at least one if there is any, and how many times as many.

        Chances fall and times grow evenly, so the rate has one peak, and nothing behind it is looked at. The drafts are
        fewer than that while the cost of so many is not known.
        """
        counts, places = [0] * len(survival), [0] * len(survival)
        nexts = [(-path[0] * weights[request], request) for request, path in enumerate(survival) if path]
        if not nexts:
            return counts, 0.0
        heapify(nexts)
        cost = self.times.cost(len(survival))
        worth, best, drafted = sum(weights), 0.0, 0
        plain = worth / cost.none
        allowed = max(FEW, 2 * cost.known)
        while nexts:
            lost, request = nexts[0]
            worth -= lost
            drafted += 1
            if (rate := worth / cost.of(drafted)) <= best:
                break
            best = rate
            places[request] += 1
            if drafted <= allowed:
                counts[request] += 1
            path, at = survival[request], places[request]
            if at < len(path):
                heapreplace(nexts, (-path[at] * weights[request], request))
            else:
                heappop(nexts)
        return counts, best / plain
