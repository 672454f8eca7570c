"""What an engine knows of the groups it drafts for: each request's tokens by position, and an index over them.

Tokens of a request come from its own engine step by step, and from other engines through the draft server, late, twice
or overlapping. Invariants: a token enters an index once, in its place; tokens behind a gap are left out; after `trim`
all groups together take at most `max_bytes` (or there is but one), the least recently used is forgotten first; what
they hold is known without looking at each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from seer_async.drafting.index import GroupIndex

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from seer_async.drafting.index import Lookup, Path

MAX_BYTES = 1 << 30  # of all groups together; many small ones weigh more a token than few large ones
_GROUP_BYTES = 4096  # objects of a group besides its index's arrays
_REQUEST_BYTES = 512  # and of a request


class _Group:
    def __init__(self) -> None:
        self.index = GroupIndex()
        self.lengths: dict[str, int] = {}
        self.charged = 0  # bytes, as of the last change

    @property
    def nbytes(self) -> int:
        return self.index.nbytes + _GROUP_BYTES + _REQUEST_BYTES * len(self.lengths)


class Groups:
    """The groups by name, least recently used first."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._groups: dict[str, _Group] = {}
        self.tokens = 0  # in all indices
        self.nbytes = 0  # memory of all groups
        self.forgotten = 0  # groups

    def __len__(self) -> int:
        """How many groups are known."""
        return len(self._groups)

    def length(self, group: str, request: str) -> int:
        """How many tokens of a request are known."""
        known = self._groups.get(group)
        return known.lengths.get(request, 0) if known else 0

    def add(self, group: str, request: str, position: int, tokens: Sequence[int] | NDArray[np.int32]) -> None:
        """Take in a request's tokens from `position` on."""
        known = self._touch(group)
        have = known.lengths.get(request, 0)
        if not position <= have < position + len(tokens):
            return
        before = known.index.tokens
        known.index.extend(request, tokens[have - position :])
        known.lengths[request] = position + len(tokens)
        self.tokens += known.index.tokens - before
        self._charge(known)

    def propose(self, group: str, tail: NDArray[np.int32], lookup: Lookup) -> Path | None:
        """The likeliest continuation of `tail` in a group, if there is any."""
        known = self._groups.get(group)
        if known is None:
            return None
        paths = known.index.propose(tail, lookup)
        self._charge(known)  # it has taken in what waited
        return paths[0] if paths else None

    def trim(self) -> None:
        """Forget what is over the bound; call it now and then."""
        while self.nbytes > self._max_bytes and len(self._groups) > 1:
            oldest = self._groups.pop(next(iter(self._groups)))
            self.nbytes -= oldest.charged
            self.tokens -= oldest.index.tokens
            self.forgotten += 1

    def _touch(self, name: str) -> _Group:
        group = self._groups.pop(name, None)
        if group is None:
            group = _Group()
            self._charge(group)
        self._groups[name] = group
        return group

    def _charge(self, group: _Group) -> None:
        now = group.nbytes
        self.nbytes += now - group.charged
        group.charged = now
