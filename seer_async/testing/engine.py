"""A simulated engine: continuous batching, KV memory, preemption, prefix cache, weight versions; on a virtual clock.

Invariants: all running calls gain a token per step, and a step takes as long as the cost model says for that batch;
what runs and what is cached never exceed the KV memory; a killed engine answers nothing that it was asked before.

Nothing loops over steps. The engine counts steps as a real number, a call ends when the count reaches its target, and
the count moves on only when something happens. KV is counted in tokens, without rounding to blocks; running calls with
equal prompts share the prompt's full blocks if the engine shares prefixes.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, deque
from typing import TYPE_CHECKING

import msgspec

from seer_async.testing.cache import PrefixCache
from seer_async.testing.cost import CostModel, LinearCost
from seer_async.testing.work import EPS, Work
from seer_async.types import EngineStats

if TYPE_CHECKING:
    from seer_async.testing.clock import Timer, VirtualClock
    from seer_async.testing.model import Model
    from seer_async.types import EngineInfo


class SimulatedEngine:
    """One engine, through all its lives.

    `info` is what it tells when attached; its `boot` and `weight_version` are replaced by what is so. `alive`,
    `partitioned`, `lying` and `slowness` are for faults to set, through the methods where there are any.
    """

    def __init__(
        self, name: str, info: EngineInfo, clock: VirtualClock, model: Model, cost: CostModel | None = None
    ) -> None:
        self.name = name
        self.version = info.weight_version
        self.lives = 0
        self.alive = False
        self.partitioned = False
        self.lying = False
        self.slowness = 1.0
        self.preemptions = self.generated = self.prompted = self.cached = 0  # as counted by this life
        self._info = info
        self._clock = clock
        self._model = model
        self._cost = cost or LinearCost()
        self._room = max(0, info.num_blocks - 1) * info.block_size  # one block is the engine's own
        self._seats = info.max_num_seqs or math.inf
        self._clear()

    def _clear(self) -> None:
        self._running: dict[str, Work] = {}
        self._queue: deque[Work] = deque()
        self._targets: list[tuple[float, str]] = []
        self._cache = PrefixCache()
        self._sharers: Counter[tuple[int, ...]] = Counter()  # running calls by prompt
        self._base = 0.0  # KV in use is `_base` + running calls * step count
        self._steps = 0.0
        self._as_of = self._clock.now  # of `_steps`; ahead of time while a prefill holds up decoding
        self._step_s = math.inf
        self._timer: Timer | None = None

    # Life

    @property
    def boot(self) -> str:
        """Identity of this life."""
        return f"{self.name}#{self.lives}"

    @property
    def info(self) -> EngineInfo:
        """What an orchestrator learns when it attaches."""
        return msgspec.structs.replace(self._info, boot=self.boot, weight_version=self.version)

    def start(self) -> None:
        """Begin a life."""
        assert not self.alive
        self.lives += 1
        self.alive = True
        self.preemptions = self.generated = self.prompted = self.cached = 0
        self._clear()

    def kill(self) -> None:
        """End it; every call is lost."""
        lost = [*self._running.values(), *self._queue]
        if self._timer:
            self._timer.cancel()
        self.alive = False
        self._clear()
        for work in lost:
            work.done(None)

    def slow_down(self, factor: float) -> None:
        """Let every step take `factor` times as long as the cost model says."""
        self._advance()
        self.slowness = factor
        self._plan()

    def update_weights(self, version: str) -> None:
        """Sample every further token from other weights, also in calls that are running."""
        self._advance()
        self.version = version
        for work in self._running.values():
            self._hold(work)
            self._begin(work)
        self._cache.clear()
        self._plan()

    def stats(self) -> EngineStats:
        """A reading of the telemetry."""
        self._advance()
        return EngineStats(
            boot=self.boot,
            running=len(self._running),
            waiting=len(self._queue),
            kv_used=min(1.0, self._used / self._room) if self._room else 1.0,
            preemptions=self.preemptions,
            generated_tokens=self.generated,
            prompt_tokens=self.prompted,
            cached_tokens=self.cached,
            weight_version=self.version,
        )

    # Calls

    def submit(self, work: Work) -> str | None:
        """Take a call; returns why it is refused, if it is."""
        most = len(work.prefix) + work.params["max_tokens"]
        if most > min(self._info.max_model_len, self._room):
            return f"{most} tokens are more than the engine holds"
        self._advance()
        self._queue.append(work)
        self._plan()
        return None

    def abort(self, name: str) -> None:
        """Drop a call, if it is still here."""
        self._advance()
        self._take_out(name)
        self._plan()

    def hand_back(self, name: str) -> None:
        """Answer a call, if it is still here, with what it has."""
        self._advance()
        if work := self._take_out(name):
            work.done(work.reply(with_versions=self._info.dialect == "generate", cut=True))
        self._plan()

    def _take_out(self, name: str) -> Work | None:
        work = self._running.get(name)
        if work is not None:
            self._remove(work)
            return work
        work = next((each for each in self._queue if each.name == name), None)
        if work is not None:
            self._queue.remove(work)
        return work

    # Time

    @property
    def _used(self) -> float:
        return self._base + len(self._running) * self._steps

    def _advance(self) -> None:
        """Bring the step count to now, and answer the calls that have reached their targets."""
        now = self._clock.now
        if now > self._as_of:
            self._steps += (now - self._as_of) / self._step_s
            self._as_of = now
        while self._running and self._next_target() <= self._steps + EPS:
            self._finish(self._running[self._targets[0][1]])

    def _plan(self) -> None:
        """Admit what fits and wait for what comes next: a call's end, or the memory's."""
        self._admit()
        self._cache.trim(self._room - self._used)
        if self._timer:
            self._timer.cancel()
            self._timer = None
        if not self._running:
            self._base = self._steps = 0.0  # rounding errors end here
            self._step_s = math.inf
            return
        count = len(self._running)
        self._step_s = self._cost.step_s(count, round(self._used)) * self.slowness
        full = self._steps + max(0.0, self._room - self._used) / count
        wait = (min(full, self._next_target()) - self._steps) * self._step_s
        self._timer = self._clock.after(self._as_of - self._clock.now + wait, self._tick)

    def _next_target(self) -> float:
        while True:
            target, name = self._targets[0]
            work = self._running.get(name)
            if work is not None and work.ahead is not None and target == work.begun + len(work.ahead.token_ids):
                return target
            heapq.heappop(self._targets)

    def _tick(self) -> None:
        self._timer = None
        self._advance()
        while self._running and self._used > self._room - EPS * len(self._running):
            self._preempt(next(reversed(self._running.values())))
        self._plan()

    # Batch

    def _admit(self) -> None:
        while self._queue and len(self._running) < self._seats:
            work = self._queue[0]
            if self._used + work.length + len(self._running) + 1 > self._room:
                return
            self._queue.popleft()
            self._prefill(work)
            self._running[work.name] = work
            self._begin(work)
            self._share(work)

    def _prefill(self, work: Work) -> None:
        prompt = work.prompt
        cached = self._cache.find(work.prefix + work.tokens, prompt)
        self._cache.add(prompt)
        self.prompted += work.length
        self.cached += cached
        self._as_of = max(self._as_of, self._clock.now) + self._cost.prefill_s(work.length - cached) * self.slowness

    def _begin(self, work: Work) -> None:
        target = work.plan(self._model, self.version, self._steps)
        self._base += work.length - self._steps
        heapq.heappush(self._targets, (target, work.name))

    def _hold(self, work: Work) -> None:
        """Take a running call's tokens so far out of the flow."""
        self._base -= work.length - work.begun
        self.generated += work.keep(self._steps)

    def _share(self, work: Work) -> None:
        prompt = work.prompt
        self._base -= self._shared(prompt) if self._sharers[prompt] else 0
        self._sharers[prompt] += 1

    def _shared(self, prompt: tuple[int, ...]) -> int:
        size = self._info.block_size
        return (len(prompt) - 1) // size * size if self._info.shares_prefixes else 0

    def _remove(self, work: Work) -> None:
        del self._running[work.name]
        self._hold(work)
        self._sharers[work.prompt] -= 1
        self._base += self._shared(work.prompt) if self._sharers[work.prompt] else 0

    def _finish(self, work: Work) -> None:
        self._remove(work)
        self._cache.add(work.prefix + work.tokens)
        work.done(work.reply(with_versions=self._info.dialect == "generate"))

    def _preempt(self, work: Work) -> None:
        self.preemptions += 1
        self._remove(work)
        self._queue.appendleft(work)
