"""Pauses behind our back: engines that somebody else has paused get nothing until they go on.

vLLM calls a sleeping engine paused too, so one question finds both. Engines without these routes (no development mode)
cannot be paused by anyone, and are passed over.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from seer_async.service import Service
    from seer_servers.service.fanout import Fanout

POLL_S = 1.0


class Paused(msgspec.Struct):
    """vLLM's answer to GET /is_paused."""

    is_paused: bool


class Watch:
    """Asks the engines while anything is open."""

    def __init__(self, service: Service, fanout: Fanout) -> None:
        self._service = service
        self._fanout = fanout
        self._lock = asyncio.Lock()  # an answer from before a resume must not be taken in after it

    async def run(self) -> None:
        """Look again and again; ends with its task."""
        while True:
            await asyncio.sleep(POLL_S)
            if self._service.core.buffer.open:
                await self.look()

    async def look(self) -> None:
        """Take in which engines are paused now; engines that do not answer stay as they are."""
        async with self._lock:
            instances = self._service.core.instances
            outcome = await self._fanout.get("/is_paused", [name for name, each in instances.items() if each.up])
            for name, said in outcome.decoded(Paused).items():
                if name in instances:
                    self._service.hold_engine(name, held=said.is_paused)
