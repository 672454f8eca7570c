"""An engine with closed-form progress: continuous batching, KV memory, preemption, prefix cache, drafts, pool loads.

Invariants: what runs never exceeds the KV memory; calls are admitted first come, first served, as vLLM does it, with
room for what they have and not for what they will generate; when memory is full, the latest admitted call is preempted,
goes to the head of the queue and computes all its tokens again; a prefill holds up the batch.

Nothing loops over steps. All running calls of a level (how well they are drafted for) gain the same tokens a step, so
a level has one counter, a call ends when its level's counter reaches its target, and between two changes of the batch
time and steps are each a closed form of the other. KV is counted in tokens, without rounding to blocks.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, OrderedDict, deque
from typing import TYPE_CHECKING

from seer_async.simulation.cost import Stretch

if TYPE_CHECKING:
    from collections.abc import Callable

    from seer_async.simulation.acceptance import Drafting
    from seer_async.simulation.cost import EngineModel
    from seer_async.testing.clock import Timer, VirtualClock

EPS = 1e-6
"""Tokens. Counters are real numbers; two targets this close are reached together."""


class Call:
    """A call inside an engine: `amount` tokens to generate behind `prefix`, which begins with a group's prompt."""

    __slots__ = ("amount", "begun", "cached", "got", "group", "id", "level", "pooled", "prefix", "prompt", "request")

    def __init__(self, number: int, request: str, group: str, *, prompt: int, prefix: int, amount: int) -> None:
        self.id = number
        self.request = request
        self.group = group
        self.prompt = prompt
        self.prefix = prefix
        self.amount = amount
        self.got = 0.0  # generated before `begun`
        self.begun = 0.0  # its level's counter when it was admitted
        self.level = 0
        self.cached = 0
        self.pooled = 0

    @property
    def length(self) -> float:
        """Tokens of KV that it needs to go on."""
        return self.prefix + self.got


class Level:
    """The running calls that are drafted for equally well."""

    __slots__ = ("count", "gain", "made", "targets")

    def __init__(self) -> None:
        self.count = 0
        self.made = 0.0  # tokens that each of them would have generated since the engine last stood idle
        self.gain = 1.0  # tokens a step
        self.targets: list[tuple[float, int, Call]] = []


