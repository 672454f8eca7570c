"""The prefix cache of a simulated engine."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from seer_async.testing.model import absorb

if TYPE_CHECKING:
    from collections.abc import Sequence


class PrefixCache:
    """Which prefixes an engine need not compute again."""

    def __init__(self) -> None:
        self._used = 0
        self._lengths: OrderedDict[int, int] = OrderedDict()  # by the model's state after the prefix

    def add(self, tokens: Sequence[int]) -> None:
        """Remember a prefix."""
        state = absorb(tokens)
        self._used += len(tokens) - self._lengths.pop(state, 0)
        self._lengths[state] = len(tokens)

    def trim(self, room: float) -> None:
        """Forget the least recently used beyond `room` tokens."""
        while self._lengths and self._used > room:
            self._used -= self._lengths.popitem(last=False)[1]

    def find(self, *prefixes: Sequence[int]) -> int:
        """How many tokens of the first prefix that is known are cached; 0 when none is."""
        for prefix in prefixes:
            state = absorb(prefix)
            if state in self._lengths:
                self._lengths.move_to_end(state)
                return self._lengths[state]
        return 0

    def clear(self) -> None:
        """Forget everything."""
        self.trim(-1)
