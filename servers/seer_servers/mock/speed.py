"""How fast the mock is and how much it holds: steps, batches, KV memory, preemption.

Invariants: a job is waiting or running, never both; running jobs hold at most `capacity` KV tokens; time never goes
back; and the work per job does not grow with the number of its tokens.

The approximation is processor sharing in virtual steps. All running jobs gain one token per step; a step of B jobs
lasts `step_ms + per_request_ms * B`. Since the batch only changes at events (arrival, completion, preemption, removal),
progress between events is one subtraction, and the next event is the head of a heap. Prefills stop the batch for
`tokens / prefill_rate` seconds. KV is counted in tokens, without rounding up to blocks.
No clock in here: callers pass the time in, so tests need not sleep.
"""

from __future__ import annotations

from collections import OrderedDict
from heapq import heappop, heappush
from itertools import count
from typing import Generic, TypeVar

import msgspec

_EPSILON = 1e-6  # of a token; steps are floats


class Speed(msgspec.Struct, frozen=True, kw_only=True):
    """Step time in ms, prefill in tokens/s; `time_scale` stretches both, and 0 makes every answer immediate."""

    step_ms: float = 10.0
    per_request_ms: float = 0.05
    prefill_rate: float = 20_000.0
    time_scale: float = 1.0

    def step_seconds(self, batch: int) -> float:
        """Seconds that one step of `batch` requests takes."""
        return (self.step_ms + self.per_request_ms * batch) * self.time_scale / 1000

    def prefill_seconds(self, tokens: int) -> float:
        """Seconds that the prefill of `tokens` uncached tokens takes."""
        return tokens * self.time_scale / self.prefill_rate


class KV(msgspec.Struct, frozen=True, kw_only=True):
    """KV memory: `num_blocks` blocks of `block_size` tokens, shared by at most `max_num_seqs` running requests."""

    num_blocks: int = 4096
    block_size: int = 16
    max_num_seqs: int = 256

    @property
    def capacity(self) -> int:
        """Tokens that fit."""
        return self.num_blocks * self.block_size


class Job:
    """One request in the simulation: `size` tokens in, `length` tokens out, `cached` of the first need no prefill."""

    __slots__ = ("cached", "done", "entered", "length", "size")

    def __init__(self, size: int, length: int, cached: int = 0) -> None:
        self.size = size
        self.length = length
        self.cached = cached
        self.done = 0  # tokens generated before the last preemption
        self.entered = 0.0  # the step count when it last began to run

    @property
    def held(self) -> int:
        """KV tokens it needs to begin running."""
        return self.size + self.done

    @property
    def target(self) -> float:
        """The step count at which a running job is complete."""
        return self.entered + self.length - self.done


J = TypeVar("J", bound=Job)


