"""Context-aware scheduling: probe first, then approximately longest first (Algorithm 2 of the paper).

1. Waiting probes go first, the one with the fewest generated tokens leading: short groups reveal themselves soon.
2. Otherwise the group with the largest estimate goes first, and in it the request that has generated most: started
   work keeps its KV warm instead of alternating with unstarted work.
3. One decision in `fairness` goes to the request that has waited longest, so no group starves behind wrong estimates.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

from seer_async.policies.base import Policy
from seer_async.policies.queues import WaitingQueue, sweep

if TYPE_CHECKING:
    from collections.abc import Mapping

    from seer_async.config import SchedulerConfig
    from seer_async.context import Context
    from seer_async.request import Group, Request


class Seer(Policy):
    """The paper's policy."""

    name = "seer"

    def __init__(self, config: SchedulerConfig, context: Context, lengths: Mapping[str, int] | None = None) -> None:
        super().__init__(config, context, lengths)
        self._probes = WaitingQueue()
        self._oldest = WaitingQueue()
        self._members: dict[Group, WaitingQueue] = {}
        self._groups: list[tuple[int, int, Group]] = []  # (-estimate, order, group); stale ones are swept
        self._ranked: dict[Group, int] = {}  # the estimate under which a group is in `_groups`
        self._decisions = 0

    def wait(self, request: Request) -> None:
        self._oldest.push(request.queued, request)
        if self.is_probe(request):
            self._probes.push(request.generated, request)
            return
        self._members.setdefault(request.group, WaitingQueue()).push(-request.generated, request)
        self._rank(request.group)

    def leave(self, request: Request) -> None:
        if request.call is not None:  # dispatched: a decision was taken
            self._decisions += 1

    def learned(self, request: Request) -> None:
        if request.group in self._members:
            self._rank(request.group)

    def forget(self, group: Group) -> None:
        self._members.pop(group, None)
        self._ranked.pop(group, None)

    def choose(self) -> Request | None:
        if self._decisions % self.config.fairness == self.config.fairness - 1 and (oldest := self._oldest.peek()):
            return oldest
        return self._probes.peek() or self._longest()

    def is_probe(self, request: Request) -> bool:
        return request.index < self.config.probes

    def _rank(self, group: Group) -> None:
        estimate = self.context.estimate(group)
        if self._ranked.get(group) != estimate:
            self._ranked[group] = estimate
            heapq.heappush(self._groups, (-estimate, group.order, group))
        sweep(self._groups, len(self._ranked), lambda entry: self._ranked.get(entry[2]) == -entry[0])

    def _longest(self) -> Request | None:
        while self._groups:
            estimate, _, group = self._groups[0]
            request = self._members[group].peek() if group in self._members else None
            if request is not None and -estimate == self._ranked.get(group):
                return request
            heapq.heappop(self._groups)
            if -estimate == self._ranked.get(group):
                del self._ranked[group]  # nobody of the group waits; the next one to wait ranks it again
        return None
