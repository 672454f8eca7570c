"""What comes in during a pause: it waits for the resume, unless nobody wants it any more.

Invariants: a group is released with all its requests, so that they keep their numbers, or with none; a group of which
nobody wants anything is forgotten at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from seer_async.events import GroupAdded, RequestsCancelled

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class _Group:
    def __init__(self) -> None:
        self.added: list[GroupAdded] = []
        self.size = 0  # requests
        self.wanted: set[str] = set()


class Held:
    """Submissions by group, in the order in which the groups came. `wanted` requests are not given up."""

    def __init__(self) -> None:
        self.wanted = 0
        self._groups: dict[str, _Group] = {}

    def __len__(self) -> int:
        """How many groups wait."""
        return len(self._groups)

    def add(self, event: GroupAdded, requests: Iterable[str]) -> None:
        """Hold a group, or more of one that is held; `requests` are the ids of what the event adds."""
        group = self._groups.setdefault(event.prompt.id, _Group())
        group.added.append(event)
        group.size += event.n
        group.wanted.update(requests)
        self.wanted += event.n

    def size(self, group: str) -> int:
        """Requests of a group, given up or not; 0 if it is not held."""
        return self._groups[group].size if group in self._groups else 0

    def requests(self) -> set[str]:
        """Those that are wanted."""
        return set[str]().union(*(group.wanted for group in self._groups.values()))

    def prompt(self, request: str) -> Sequence[int]:
        """Token ids of the prompt of a request that is wanted."""
        return self._groups[_group_of(request)].added[0].prompt.token_ids or ()

    def drop(self, requests: Iterable[str]) -> None:
        """Give up requests; those that are not held do not matter."""
        for request in requests:
            name = _group_of(request)
            group = self._groups.get(name)
            if group is None or request not in group.wanted:
                continue
            group.wanted.discard(request)
            self.wanted -= 1
            if not group.wanted:
                del self._groups[name]

    def release(self) -> list[GroupAdded | RequestsCancelled]:
        """All that waited, and the end of what is not wanted of it; nothing waits any more."""
        events: list[GroupAdded | RequestsCancelled] = []
        unwanted: list[str] = []
        for name, group in self._groups.items():
            events += group.added
            unwanted += (each for each in (f"{name}/{i}" for i in range(group.size)) if each not in group.wanted)
        self._groups.clear()
        self.wanted = 0
        return [*events, RequestsCancelled(requests=tuple(unwanted))]


def _group_of(request: str) -> str:
    return request.rpartition("/")[0]
