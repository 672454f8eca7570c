"""Longest likely remainder first: what a group has shown, as a belief about how long each response still is.

What goes first is the request with the largest remainder. A remainder is what one of all open responses, were they all
like this one, is expected to exceed (`seer_async.belief`). So a small chance of a long response counts as long as there
are many, because one that starts late makes the tail; what is likely to happen to none of them does not.

Differs from `seer`: what a response has generated counts against it; a group whose probe has got far outranks one
whose probe has just begun; and a response that outlives its siblings is expected to go on. Probes go first to start,
not to continue. How alike siblings are is learned from the run.
"""

from __future__ import annotations

import heapq
from collections import deque
from typing import TYPE_CHECKING

from seer_async.belief import Belief, Evidence
from seer_async.policies.base import Policy
from seer_async.policies.queues import WaitingQueue, sweep

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from seer_async.config import SchedulerConfig
    from seer_async.context import Context
    from seer_async.request import Group, Request

_FIRST_LESSON = 8  # responses that have ended
_MORE = 1.25  # so many times as many before the next lesson
_SAMPLE = 128  # groups to learn from


class Foresight(Policy):
    """Divided, longest likely remainder first."""

    name = "foresight"

    def __init__(self, config: SchedulerConfig, context: Context, lengths: Mapping[str, int] | None = None) -> None:
        super().__init__(config, context, lengths)
        self.belief = Belief(1)
        self._probes = WaitingQueue()
        self._heap: list[tuple[float, int, int, Request]] = []
        self._keys: dict[Request, float] = {}  # of requests that wait; other entries of the heap are stale
        self._begun: dict[Group, None] = {}  # groups that have shown something
        self._past: deque[Evidence] = deque(maxlen=_SAMPLE)  # of groups that are forgotten
        self._ended: set[Request] = set()  # of groups that are not forgotten
        self._open: set[Request] = set()
        self._many = 1  # that are open, within a factor of two; the same for all that are ranked
        self._endings = 0
        self._lesson_at = float(_FIRST_LESSON)

    @property
    def chance(self) -> float:
        """How likely a response is to be longer than it is taken for: one of all that are open is."""
        return 1 / self._many

    def wait(self, request: Request) -> None:
        if request.group.limit > self.belief.limit:
            self.belief.extend(request.group.limit)
        self._open.add(request)
        if self._miscounted():
            self._rank_all()
        if self.is_probe(request) and not request.generated:
            self._probes.push(0, request)
        else:
            self._rank(request.group, [request])

    def leave(self, request: Request) -> None:
        self._keys.pop(request, None)

    def learned(self, request: Request) -> None:
        self._begun[request.group] = None
        if request.finish_reason is not None:
            self._open.discard(request)
        if _ended(request) and request not in self._ended:
            self._ended.add(request)
            self._endings += 1
        if self._endings >= self._lesson_at:
            self._learn()
        elif self._miscounted():
            self._rank_all()
        elif waiting := [sibling for sibling in request.group.requests if sibling in self._keys]:
            self._rank(request.group, waiting)

    def forget(self, group: Group) -> None:
        self._open.difference_update(group.requests)
        if group in self._begun:
            del self._begun[group]
            self._past.append(evidence(group))
            self._ended.difference_update(group.requests)

    def choose(self) -> Request | None:
        return self._probes.peek() or self._first()

    def is_probe(self, request: Request) -> bool:
        return request.index < self.config.probes

    def _learn(self) -> None:
        """Fit the belief to the run so far."""
        self._lesson_at = _MORE * self._endings
        groups = list(self._begun)[:: len(self._begun) // _SAMPLE + 1]
        self.belief.learn([*self._past, *map(evidence, groups)])
        self._rank_all()

    def _miscounted(self) -> bool:
        return not self._many / 2 <= 1 + len(self._open) <= 2 * self._many

    def _rank_all(self) -> None:
        """Rank all that wait anew, as one of so many as are open now."""
        self._many = 1 + len(self._open)
        waiting: dict[Group, list[Request]] = {}
        for request in self._keys:
            waiting.setdefault(request.group, []).append(request)
        for group, requests in waiting.items():
            self._rank(group, requests)

    def _rank(self, group: Group, waiting: Sequence[Request]) -> None:
        for request, left in zip(waiting, self._left(group, waiting), strict=True):
            if self._keys.get(request) != -left:
                self._keys[request] = -left
                heapq.heappush(self._heap, (-left, group.order, request.index, request))
        sweep(self._heap, len(self._keys), lambda entry: self._keys.get(entry[3]) == entry[0])

    def _left(self, group: Group, requests: Sequence[Request]) -> list[float]:
        """Tokens that requests of the group are taken to have left."""
        generated = [request.generated for request in requests]
        left: list[float] = self.belief.remainders(evidence(group), generated, group.limit, self.chance).tolist()
        return left

    def _first(self) -> Request | None:
        while self._heap:
            key, _, _, request = self._heap[0]
            if self._keys.get(request) == key:
                return request
            heapq.heappop(self._heap)
        return None


def evidence(group: Group) -> Evidence:
    """What the group's responses have shown."""
    ended = tuple(request.generated for request in group.requests if _ended(request))
    going = tuple(request.generated for request in group.requests if request.generated and not _ended(request))
    return Evidence(ended, going)


def _ended(request: Request) -> bool:
    """Whether its length is known; one that was cut off at the limit would have been longer."""
    return request.finish_reason == "stop" and 0 < request.generated < request.group.limit
