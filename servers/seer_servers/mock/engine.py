"""One mock engine: requests in flight, pauses, aborts, weight versions.

Invariants: a request ends exactly once, with its whole response or with "abort" and the tokens it had; one whose caller
is cancelled leaves the engine at once; a token is sampled by the version in force when its step ran, and labelled with
it. No task per request: each caller waits on a future, and one timer drives the simulation of them all.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from enum import StrEnum
from random import Random
from typing import TYPE_CHECKING

import msgspec

from seer_servers.mock.drafts import DraftCounts
from seer_servers.mock.flight import Call, Flight, Outcome
from seer_servers.mock.speed import PrefixCache, Simulation

if TYPE_CHECKING:
    from seer_servers.mock.config import MockConfig


class PauseMode(StrEnum):
    """What a pause does with the requests in flight."""

    ABORT = "abort"
    WAIT = "wait"
    KEEP = "keep"


class MockEngine:
    """The engine behind the routes; lives on the event loop it is made on."""

    def __init__(self, config: MockConfig) -> None:
        self.config = config
        self.boot_id = str(uuid.uuid4())
        self.started = time.time()
        self.model = config.model
        self.cache = PrefixCache(config.kv)
        self.adapters: dict[str, str] = {}  # paths by name
        self.drafts = DraftCounts(config.draft_acceptance) if config.draft_acceptance else None
        self.paused = False
        self._loop = asyncio.get_running_loop()
        self._simulation: Simulation[Flight] = Simulation(config.speed, config.kv, self._loop.time())
        self._flights: dict[str, dict[Flight, None]] = {}  # callers choose the ids, so they need not be unique
        self._held: dict[Flight, None] = {}  # arrived during a pause
        self._idle = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0
        self._random = Random(config.model.seed)  # noqa: S311 - sampling seeds, no secrets
        self._ended_tokens = 0

    async def generate(self, call: Call) -> Outcome:
        """Run one request to its end; if the caller is cancelled, the request leaves the engine."""
        flight = self._start(call)
        try:
            return await flight.future
        except asyncio.CancelledError:
            self._end(flight, None)
            self._tick()
            raise

    def answer(self, call: Call, version: str) -> Outcome:
        """What another weight version would answer to a call, at once and without a trace in the figures."""
        model = msgspec.structs.replace(self.model, version=version)
        return Flight(call, model, self.adapters.get(call.adapter, "")).whole()

    def fresh_seed(self) -> int:
        """A seed for a request that brings none."""
        return self._random.getrandbits(63)

    def load_version(self, version: str) -> None:
        """Sample all further tokens, those of requests in flight too, with another weight version."""
        self._tick()
        self.model = msgspec.structs.replace(self.model, version=version)
        for flight in self._in_flight():
            flight.switch(self.model, self._simulation.generated(flight))
            self._simulation.resize(flight, len(flight.token_ids))
        self._tick()

    def abort(self, ids: list[str]) -> int:
        """End these requests, or all if `ids` is empty, with the tokens they have; return how many ended."""
        self._tick()
        found = [flight for id_ in ids for flight in self._flights.get(id_, ())] if ids else self._in_flight()
        for flight in found:
            self._end(flight, flight.cut(self._simulation.generated(flight)))
        self._tick()
        return len(found)

    async def pause(self, mode: PauseMode, *, clear_cache: bool) -> None:
        """Start nothing new; abort, wait for, or freeze what is in flight. Returns when nothing runs any more."""
        self._tick()
        self.paused = True
        if mode is PauseMode.KEEP:
            self._simulation.frozen = True
            return
        if mode is PauseMode.ABORT:
            self.abort([])
        while self.running or self._simulation.waiting:
            self._idle.clear()
            await self._idle.wait()
        if clear_cache:
            self.cache.clear()

    def resume(self) -> None:
        """Go on after a pause, first with what was frozen, then with what arrived meanwhile."""
        self._tick()
        self.paused = self._simulation.frozen = False
        for flight in self._held:
            self._simulation.add(flight)
        self._held.clear()
        self._tick()

    def refresh(self) -> None:
        """Bring the figures below up to the present."""
        self._tick()

    @property
    def running(self) -> int:
        """Requests in the batch."""
        return len(self._simulation.running)

    @property
    def waiting(self) -> int:
        """Requests queued."""
        return len(self._simulation.waiting) + len(self._held)

    @property
    def preemptions(self) -> int:
        """Preemptions since the start."""
        return self._simulation.preemptions

    @property
    def recomputed(self) -> int:
        """Tokens that preempted requests have to prefill again, since the start."""
        return self._simulation.recomputed

    @property
    def kv_usage(self) -> float:
        """Fraction of the KV memory that running requests hold."""
        return min(1.0, self._simulation.used / self.config.kv.capacity)

    @property
    def generated_tokens(self) -> int:
        """Tokens generated since the start, those of requests in flight included."""
        return self._ended_tokens + sum(map(self._simulation.generated, self._in_flight()))

    def _in_flight(self) -> list[Flight]:
        return [flight for flights in self._flights.values() for flight in flights]

    def _start(self, call: Call) -> Flight:
        flight = Flight(call, self.model, self.adapters.get(call.adapter, ""))
        self._flights.setdefault(call.id, {})[flight] = None
        flight.cached = self.cache.lookup(call.cache_salt, flight.response.before, flight.size)
        self.cache.store(call.cache_salt, flight.response.before, flight.size)
        if self.paused:
            self._held[flight] = None
            return flight
        self._tick()
        self._simulation.add(flight)
        self._tick()
        return flight

    def _tick(self) -> None:
        """Catch up with the clock, answer what is complete, and set the timer for what comes next."""
        for flight in self._simulation.advance(self._loop.time()):
            self._end(flight, flight.whole())
            self.cache.store(flight.call.cache_salt, flight.response.after, flight.size + flight.length)
        due = self._simulation.next_event()
        if due is None:
            self._idle.set()
        elif self._timer is None or due < self._due:  # too early a timer only ticks once more
            if self._timer:
                self._timer.cancel()
            self._due = due  # a timer that is due already cannot tell: uvloop makes it a plain handle
            self._timer = self._loop.call_at(due, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._tick()

    def _end(self, flight: Flight, outcome: Outcome | None) -> None:
        """Take a request out, if it is still in, and answer its caller unless that one is gone."""
        siblings = self._flights.get(flight.call.id, {})
        if flight not in siblings:
            return
        self._simulation.remove(flight)
        self._held.pop(flight, None)
        self._ended_tokens += flight.done
        if self.drafts:
            self.drafts.add(flight.call.group, flight.done)
        del siblings[flight]
        if not siblings:
            del self._flights[flight.call.id]
        if outcome and not flight.future.done():
            flight.future.set_result(outcome)
