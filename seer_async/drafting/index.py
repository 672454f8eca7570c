"""The suffix index of one group: what came next where the last tokens occurred before.

A hash-chain match finder, as in LZ77 compressors. For each of a few orders n a table leads from the last n tokens to
the latest place where they occurred, and each place to the one before it. `propose` walks the chain of the longest
order that has a match, extends each match backwards as far as it goes, and joins what followed into a tree, in which
each place has its vote, the longer matches louder. The paths of that tree are the proposals.

Invariants: a match lies within one sequence, and ends where that sequence goes on, so a sequence's end never matches
itself; appending is O(1) a token, proposing O(places looked at x (match + draft)), whatever the group holds; a group
takes in `max_tokens` and nothing after them.
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
_FIRST_TOKENS = 1024
_FIRST_SEQUENCES = 16
_FIRST_ROOM = 32  # tokens of a sequence
_BATCH = 4096  # tokens that wait at most
_WAITING_BYTES = 40  # of a token that waits, in a list


class Lookup(msgspec.Struct, frozen=True):
    """How to look for drafts: the paper's speculation arguments.

    `max_spec_tokens` of a draft at most; matches of at least `pattern_lookup_min` tokens of context, of which no more
    than `pattern_lookup_max` count; `top_k` different paths; tokens whose score is under `min_score` are cut.
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
        self._totals: list[int] = []  # tokens of each sequence with those that wait
        self._rooms: list[int] = []  # tokens that each has room for
        self._cramped: set[int] = set()  # those that have outgrown it
        self._starts = np.zeros(_FIRST_SEQUENCES, dtype=np.int64)
        self._lengths = np.zeros(_FIRST_SEQUENCES, dtype=np.int64)
        self._heads = np.full((len(matcher.ORDERS), _FIRST_TOKENS), -1, dtype=np.int32)
        self._places = np.zeros((_FIRST_TOKENS, 2 + len(matcher.ORDERS)), dtype=np.int32)
        self._weigh()

    @property
    def nbytes(self) -> int:
        """Memory of the arrays and of tokens that wait, in bytes."""
        return self._array_bytes + _WAITING_BYTES * len(self._waiting)

    @staticmethod
    def warm_up() -> None:
        """Compile, or load what was compiled before, so that no engine step has to wait for it."""
        index = GroupIndex()
        index.extend("a", range(2 * _FIRST_TOKENS))
        index.propose(np.array([1, 2], dtype=np.int32), Lookup())

    def extend(self, sequence: str, tokens: Sequence[int] | NDArray[np.int32]) -> None:
        """Append `tokens` to a sequence; what goes beyond the group's bound is not taken, then or later."""
        count = min(len(tokens), self._max_tokens - self.tokens)
        if not count:
            return
        number = self._number(sequence)
        self._totals[number] += count
        if self._totals[number] > self._rooms[number]:
            self._cramped.add(number)
        self._runs += (number, count)
        self._waiting += (tokens.tolist() if isinstance(tokens, np.ndarray) else tokens)[:count]
        self.tokens += count
        if len(self._waiting) > _BATCH:
            self._take_in()

    def propose(self, tail: NDArray[np.int32], lookup: Lookup) -> list[Path]:
        """The likeliest continuations of a text that ends with `tail`, at most `top_k`.

        Best first: each is the one that adds most expected tokens to those before it.
        """
        self._take_in()
        # Types and memory layouts that never vary: numba would compile anew for each.
        tokens, scores, lengths, match = matcher.propose(
            np.array(tail[-lookup.pattern_lookup_max :], dtype=np.int32),
            lookup.pattern_lookup_min,
            lookup.pattern_lookup_max,
            lookup.max_spec_tokens,
            lookup.top_k,
            float(lookup.min_score),
            self._pool,
            self._starts,
            self._lengths,
            self._heads,
            self._places,
        )
        return [
            Path(tokens[path, :length].tolist(), scores[path, :length].tolist(), match)
            for path, length in enumerate(lengths.tolist())
            if length
        ]

    def _take_in(self) -> None:
        """Index what was appended, many steps and siblings in one go: entering compiled code has its price."""
        if not self._waiting:
            return
        runs = np.array(self._runs, dtype=np.int64).reshape(-1, 2)
        new = np.array(self._waiting, dtype=np.int32)
        self._runs.clear()
        self._waiting.clear()
        self._make_room()
        matcher.append(new, runs, self._indexed, self._pool, self._starts, self._lengths, self._heads, self._places)
        self._indexed += len(new)

    def _number(self, sequence: str) -> int:
        number = self._names.setdefault(sequence, len(self._totals))
        if number == len(self._totals):
            self._totals.append(0)
            self._rooms.append(0)
        return number

    def _make_room(self) -> None:
        """Let the arrays hold what waits."""
        while len(self._names) > len(self._starts):
            self._starts, self._lengths = (
                np.concatenate((array, np.zeros_like(array))) for array in (self._starts, self._lengths)
            )
            self._weigh()
        if self.tokens > len(self._places):
            size = 1 << (self.tokens - 1).bit_length()
            self._places = _grown(self._places, size)
            # A slot of the larger table takes over the chain of the slot that it splits from, strangers and all: what a
            # chain leads to is compared anyway, and no step has to wait until all places are linked anew.
            self._heads = np.tile(self._heads, size // self._heads.shape[1])
            self._weigh()
        for number in self._cramped:
            self._move(number, max(_FIRST_ROOM, 2 * self._totals[number]))
        self._cramped.clear()

    def _weigh(self) -> None:
        """Know what the arrays take, each time one has grown."""
        arrays = self._pool, self._heads, self._places, self._starts, self._lengths
        self._array_bytes = sum(array.nbytes for array in arrays)

    def _move(self, number: int, room: int) -> None:
        """Give a sequence a larger place at the pool's end; each token moves a few times at most."""
        start, length = int(self._starts[number]), int(self._lengths[number])
        if self._pooled + room > len(self._pool):
            self._pool = _grown(self._pool, max(2 * len(self._pool), self._pooled + room))
            self._weigh()
        self._pool[self._pooled : self._pooled + length] = self._pool[start : start + length]
        self._starts[number], self._rooms[number] = self._pooled, room
        self._pooled += room


def _grown(array: NDArray[np.int32], size: int) -> NDArray[np.int32]:
    larger = np.zeros((size, *array.shape[1:]), dtype=np.int32)
    larger[: len(array)] = array
    return larger
