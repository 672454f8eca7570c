"""Rates of the fleet over the last ten minutes.

Once a second it notes what the engines say they have generated, so rates are smooth however long chunks are, and
include what other clients of the same engines ask for. Invariant: the ring holds at most ten minutes; a note costs
O(engines).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter, deque
from itertools import pairwise
from typing import TYPE_CHECKING

import msgspec

from seer_async.request import State

if TYPE_CHECKING:
    from seer_async.core import Core

_EVERY_S = 1.0
_KEPT = 600
_WINDOW = 10  # notes behind a rate
_STEP = 5  # notes behind a point of the history


class _Note(msgspec.Struct, frozen=True):
    at: float  # monotonic
    tokens: Counter[str]  # by engine, since the service began
    ended: int
    running: int


class Meter:
    """Watches `core`."""

    def __init__(self, core: Core) -> None:
        self.started = time.time()
        self._core = core
        self._said: dict[str, int] = {}  # the engines' own counters, which begin again when they do
        self._notes: deque[_Note] = deque(maxlen=_KEPT)
        self._note()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to watch."""
        self._task = asyncio.create_task(self._watch(), name="meter")

    async def stop(self) -> None:
        """Stop watching."""
        if self._task:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_EVERY_S)
            self._note()

    def _note(self) -> None:
        tokens = Counter(self._notes[-1].tokens if self._notes else ())
        for name, instance in self._core.instances.items():
            if instance.stats:
                said = instance.stats.generated_tokens
                before = self._said.get(name, said)
                tokens[name] += said - before if said >= before else said
                self._said[name] = said
        buffer = self._core.buffer
        self._notes.append(_Note(time.monotonic(), tokens, buffer.ended, buffer.counts[State.RUNNING]))

    def engine_rates(self) -> dict[str, float]:
        """Tokens a second by engine, lately."""
        first, last = self._recent()
        seconds = last.at - first.at
        return {
            name: round((last.tokens[name] - first.tokens[name]) / seconds, 1) if seconds else 0.0
            for name in self._core.instances
        }

    def sample_rate(self) -> float:
        """Responses a second that ended, lately."""
        first, last = self._recent()
        return round((last.ended - first.ended) / (last.at - first.at), 2) if last.at > first.at else 0.0

    def _recent(self) -> tuple[_Note, _Note]:
        return self._notes[max(0, len(self._notes) - 1 - _WINDOW)], self._notes[-1]

    def history(self) -> list[tuple[float, float, int]]:
        """Seconds ago, tokens a second, requests in flight; oldest first."""
        notes, now = list(self._notes), time.monotonic()
        ends = notes[len(notes) % _STEP :: _STEP] if len(notes) > _STEP else notes[::_STEP]
        return [(round(now - last.at, 1), _rate(first, last), last.running) for first, last in pairwise(ends)]


def _rate(first: _Note, last: _Note) -> float:
    return round((last.tokens.total() - first.tokens.total()) / (last.at - first.at), 1)
