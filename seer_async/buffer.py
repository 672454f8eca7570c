"""The Request Buffer: every request of the run, and the one door through which a request changes state.

Invariants: a request is in exactly one state; the counts by state always add up to the number of requests; the policy
knows exactly the WAITING ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from seer_async.request import TERMINAL, State

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from seer_async.policies import Policy
    from seer_async.request import Group, Request


_TAIL = 0.1  # the last tenth of the requests


class RequestBuffer:
    """Requests by id, and how many are in each state. `closed` when no more groups will come."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.requests: dict[str, Request] = {}
        self.groups: dict[str, Group] = {}
        self.counts: dict[State, int] = dict.fromkeys(State, 0)
        self.closed = False
        self._parked: dict[str, Request] = {}

    def add(self, group: Group, requests: Sequence[Request]) -> None:
        """Take in a group, or more requests of one; they wait."""
        self.groups[group.id] = group
        for request in requests:
            group.requests.append(request)
            group.open += 1
            self.requests[request.id] = request
            self.counts[request.state] += 1
            request.ticket += 1
            self._policy.wait(request)

    def wait(self, request: Request, now: float) -> None:
        """The request is back for its next chunk."""
        request.queued = now
        self._move(request, State.WAITING)

    def park(self, request: Request) -> None:
        """No engine may take the request until the fleet changes."""
        self._move(request, State.PARKED)

    def unpark(self, requests: Iterable[Request] | None = None) -> None:
        """Parked requests (all, when the fleet has changed) wait again; their wait counts from when it began."""
        for request in list(self._parked.values()) if requests is None else requests:
            self._move(request, State.WAITING)

    def run(self, request: Request, call: int) -> None:
        """The request is in flight."""
        request.call = call
        self._move(request, State.RUNNING)

    def end(self, request: Request, state: State) -> None:
        """The request is DONE, FAILED or UNFINISHED, for good."""
        assert state in TERMINAL
        self._move(request, state)
        request.group.open -= 1

    def forget(self, group: Group) -> None:
        """Drop a group that has ended, and its requests; only the counts remember them."""
        assert not group.open
        del self.groups[group.id]
        for request in group.requests:
            del self.requests[request.id]
        self._policy.forget(group)

    def _move(self, request: Request, state: State) -> None:
        before = request.state
        assert before not in TERMINAL, f"{request.id} is {before} and cannot become {state}"
        if state is not State.RUNNING:
            request.call = None
        self.counts[before] -= 1
        self.counts[state] += 1
        request.state = state
        request.ticket += 1
        if before is State.WAITING:
            self._policy.leave(request)
        elif before is State.PARKED:
            del self._parked[request.id]
        if state is State.WAITING:
            self._policy.wait(request)
        elif state is State.PARKED:
            self._parked[request.id] = request

    @property
    def ended(self) -> int:
        """Requests that have ended, one way or another."""
        return sum(self.counts[state] for state in TERMINAL)

    @property
    def total(self) -> int:
        """Requests that ever were."""
        return sum(self.counts.values())

    @property
    def open(self) -> int:
        """Requests that have not ended."""
        return self.total - self.ended

    @property
    def in_tail(self) -> bool:
        """Whether only few of all requests that will ever be are still open."""
        return self.closed and self.open <= _TAIL * self.total

    def unfinished(self) -> list[Request]:
        """Requests still to be finished, in dataset order."""
        return [r for r in self.requests.values() if r.state not in TERMINAL]
