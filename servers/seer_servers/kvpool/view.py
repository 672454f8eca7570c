"""What an engine's KV routes need from a pool, whichever it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence


class PoolView(Protocol):
    """A pool, seen from one engine's API server."""

    kind: str

    def stats(self) -> dict[str, int | str]:
        """Return the pool's size and this engine's counters; `pool` is equal for engines that share it."""

    def flush(self, run: str, weight_version: str | None) -> int:
        """Drop what was computed for a run, or for one weight version of it; returns the blocks dropped."""

    def held(self, cache_salt: str, block_hashes: Sequence[bytes]) -> int:
        """Return how many leading blocks of a prefix the pool holds."""


class UnsupportedError(Exception):
    """This kind of pool cannot do that; the message says what to do instead."""
