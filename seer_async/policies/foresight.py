"""Longest likely remainder first: what a group has shown, as a belief about how long each response still is.

A belief is a distribution over the mean of the logarithm of a group's lengths. Finished responses say where it is,
unfinished ones that it is not far below what they have generated; responses scatter about it by `SPREAD`. What goes
first is the request with the largest remainder, where a remainder is the power mean of what is left, so that a small
chance of a long response counts: one that starts late makes the tail.

Differs from `seer`: what a response has generated counts against it; a group whose probe has got far outranks one
whose probe has just begun; and a response that outlives its siblings is expected to go on. Probes go first to start,
not to continue.
"""

from __future__ import annotations

import heapq
import math
from typing import TYPE_CHECKING

import numpy as np

from seer_async.policies.base import Policy
from seer_async.policies.queues import WaitingQueue

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from seer_async.config import SchedulerConfig
    from seer_async.context import Context
    from seer_async.request import Group, Request

    Floats = NDArray[np.float64]

POWER = 10.0  # of the mean over remainders: 1 would be the expected one, infinity the longest possible
SPREAD = 0.25  # standard deviation of the logarithm of a length within a group
_PRIOR = (-1.7, 1.0)  # mean and deviation of a group's mean log length, relative to the limit's
_LOGISTIC = 1.702  # the logistic curve of this slope is nearly the normal distribution's
_LEAST_SWEEP = 1024


class _Scale:
    """Lengths and means of their logarithms under one limit."""

    def __init__(self, limit: int) -> None:
        top = math.log(limit)
        self.means = np.linspace(top - 5, top + 1, 61)
        logs = np.linspace(top - 6, top + 2, 121)
        self.lengths = np.minimum(np.exp(logs), limit)
        self.prior = -0.5 * ((self.means - top - _PRIOR[0]) / _PRIOR[1]) ** 2
        kernel = np.exp(-0.5 * ((logs - self.means[:, None]) / SPREAD) ** 2)
        self.shapes = kernel / kernel.sum(axis=1, keepdims=True)  # chances of `lengths` (columns) for each of `means`


class Foresight(Policy):
    """Divided, longest likely remainder first."""

    name = "foresight"

    def __init__(self, config: SchedulerConfig, context: Context, lengths: Mapping[str, int] | None = None) -> None:
        super().__init__(config, context, lengths)
        self._probes = WaitingQueue()
        self._heap: list[tuple[float, int, int, Request]] = []
        self._keys: dict[Request, float] = {}  # of requests that wait; other entries of the heap are stale
        self._scales: dict[int, _Scale] = {}

    def wait(self, request: Request) -> None:
        if self.is_probe(request) and not request.generated:
            self._probes.push(0, request)
        else:
            self._rank(request.group, [request])

    def leave(self, request: Request) -> None:
        self._keys.pop(request, None)

    def learned(self, request: Request) -> None:
        if waiting := [sibling for sibling in request.group.requests if sibling in self._keys]:
            self._rank(request.group, waiting)

    def choose(self) -> Request | None:
        return self._probes.peek() or self._first()

    def is_probe(self, request: Request) -> bool:
        return request.index < self.config.probes

    def remainders(self, group: Group, generated: Sequence[int]) -> Floats:
        """Tokens that responses of the group are likely to have left, after so many generated."""
        scale = self._scales.get(group.limit) or self._scales.setdefault(group.limit, _Scale(group.limit))
        chances = self._belief(group, scale) @ scale.shapes
        left = np.maximum(scale.lengths - np.array(generated, dtype=float)[:, None], 0.0) / group.limit
        alive = np.maximum((left > 0) @ chances, 1e-12)
        result: Floats = group.limit * (left**POWER @ chances / alive) ** (1 / POWER)
        return result

    def _belief(self, group: Group, scale: _Scale) -> Floats:
        """Chances of `scale.means`, after what the group's responses have shown."""
        ended = [math.log(r.generated) for r in group.requests if _ended(r)]
        going = [math.log(r.generated) for r in group.requests if r.generated and not _ended(r)]
        logs = scale.prior.copy()
        if ended:
            logs -= 0.5 * (((np.array(ended)[:, None] - scale.means) / SPREAD) ** 2).sum(axis=0)
        if going:
            beyond = _LOGISTIC / SPREAD * (np.array(going)[:, None] - scale.means)
            logs -= np.logaddexp(0.0, beyond).sum(axis=0)
        chances = np.exp(logs - logs.max())
        result: Floats = chances / chances.sum()
        return result

    def _rank(self, group: Group, waiting: Sequence[Request]) -> None:
        for request, left in zip(waiting, self.remainders(group, [r.generated for r in waiting]), strict=True):
            self._keys[request] = -float(left)
            heapq.heappush(self._heap, (-float(left), group.order, request.index, request))
        if len(self._heap) > _LEAST_SWEEP + 2 * len(self._keys):
            self._heap = [entry for entry in self._heap if self._keys.get(entry[3]) == entry[0]]
            heapq.heapify(self._heap)

    def _first(self) -> Request | None:
        while self._heap:
            key, _, _, request = self._heap[0]
            if self._keys.get(request) == key:
                return request
            heapq.heappop(self._heap)
        return None


def _ended(request: Request) -> bool:
    """Whether its length is known; one that was cut off at the limit would have been longer."""
    return request.finish_reason == "stop" and 0 < request.generated < request.group.limit