class Simulation(Generic[J]):
    """A vLLM scheduler reduced to arithmetic. Call `advance` before every change, and after it to give it effect."""

    def __init__(self, speed: Speed, kv: KV, now: float = 0.0) -> None:
        self.preemptions = 0
        self.recomputed = 0  # tokens that preempted jobs have to prefill again
        self.running: dict[J, None] = {}  # in the order of admission: the last is the youngest
        self.waiting: OrderedDict[J, None] = OrderedDict()
        self.frozen = False
        self._speed = speed
        self._kv = kv
        self._now = now
        self._steps = 0.0
        self._prefill = 0.0  # seconds of prefill still to be done
        self._base = 0.0  # KV tokens in use = base + steps * len(running)
        self._targets: list[tuple[float, int, J]] = []
        self._serial = count()

    @property
    def used(self) -> float:
        """KV tokens in use."""
        return self._base + self._steps * len(self.running)

    def generated(self, job: J) -> int:
        """Tokens `job` has so far."""
        if job not in self.running:
            return job.done
        return min(job.length, job.done + int(self._steps - job.entered + _EPSILON))

    def add(self, job: J) -> None:
        """Put a job at the end of the queue."""
        self.waiting[job] = None

    def remove(self, job: J) -> None:
        """Take a job out, wherever it is; `generated` goes on saying what it had."""
        self.waiting.pop(job, None)
        if job in self.running:
            done = self.generated(job)
            self._leave(job)
            job.done = done

    def resize(self, job: J, length: int) -> None:
        """The job's response turned out to be `length` tokens long, at least what it has generated."""
        job.length = length
        if job in self.running:
            self._aim(job)

    def advance(self, now: float) -> list[J]:
        """Move to `now` (seconds); return the jobs completed on the way."""
        finished: list[J] = []
        if not self.frozen:
            self._admit()
            while self.running:
                target, due = self._next()
                if due > now:
                    self._flow(now - self._now)
                    break
                self._now, self._steps, self._prefill = due, target, 0.0
                finished += self._complete()
                self._preempt()
                self._admit()
        self._now = max(now, self._now)
        return finished

    def next_event(self) -> float | None:
        """When `advance` next has something to do, or None while nothing runs."""
        return self._next()[1] if self.running and not self.frozen else None

    def _next(self) -> tuple[float, float]:
        """Step count and time of the next completion or overflow."""
        while (head := self._targets[0])[2] not in self.running or head[0] != head[2].target:
            heappop(self._targets)
        target = head[0]
        if len(self.running) > 1:
            target = min(target, (self._kv.capacity - self._base) / len(self.running))
        target = max(target, self._steps)
        step = self._speed.step_seconds(len(self.running))
        return target, self._now + self._prefill + (target - self._steps) * step

    def _flow(self, seconds: float) -> None:
        """Let time pass without an event: prefills first, then steps."""
        prefill = min(seconds, self._prefill)
        self._prefill -= prefill
        if seconds > prefill:
            self._steps += (seconds - prefill) / self._speed.step_seconds(len(self.running))

    def _complete(self) -> list[J]:
        """Take out the jobs that have all their tokens."""
        done: list[J] = []
        while self._targets and self._targets[0][0] <= self._steps + _EPSILON:
            target, _, job = heappop(self._targets)
            if job in self.running and job.target == target:
                self._leave(job)
                job.done = job.length
                done.append(job)
        return done

    def _preempt(self) -> None:
        """Return the youngest to the queue while the batch has no room to grow; it is prefilled again."""
        while len(self.running) > 1 and self.used > self._kv.capacity - _EPSILON:
            job = next(reversed(self.running))
            done = self.generated(job)
            self._leave(job)
            job.done, job.cached = done, 0
            self.waiting[job] = None
            self.waiting.move_to_end(job, last=False)
            self.preemptions += 1
            self.recomputed += job.held

    def _admit(self) -> None:
        """Start waiting jobs, oldest first, while they fit with a block of growth for each running job."""
        while self.waiting and len(self.running) < self._kv.max_num_seqs:
            job = next(iter(self.waiting))
            growth = (len(self.running) + 1) * self._kv.block_size
            if self.running and self.used + job.held + growth > self._kv.capacity:
                return
            del self.waiting[job]
            self._base += job.held - self._steps
            job.entered = self._steps
            self.running[job] = None
            self._prefill += self._speed.prefill_seconds(max(1, job.held - job.cached))
            self._aim(job)

    def _aim(self, job: J) -> None:
        heappush(self._targets, (job.target, next(self._serial), job))

    def _leave(self, job: J) -> None:
        del self.running[job]
        self._base += job.entered - job.held
        if not self.running:  # an idle engine starts afresh, so that rounding errors cannot add up
            self._base = self._steps = self._prefill = 0.0
            self._targets.clear()


class PrefixCache:
    """Which whole prefixes are still in KV memory, least recently used first; running requests evict none.

    A prefix is known by the model's hash of it and its `cache_salt`. `queries` and `hits` count tokens.
    """

    def __init__(self, kv: KV) -> None:
        self.queries = 0
        self.hits = 0
        self._kv = kv
        self._tokens = 0
        self._prefixes: OrderedDict[tuple[str | None, int], int] = OrderedDict()

    def lookup(self, salt: str | None, state: int, size: int) -> int:
        """How many of a prefix's `size` tokens are cached: all its full blocks but the last token's, or none."""
        hit = (size - 1) // self._kv.block_size * self._kv.block_size if (salt, state) in self._prefixes else 0
        self.queries += size
        self.hits += hit
        return hit

    def store(self, salt: str | None, state: int, size: int) -> None:
        """Remember a prefix of `size` tokens, forgetting the oldest ones beyond the KV memory's capacity."""
        self._tokens += size - self._prefixes.pop((salt, state), 0)
        self._prefixes[salt, state] = size
        while self._tokens > self._kv.capacity:
            self._tokens -= self._prefixes.popitem(last=False)[1]

    def clear(self) -> None:
        """Forget everything."""
        self._prefixes.clear()
        self._tokens = 0
