"""What an engine knows of the groups it drafts for: each request's tokens by position, and an index over them.

Tokens of a request come from its own engine step by step, and from other engines through the draft server, late, twice
or overlapping. Invariants: a token enters an index once, in its place; tokens behind a gap are left out; groups
together hold at most `max_tokens`, the least recently used is forgotten first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from seer_async.drafting.index import GroupIndex

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from seer_async.drafting.index import Lookup, Path

MAX_TOKENS = 8_000_000  # of all groups together


class _Group:
    def __init__(self) -> None:
        self.index = GroupIndex()
        self.lengths: dict[str, int] = {}


class Groups:
    """The groups by name, least recently used first."""

    def __init__(self, max_tokens: int = MAX_TOKENS) -> None:
        self._max_tokens = max_tokens
        self._groups: dict[str, _Group] = {}
        self.forgotten = 0

    def __len__(self) -> int:
        """How many groups are known."""
        return len(self._groups)

    @property
    def tokens(self) -> int:
        """Tokens in all indices."""
        return sum(group.index.tokens for group in self._groups.values())

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
        known.index.extend(request, tokens[have - position :])
        known.lengths[request] = position + len(tokens)

    def propose(self, group: str, tail: NDArray[np.int32], lookup: Lookup) -> Path | None:
        """The likeliest continuation of `tail` in a group, if there is any."""
        known = self._groups.get(group)
        paths = known.index.propose(tail, lookup) if known else []
        return paths[0] if paths else None

    def trim(self) -> None:
        """Forget what is over the bound; call it now and then."""
        total = self.tokens
        while total > self._max_tokens and len(self._groups) > 1:
            name = next(iter(self._groups))
            total -= self._groups.pop(name).index.tokens
            self.forgotten += 1

    def _touch(self, name: str) -> _Group:
        group = self._groups.pop(name, None) or _Group()
        self._groups[name] = group
        return group
