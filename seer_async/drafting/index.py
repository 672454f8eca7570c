"""The suffix index of one group: what came next where the last tokens occurred before.

A hash-chain match finder, as in LZ77 compressors. For each of a few orders n a table leads from the last n tokens to
the latest place where they occurred, and each place to the one before it. `propose` walks the chain of the longest
order that has one, extends each match backwards as far as it goes, and lets the places found vote on the next token,
the longer matches louder; those that agree with the winner vote on the one after it, and so on.

Invariants: a match lies within one sequence, and ends where that sequence goes on, so a sequence's end never matches
itself; appending is O(1) a token, proposing O(matches x (pattern + draft)); a group holds at most `max_tokens`, and
what would be too much is not taken in, because early tokens of all siblings serve better than late ones of a few.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np

from seer_async.drafting import matcher

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

MAX_TOKENS = 4_000_000
_FIRST_TOKENS = 4096
_FIRST_SEQUENCES = 16
_FIRST_ROOM = 256  # tokens of a sequence
_BATCH = 4096  # tokens that are indexed at once


class Lookup(msgspec.Struct, frozen=True):
    """How to look for drafts: the paper's speculation arguments.

    `max_spec_tokens` of a draft at most; matches of `pattern_lookup_min` to `pattern_lookup_max` tokens of context;
    `top_k` different paths; tokens whose score is under `min_score` are cut.
    """

    max_spec_tokens: int = 8
    pattern_lookup_min: int = 1
    pattern_lookup_max: int = 32
    top_k: int = 1
    min_score: float = 0.02


class Path(NamedTuple):
    """A guess at the next tokens.

    `scores[j]` estimates, by votes, the chance that all of tokens[:j + 1] come; `match` is how many tokens of context
    the best occurrence shares.
    """

    tokens: list[int]
    scores: list[float]
    match: int


class GroupIndex:
    """Sequences of one group, by name, and what follows what in them."""

    def __init__(self, max_tokens: int = MAX_TOKENS) -> None:
        self.tokens = 0
        self._max_tokens = max_tokens
        self._names: dict[str, int] = {}
        self._pool = np.zeros(_FIRST_TOKENS, dtype=np.int32)  # the sequences' tokens, each in one piece
        self._pooled = 0
        self._indexed = 0
        self._waiting: list[int] = []  # appended, but not yet indexed
        self._runs: list[int] = []  # of which sequence, and how many
        self._starts = np.zeros(_FIRST_SEQUENCES, dtype=np.int64)
        self._lengths = np.zeros(_FIRST_SEQUENCES, dtype=np.int64)
        self._rooms = np.zeros(_FIRST_SEQUENCES, dtype=np.int64)
        self._heads = np.full((len(matcher.ORDERS), _FIRST_TOKENS), -1, dtype=np.int32)
        self._places = np.zeros((_FIRST_TOKENS, 2 + len(matcher.ORDERS)), dtype=np.int32)

    @property
    def nbytes(self) -> int:
        """Memory, in bytes."""
        return sum(array.nbytes for array in (self._pool, self._heads, self._places, self._starts, self._lengths))

    @staticmethod
    def warm_up() -> None:
        """Compile, or load what was compiled before, so that no engine step has to wait for it."""
        index = GroupIndex()
        index.extend("a", [1, 2, 3, 1, 2])
        index.propose(np.array([1, 2], dtype=np.int32), Lookup())

    def extend(self, sequence: str, tokens: Sequence[int] | NDArray[np.int32]) -> None:
        """Append `tokens` to a sequence."""
        count = len(tokens)
        if not count or self.tokens + count > self._max_tokens:
            return
        number = self._names.setdefault(sequence, len(self._names))
        self._runs += (number, count)
        self._waiting.extend(tokens.tolist() if isinstance(tokens, np.ndarray) else tokens)
        self.tokens += count
        if len(self._waiting) > _BATCH:
            self._take_in()

    def _take_in(self) -> None:
        """Index what was appended, many steps and siblings in one go: entering compiled code has its price."""
        if not self._waiting:
            return
        runs = np.array(self._runs, dtype=np.int64).reshape(-1, 2)
        new = np.array(self._waiting, dtype=np.int32)
        self._runs.clear()
        self._waiting.clear()
        self._make_room(runs)
        matcher.append(new, runs, self._indexed, self._pool, self._starts, self._lengths, self._heads, self._places)
        self._indexed += len(new)

    def propose(self, tail: NDArray[np.int32], lookup: Lookup) -> list[Path]:
        """The likeliest continuations of a text that ends with `tail`, best first, at most `top_k`."""
        self._take_in()
        places, rooms, weights, match = matcher.find(
            tail,
            lookup.pattern_lookup_min,
            lookup.pattern_lookup_max,
            self._pool,
            self._starts,
            self._lengths,
            self._heads,
            self._places,
        )
        if not match:
            return []
        found = places, rooms, weights
        path, branches = self._follow(found, (), match, lookup)
        paths = [path]
        while len(paths) < lookup.top_k and branches:
            best = max(branches)
            branches.remove(best)
            path, more = self._follow(found, best[1], match, lookup)
            paths.append(path)
            branches += more
        return [path for path in paths if path.tokens]

    def _follow(self, found: _Found, prefix: tuple[int, ...], match: int, lookup: Lookup) -> tuple[Path, list[_Branch]]:
        """The best path that begins with `prefix`, and the second choices along it."""
        begin = np.array(prefix, dtype=np.int32)
        most, least = lookup.max_spec_tokens, lookup.min_score
        tokens, scores, others, other_scores = matcher.follow(*found, begin, most, least, self._pool)
        path = Path(tokens.tolist(), scores.tolist(), match)
        branches = []
        if lookup.top_k > 1:
            choices = zip(others.tolist(), other_scores.tolist(), strict=True)
            for step, (other, score) in enumerate(choices):
                if score >= least and step >= len(prefix):
                    branches.append((score, (*path.tokens[:step], other)))
        return path, branches

    def _make_room(self, runs: NDArray[np.int64]) -> None:
        """Let sequences grow in place by (number, tokens)."""
        while len(self._names) > len(self._starts):
            self._starts, self._lengths, self._rooms = (
                np.concatenate((array, np.zeros_like(array))) for array in (self._starts, self._lengths, self._rooms)
            )
        if self.tokens > len(self._places):
            self._places = _grown(self._places, max(2 * len(self._places), self.tokens))
            self._rehash(1 << (len(self._places) - 1).bit_length())
        growth = np.zeros_like(self._lengths)
        np.add.at(growth, runs[:, 0], runs[:, 1])
        needed = self._lengths + growth
        for number in np.flatnonzero(needed > self._rooms):
            self._move(int(number), max(_FIRST_ROOM, 2 * int(needed[number])))

    def _move(self, number: int, room: int) -> None:
        """Give a sequence a larger place at the pool's end; each token moves a few times at most."""
        start, length = int(self._starts[number]), int(self._lengths[number])
        if self._pooled + room > len(self._pool):
            self._pool = _grown(self._pool, 2 * (self._pooled + room))
        self._pool[self._pooled : self._pooled + length] = self._pool[start : start + length]
        self._starts[number], self._rooms[number] = self._pooled, room
        self._pooled += room

    def _rehash(self, size: int) -> None:
        """Spread the places over a larger table."""
        self._heads = np.full((len(matcher.ORDERS), size), -1, dtype=np.int32)
        matcher.relink(self._indexed, self._pool, self._starts, self._heads, self._places)


_Found = tuple["NDArray[np.int64]", "NDArray[np.int64]", "NDArray[np.float32]"]
_Branch = tuple[float, tuple[int, ...]]


def _grown(array: NDArray[np.int32], size: int) -> NDArray[np.int32]:
    larger = np.zeros((size, *array.shape[1:]), dtype=np.int32)
    larger[: len(array)] = array
    return larger
