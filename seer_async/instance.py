"""An instance: what the core knows of one engine, and the KV room it still has for us.

Invariants: `reserved` is the sum of the bounds of the calls in flight, where calls of one group count their prompt's
full blocks once if the engine shares equal prefixes; a chunk is admitted only where its bound fits, or will fit by the
time it needs it (`occupancy`), so an engine does not have to preempt for us; `in_flight` holds exactly the calls
dispatched in the current epoch and not yet answered.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from seer_async.occupancy import Occupancy
from seer_async.sampling import DRAFTS, POSITION_SEEDS

if TYPE_CHECKING:
    from seer_async.config import EngineConfig
    from seer_async.request import Request
    from seer_async.types import EngineInfo, EngineStats

_SPARE_BLOCKS = 1  # vLLM keeps one block for itself
_PREEMPTION_CUT = 0.9  # trust this much less of an engine's KV after each preemption it reports
_LEAST_TRUST = 0.3
_RELIANCE_CUT = 0.5  # the same of the order in which calls end, if more was admitted than fits together
_LEAST_PACED = 16  # tokens of a chunk that tells how fast the engine is
_PACE_WEIGHT = 0.2  # of the latest chunk
_MOST_DOUBLINGS = 16  # of the time an engine stays closed; beyond, floats overflow


class _Sharers:
    """Calls in flight that share a prompt's blocks, which are reserved once for all of them."""

    __slots__ = ("blocks", "calls", "key")

    def __init__(self, key: tuple[str, str], blocks: int) -> None:
        self.key = key
        self.blocks = blocks
        self.calls = 0


