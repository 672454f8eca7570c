"""Tokens of requests by position, group by group: what the draft server keeps, and each client a copy of its groups.

Invariants: a log begins at position 0 and has no gaps; a position, once known, never changes, so the same update twice,
or one that overlaps, changes nothing; requests do not touch each other. A group that nobody registers or adds to for
its time to live is dropped, and the least recently used ones are when all together would exceed the bound.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from enum import Enum, auto
from types import MappingProxyType
from typing import TYPE_CHECKING

from seer_servers.drafting.wire import DEFAULT_TTL_S, TOKEN_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

MAX_TOKENS = 64 << 20  # 256 MiB
MAX_REQUESTS = 1024  # in a group, so that one message can name them all
OVERHEAD = 64  # what a group or a request takes besides its tokens, in tokens: empty ones are not free
_NOTHING: Mapping[str, bytearray] = MappingProxyType({})


class Outcome(Enum):
    """What became of an addition."""

    ADDED = auto()
    KNOWN = auto()  # nothing new in it
    GAP = auto()  # begins behind the end of what is known
    FULL = auto()  # the group has too many requests, or alone would exceed the bound


class _Group:
    def __init__(self) -> None:
        self.logs: dict[str, bytearray] = {}
        self.cost = OVERHEAD
        self.ttl_s = 0.0  # nobody has asked for any
        self.used = 0.0

    @property
    def ends(self) -> float:
        return self.used + (self.ttl_s or DEFAULT_TTL_S)

    @property
    def tokens(self) -> int:
        return self.cost - OVERHEAD * (1 + len(self.logs))


class TokenLogs:
    """The groups, the least recently used first; `clock` is in seconds."""

    def __init__(self, max_tokens: int = MAX_TOKENS, clock: Callable[[], float] = time.monotonic) -> None:
        self._max = max_tokens
        self._clock = clock
        self._groups: OrderedDict[str, _Group] = OrderedDict()
        self._cost = 0
        self.expired = 0
        self.evicted = 0
        self.dropped_tokens = 0  # in groups that expired or were evicted
        self.refused_tokens = 0

    def __contains__(self, group: str) -> bool:
        return group in self._groups

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the groups."""
        return iter(self._groups)

    def __len__(self) -> int:
        """How many groups there are."""
        return len(self._groups)

    @property
    def requests(self) -> int:
        """Requests in all groups."""
        return sum(len(group.logs) for group in self._groups.values())

    @property
    def tokens(self) -> int:
        """Tokens in all groups."""
        return sum(group.tokens for group in self._groups.values())

    @property
    def nbytes(self) -> int:
        """Roughly the memory that all this takes."""
        return self._cost * TOKEN_BYTES

    def register(self, group: str, ttl_s: float) -> None:
        """Keep a group for `ttl_s` seconds after its last use, or longer if somebody asked for longer."""
        known = self._used(group)
        if known is not None:
            known.ttl_s = max(known.ttl_s, ttl_s)

    def append(self, group: str, request: str, position: int, data: bytes) -> Outcome:
        """Add the tokens `data` of a request from `position` on, as far as they are new; uses the group."""
        known = self._used(group)
        log = known.logs.get(request) if known else None
        missing = position * TOKEN_BYTES + len(data) - (len(log) if log else 0)
        if missing > len(data):
            return Outcome.GAP
        if missing <= 0:
            return Outcome.KNOWN
        cost = missing // TOKEN_BYTES + (OVERHEAD if log is None else 0)
        crowded = log is None and known is not None and len(known.logs) >= MAX_REQUESTS
        if known is None or crowded or not self._make_room(group, cost):
            self.refused_tokens += missing // TOKEN_BYTES
            return Outcome.FULL
        known.logs.setdefault(request, bytearray()).extend(data[len(data) - missing :])
        known.cost += cost
        self._cost += cost
        return Outcome.ADDED

    def length(self, group: str, request: str) -> int:
        """How many tokens of a request are known."""
        return len(self.logs(group).get(request, b"")) // TOKEN_BYTES

    def since(self, group: str, request: str, position: int, most: int) -> bytes:
        """The tokens of a request from `position` on, `most` tokens at most."""
        return bytes(self.logs(group).get(request, b"")[position * TOKEN_BYTES : (position + most) * TOKEN_BYTES])

    def logs(self, group: str) -> Mapping[str, bytearray]:
        """The tokens of a group's requests, to look at; empty if there is no such group."""
        known = self._groups.get(group)
        return known.logs if known else _NOTHING

    def expire(self) -> None:
        """Drop the groups whose time is over; call it now and then."""
        now = self._clock()
        for name in [name for name, group in self._groups.items() if group.ends < now]:
            self._drop(name)
            self.expired += 1

    def _used(self, name: str) -> _Group | None:
        """The group, now the last used one; None if there is no room for a new one."""
        group = self._groups.get(name)
        if group is not None:
            self._groups.move_to_end(name)
        elif self._make_room(name, OVERHEAD):
            group = self._groups[name] = _Group()
            self._cost += OVERHEAD
        else:
            return None
        group.used = self._clock()
        return group

    def _make_room(self, name: str, cost: int) -> bool:
        """Evict other groups until `cost` more tokens fit; whether they do."""
        while self._cost + cost > self._max:
            oldest = next(iter(self._groups), name)
            if oldest == name:
                return False
            self._drop(oldest)
            self.evicted += 1
        return True

    def _drop(self, name: str) -> None:
        group = self._groups.pop(name)
        self._cost -= group.cost
        self.dropped_tokens += group.tokens
