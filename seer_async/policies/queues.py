"""Priority queues over waiting requests, with deletion by forgetting.

Invariant: an entry counts only while its request still waits under the ticket it was queued with; stale entries are
dropped when they surface, or together when they outnumber the live ones. So leaving costs nothing, each operation is
O(log waiting) amortised, and memory stays proportional to what waits.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Any, TypeVar

from seer_async.request import State

if TYPE_CHECKING:
    from collections.abc import Callable

    from seer_async.request import Request

_Entry = TypeVar("_Entry", bound=tuple[Any, ...])


LEAST_SWEEP = 1024  # entries of a heap before stale ones are looked for


def sweep(heap: list[_Entry], live: int, is_live: Callable[[_Entry], bool]) -> None:
    """Drop the stale entries of a heap once they outnumber those that are `live`."""
    if len(heap) > LEAST_SWEEP + 2 * live:
        heap[:] = filter(is_live, heap)
        heapq.heapify(heap)


class WaitingQueue:
    """Waiting requests by key, the smallest first; ties by order of the dataset."""

    def __init__(self) -> None:
        self._heap: list[tuple[Any, int, int, int, Request]] = []
        self._sweep_at = LEAST_SWEEP

    def push(self, key: Any, request: Request) -> None:
        """Queue a waiting request. `key` must be comparable with all other keys of this queue."""
        heapq.heappush(self._heap, (key, request.group.order, request.index, request.ticket, request))
        if len(self._heap) >= self._sweep_at:
            self._heap = [entry for entry in self._heap if _live(entry[4], entry[3])]
            heapq.heapify(self._heap)
            self._sweep_at = max(LEAST_SWEEP, 2 * len(self._heap))

    def peek(self) -> Request | None:
        """The first request that still waits."""
        while self._heap:
            *_, ticket, request = self._heap[0]
            if _live(request, ticket):
                return request
            heapq.heappop(self._heap)
        return None


def _live(request: Request, ticket: int) -> bool:
    return request.state is State.WAITING and request.ticket == ticket