class Instance:
    """One engine, through all its epochs."""

    def __init__(self, name: str, config: EngineConfig) -> None:
        self.name = name
        self.config = config
        self.up = False
        self.epoch = 0
        self.info: EngineInfo | None = None
        self.stats: EngineStats | None = None
        self.version = "unknown"
        self.in_flight: dict[int, tuple[int, _Sharers]] = {}  # call -> blocks reserved beyond those it shares
        self.reserved = 0
        self._sharers: dict[tuple[str, str], _Sharers] = {}  # by group and weight version
        self.preempted = 0  # requests, by this engine, while we watched it
        self.generated = 0  # tokens accepted from this engine, in all epochs
        self.failures = 0  # in a row
        self.ejections = 0  # in a row
        self.closed_until = 0.0  # on the run's clock; no dispatch before
        self.half_open = False  # one call at a time until one succeeds
        self.held = False  # paused by others: not failing, but it would not answer
        self.last_error: str | None = None
        self.longest = 0  # tokens of a sequence that would fit if it were empty
        self.block_size = 1
        self.capacity = 0  # KV blocks that calls of ours may reserve together
        self.room = 1  # the same in tokens, at least 1
        self._seats = config.max_in_flight
        self._foreign = 0  # blocks used by others
        self._peak_reserved = 0
        self._trust = 1.0
        self._occupancy = Occupancy()
        self._reliance = config.stagger
        self._pace: float | None = None  # steps a second
        self._refused = math.inf  # so many blocks had no room, and nothing has ended here since
        self._steps = 0.0  # that it has done, by our reckoning
        self._ticked = 0.0

    def start_epoch(self, info: EngineInfo) -> None:
        """The engine answers, as a new process or again after silence."""
        assert not self.in_flight, "calls of the old epoch are lost before a new one starts"
        self.up = True
        self.epoch += 1
        self.info = info
        self.stats = None
        self.version = info.weight_version
        self.failures = self.ejections = 0
        self.closed_until = 0.0
        self.half_open = self.held = False
        self._foreign = self._peak_reserved = 0
        self._trust = 1.0
        self._reliance, self._pace = self.config.stagger, None
        self._seats = min(info.max_num_seqs or self.config.max_in_flight, self.config.max_in_flight)
        self.block_size = info.block_size
        self.longest = min(info.max_model_len, self._usable * info.block_size)
        self._weigh()

    def observe(self, stats: EngineStats) -> None:
        """Take in one reading of the engine's telemetry."""
        if self.stats is not None and stats.preemptions > self.stats.preemptions:
            if self._peak_reserved > self.capacity:
                self._reliance *= _RELIANCE_CUT
            else:
                self._trust = max(_LEAST_TRUST, self._trust * _PREEMPTION_CUT)
            self.preempted += stats.preemptions - self.stats.preemptions
        self.stats = stats
        self._foreign = max(0, round(stats.kv_used * self._usable) - self._peak_reserved)
        self._peak_reserved = self.reserved
        self._weigh()

    @property
    def _usable(self) -> int:
        return max(0, self.info.num_blocks - _SPARE_BLOCKS) if self.info else 0

    def _weigh(self) -> None:
        self._refused = math.inf
        self.capacity = int(self._usable * self.config.kv_fraction * self._trust) - self._foreign
        self.room = max(1, self.capacity) * self.block_size

    @property
    def free(self) -> int:
        """KV blocks not yet reserved; negative when an undivided policy has overbooked the engine."""
        return self.capacity - self.reserved

    @property
    def slots(self) -> int:
        """The most calls in flight."""
        return 1 if self.half_open else self._seats

    @property
    def position_seeds(self) -> bool:
        """Whether seeded noise depends on the position alone."""
        return self.info is not None and POSITION_SEEDS in self.info.capabilities

    @property
    def drafts(self) -> bool:
        """Whether it drafts from siblings, and so wants to know them."""
        return self.info is not None and DRAFTS in self.info.capabilities

    @property
    def pool(self) -> str | None:
        """The KV pool that it shares with others and that we use, if any."""
        return self.info.kv_pool if self.info and self.config.kv_pool else None

    def blocks(self, tokens: int) -> int:
        """KV blocks that a sequence of `tokens` occupies."""
        return -(-tokens // self.block_size)

    def usable(self, now: float) -> bool:
        """Whether calls may be sent at all."""
        return self.up and not self.held and now >= self.closed_until

    def tick(self, now: float) -> None:
        """Reckon how far the calls in flight have got."""
        if self._pace is not None:
            self._steps += self._pace * (now - self._ticked)
        self._ticked = now

    def sampled(self, tokens: int, seconds: float) -> None:
        """A call has brought so many tokens in so many seconds, all its waiting included."""
        self.generated += tokens
        if tokens >= _LEAST_PACED and seconds > 0:
            pace = tokens / seconds
            self._pace = pace if self._pace is None else self._pace + _PACE_WEIGHT * (pace - self._pace)

    def need(self, request: Request, tokens: int) -> int:
        """KV blocks that a chunk which ends with a sequence of at most `tokens` adds to those reserved."""
        sharers = self._sharers.get((request.group.id, self.version))
        return self.blocks(tokens) - (sharers.blocks if sharers else 0)

    def room_for(self, request: Request, tokens: int) -> int | None:
        """What a chunk that ends with a sequence of at most `tokens` needs, if it may be admitted now; else None.

        An engine without calls of ours takes any one that fits it at all, whatever its telemetry says: with nothing in
        flight there is nothing to wait for.
        """
        calls = len(self.in_flight)
        if not calls:
            return self.need(request, tokens) if self.could_hold(tokens) else None
        if calls >= self._seats or self.half_open:
            return None
        least = (tokens - request.group.prompt_len) / self.block_size  # if it shares all of the prompt
        if least > self.capacity - self.reserved and least >= self._refused:
            return None  # said early, because most engines are full
        need = self.need(request, tokens)
        if need <= self.free:
            return need
        if need < self._refused and not self._room_in_time(need, tokens - request.length):
            self._refused = need
        return need if need < self._refused else None

    def _room_in_time(self, need: int, steps: int) -> bool:
        """Whether `need` more blocks, the last of them in so many steps, are free by the time they are needed."""
        if self._pace is None or not self._reliance or self.drafts:  # with drafts, calls do not keep step
            return False
        shared = sum(sharers.blocks for sharers in self._sharers.values())
        slope = self._reliance / self.block_size
        return shared + self._occupancy.peak_with(need, self._steps + steps, self._steps, slope) <= self.capacity

    def could_hold(self, tokens: int) -> bool:
        """Whether such a chunk would fit an otherwise empty engine."""
        return tokens <= self.longest

    def dispatch(self, call: int, request: Request, tokens: int) -> None:
        """Reserve room for a call that ends with a sequence of at most `tokens`."""
        key = (request.group.id, self.version)
        self.reserved += self.need(request, tokens)
        sharers = self._sharers.setdefault(key, _Sharers(key, self._shared_blocks(request)))
        sharers.calls += 1
        own = self.blocks(tokens) - sharers.blocks
        self.in_flight[call] = own, sharers
        self._occupancy.add(call, own, self._steps + tokens - request.length)
        self._peak_reserved = max(self._peak_reserved, self.reserved)

    def release(self, call: int) -> None:
        """Give back a call's room; unknown calls are of an earlier epoch."""
        if call not in self.in_flight:
            return
        blocks, sharers = self.in_flight.pop(call)
        self._occupancy.remove(call)
        self._refused = math.inf
        self.reserved -= blocks
        sharers.calls -= 1
        if not sharers.calls:
            self.reserved -= sharers.blocks
            del self._sharers[sharers.key]

    def _shared_blocks(self, request: Request) -> int:
        """Full blocks of the prompt; the last token never counts, because vLLM always computes one."""
        shares = self.info is not None and self.info.shares_prefixes
        return (request.group.prompt_len - 1) // self.block_size if shares else 0

    def succeeded(self) -> None:
        """A call was answered well."""
        self.failures = self.ejections = 0
        self.half_open = False

    def failed(self, error: str, now: float) -> None:
        """A call failed through the engine's fault; enough in a row close the engine for a growing while."""
        self.last_error = error
        if now < self.closed_until:
            return  # calls sent before it was closed fail together; they are one incident
        self.failures += 1
        if self.failures >= self.config.eject_after or self.half_open:
            self.close_for(
                min(self.config.eject_max_s, self.config.eject_s * 2 ** min(self.ejections, _MOST_DOUBLINGS)), now
            )
            self.ejections += 1
            self.failures = 0
            self.half_open = True

    def close_for(self, seconds: float, now: float) -> None:
        """Send nothing for a while."""
        self.closed_until = max(self.closed_until, now + seconds)

    def lost(self, reason: str) -> list[int]:
        """The engine is gone; returns the calls that went with it."""
        calls = list(self.in_flight)
        self.up = False
        self.last_error = reason
        self.in_flight.clear()
        self._sharers.clear()
        self._occupancy.clear()
        self.reserved = 0
        return calls
