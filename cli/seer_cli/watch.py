"""What engines do while a run lasts, seen from outside: their telemetry, read twice a second."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Self

from seer_async.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from seer_async.engine import EngineClient
    from seer_async.types import EngineStats

PERIOD_S = 0.5
SETTLE_S = 1.0  # engines count with a little delay
TIMEOUT_S = 30.0
RATE_WINDOW_S = 5.0

Reading = tuple[float, dict[str, "EngineStats"]]  # Unix seconds, and every engine's telemetry


class Watch:
    """An `async with` block around a run; what it has seen is complete after the block."""

    def __init__(self, clients: Mapping[str, EngineClient]) -> None:
        self._clients = clients
        self._readings: list[Reading] = []

    async def __aenter__(self) -> Self:
        await self._read()
        self._task = asyncio.create_task(self._go_on())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        await asyncio.sleep(SETTLE_S)
        await self._read()

    async def _go_on(self) -> None:
        while True:
            await asyncio.sleep(PERIOD_S)
            with contextlib.suppress(EngineError):  # a reading that is missing is none
                await self._read()

    async def _read(self) -> None:
        stats = {name: await client.stats(timeout_s=TIMEOUT_S) for name, client in self._clients.items()}
        self._readings.append((time.time(), stats))

    def grown(self, counter: str) -> int:
        """By how much a counter of all engines grew in the block."""
        first, last = self._readings[0][1], self._readings[-1][1]
        return sum(getattr(last[name], counter) - getattr(first[name], counter) for name in self._clients)

    def recomputed(self) -> int | None:
        """Tokens that preempted requests computed again in the block; None if engines preempted and do not say."""
        if any(stats.recomputed_tokens is None for stats in self._readings[-1][1].values()):
            return None if self.grown("preemptions") else 0
        return self.grown("recomputed_tokens")

    def drafted(self) -> tuple[int, int]:
        """How many steps verified a draft in the block, and how many draft tokens they accepted."""
        readings = (self._readings[0][1], self._readings[-1][1])
        ends = [[stats.drafts for stats in reading.values() if stats.drafts] for reading in readings]
        verified, accepted = ([sum(getattr(d, name) for d in end) for end in ends] for name in ("verified", "accepted"))
        return verified[1] - verified[0], accepted[1] - accepted[0]

    def idle(self, start: float, end: float) -> dict[str, float]:
        """The share of the time from `start` to `end`, Unix seconds, in which an engine ran nothing, by engine."""
        inside = [stats for at, stats in self._readings if start <= at <= end]
        return {
            name: sum(not stats[name].running for stats in inside) / len(inside) if inside else 0.0
            for name in self._clients
        }

    def peak_rate(self) -> float:
        """The most tokens a second that all engines generated together in five seconds."""
        totals = [(at, sum(s.generated_tokens for s in stats.values())) for at, stats in self._readings]
        rates, first = [0.0], 0
        for at, total in totals:
            while first + 1 < len(totals) and at - totals[first + 1][0] >= RATE_WINDOW_S:
                first += 1
            then, before = totals[first]
            if at - then >= RATE_WINDOW_S:
                rates.append((total - before) / (at - then))
        return max(rates)
