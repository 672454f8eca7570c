"""The Context Manager: what finished requests tell about their unfinished siblings.

Invariant: a group's estimate never falls below what has been seen of it (the longest finished response, the longest
generated so far), and without a finished response it is the group's limit. So an estimate moves down once, when the
first sibling finishes, and only up from there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from seer_async.request import Group, Request


class Context:
    """Length estimates, in generated tokens, by group."""

    def __init__(self) -> None:
        self._finished: dict[Group, int] = {}
        self._generated: dict[Group, int] = {}

    def observe(self, request: Request) -> None:
        """Fold in a request's accepted tokens, finished or not."""
        group = request.group
        if request.generated > self._generated.get(group, 0):
            self._generated[group] = request.generated

    def finish(self, request: Request) -> None:
        """Fold in the length of a request that has ended by itself."""
        self.observe(request)
        group = request.group
        self._finished[group] = max(request.generated, self._finished.get(group, 0))

    def forget(self, group: Group) -> None:
        """Nothing will be asked about the group any more."""
        self._finished.pop(group, None)
        self._generated.pop(group, None)

    def known(self, group: Group) -> bool:
        """Whether any response of the group has finished."""
        return group in self._finished

    def estimate(self, group: Group) -> int:
        """The length that the group's unfinished responses are assumed to reach."""
        if group not in self._finished:
            return group.limit
        return max(self._finished[group], self._generated.get(group, 0))