class FastEngine:
    """One engine. `answer` is told of calls that have ended together; `references` counts a call's started siblings."""

    def __init__(
        self,
        name: str,
        model: EngineModel,
        clock: VirtualClock,
        answer: Callable[[list[Call]], None],
        *,
        shared_prompt: Callable[[int], int] = lambda _: 0,
        drafting: Drafting | None = None,
        references: Callable[[Call], int] = lambda _: 0,
    ) -> None:
        self.name = name
        self.preemptions = self.prefilled = self.again = self.loaded = 0
        self.busy_s = self.steps = 0.0
        self.generated = 0.0
        self._model = model
        self._clock = clock
        self._answer = answer
        self._shared_prompt = shared_prompt
        self._drafting = drafting
        self._references = references
        self._levels = [Level() for _ in (drafting.chances if drafting else (0,))]
        self._running: dict[int, Call] = {}  # in the order of admission
        self._queue: deque[Call] = deque()
        self._cache: OrderedDict[str, int] = OrderedDict()  # tokens by request or prompt, least recently used first
        self._cached = 0
        self._sharers: Counter[str] = Counter()  # running calls by group
        self._admitted = 0
        self._base = 0.0  # KV in use is `_base` + each level's count * made
        self._stretch = Stretch(1.0, 0.0)
        self._as_of = clock.now  # of the counters; ahead of time while a prefill holds up decoding
        self._timer: Timer | None = None

    @property
    def used(self) -> float:
        """Tokens of KV that running calls hold."""
        return self._base + sum(level.count * level.made for level in self._levels)

    @property
    def running(self) -> int:
        """Calls in the batch."""
        return len(self._running)

    @property
    def queued(self) -> int:
        """Calls that wait for memory or a place in the batch."""
        return len(self._queue)

    # Calls

    def submit(self, call: Call) -> None:
        """Queue a call; `plan` must follow."""
        self._queue.append(call)

    def holds(self, call: Call) -> int:
        """Tokens of the call's prefix that are in the prefix cache."""
        return self._cache.get(call.request) or self._cache.get(call.group, 0)

    def plan(self) -> None:
        """Admit what fits, and wait for what comes next: a call's end, or the memory's."""
        self._advance()
        self._admit()
        self._trim()
        if self._timer:
            self._timer.cancel()
            self._timer = None
        if not self._running:
            self._base = 0.0  # rounding errors end here
            for level in self._levels:
                level.made = 0.0
            return
        growth = self._set_pace()
        steps = min(self._next_end(), max(0.0, self._model.kv_tokens - self.used) / growth)
        wait = self._as_of - self._clock.now + self._stretch.seconds(steps)
        self._timer = self._clock.after(wait, self._tick)

    # Time

    def _tick(self) -> None:
        self._timer = None
        self._advance()
        ended = self._ended()
        while len(self._running) > 1 and self.used > self._model.kv_tokens - EPS * len(self._running):
            self._preempt(next(reversed(self._running.values())))
        if ended:
            self._answer(ended)
        self.plan()

    def _advance(self) -> None:
        """Bring the counters to now."""
        seconds = self._clock.now - self._as_of
        if seconds <= 0:
            return
        self._as_of = self._clock.now
        if not self._running:
            return
        self.busy_s += seconds
        steps = self._stretch.steps(seconds)
        self.steps += steps
        for level in self._levels:
            level.made += steps * level.gain

    def _ended(self) -> list[Call]:
        ended: list[Call] = []
        for level in self._levels:
            while (target := _first(level, self._running)) is not None and target <= level.made + EPS:
                call = level.targets[0][2]
                self._remove(call)
                self._remember(call.request, call.prefix + call.amount)
                ended.append(call)
        return ended

    def _set_pace(self) -> float:
        """Fix what steps cost and bring until the batch changes; returns tokens of KV that one step adds."""
        batch, drafted = len(self._running), 0.0
        cost = self._model.cost
        if self._drafting:
            plain = cost.stretch(batch, 0.0, self.used, 0.0).fixed
            depths = self._drafting.depths([level.count for level in self._levels], cost, plain)
            for index, (level, depth) in enumerate(zip(self._levels, depths, strict=True)):
                level.gain = self._drafting.gain(index, depth)
                drafted += level.count * depth
        growth = sum(level.count * level.gain for level in self._levels)
        self._stretch = cost.stretch(batch, drafted, self.used, growth)
        return growth

    def _next_end(self) -> float:
        """Steps until a call ends."""
        steps = math.inf
        for level in self._levels:
            target = _first(level, self._running)
            if target is not None:
                steps = min(steps, (target - level.made) / level.gain)
        return max(0.0, steps)

    # Batch

    def _admit(self) -> None:
        while self._queue and len(self._running) < self._model.max_seqs:
            call = self._queue[0]
            if self._running and self.used + call.length + len(self._running) + 1 > self._model.kv_tokens:
                return
            self._queue.popleft()
            self._prefill(call)
            self._begin(call)

    def _prefill(self, call: Call) -> None:
        known = self._take_cached(call)
        if call.pooled:
            known = max(known, call.prefix)
        computed = max(0.0, call.length - known)
        self._remember(call.group, call.prompt)
        self.prefilled += round(computed)
        if call.prefix > call.prompt or call.got:
            self.again += round(computed)
        seconds = self._model.cost.prefill_s(round(computed))
        self._as_of = max(self._as_of, self._clock.now) + seconds
        self.busy_s += seconds

    def _take_cached(self, call: Call) -> int:
        """Tokens of the call's prefix that are cached; those of the request itself are the call's from now on."""
        tokens = self._cache.pop(call.request, 0)
        self._cached -= tokens
        if not call.got:
            call.cached = tokens or self._cache.get(call.group, 0)
        return tokens or self._cache.get(call.group, 0)

    def _begin(self, call: Call) -> None:
        call.level = self._drafting.level(self._references(call)) if self._drafting else 0
        level = self._levels[call.level]
        call.begun = level.made
        level.count += 1
        self._admitted += 1
        heapq.heappush(level.targets, (level.made + call.amount - call.got, self._admitted, call))
        self._running[call.id] = call
        self._base += call.length - level.made
        if self._sharers[call.group]:
            self._base -= self._shared_prompt(call.prompt)
        self._sharers[call.group] += 1

    def _remove(self, call: Call) -> None:
        """Take a running call's tokens so far out of the flow."""
        level = self._levels[call.level]
        del self._running[call.id]
        level.count -= 1
        self._base -= call.length - call.begun
        made = level.made - call.begun
        call.got += made
        self.generated += made
        self._sharers[call.group] -= 1
        if self._sharers[call.group]:
            self._base += self._shared_prompt(call.prompt)
        else:
            del self._sharers[call.group]

    def _preempt(self, call: Call) -> None:
        self.preemptions += 1
        self._remove(call)
        call.got = math.floor(call.got + EPS)
        call.pooled = 0
        self._queue.appendleft(call)

    # Prefix cache

    def _remember(self, name: str, tokens: int) -> None:
        self._cached += tokens - self._cache.pop(name, 0)
        self._cache[name] = tokens

    def _trim(self) -> None:
        room = self._model.kv_tokens - self.used
        while self._cache and self._cached > room:
            self._cached -= self._cache.popitem(last=False)[1]


def _first(level: Level, running: dict[int, Call]) -> float | None:
    """The lowest target of a call that still runs under it."""
    while level.targets:
        target, _, call = level.targets[0]
        if call.id in running and target == call.begun + call.amount - call.got:
            return target
        heapq.heappop(level.targets)
    return None
