"""The control plane: to a trainer the fleet is one vLLM server in development mode.

Invariant: a call that was begun runs to its end even if its client hangs up, so engines are never left half told.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import msgspec

from seer_servers.service.adapters import Adapters
from seer_servers.service.caches import Caches
from seer_servers.service.facts import Facts
from seer_servers.service.fanout import Fanout
from seer_servers.service.holders import Holders
from seer_servers.service.pausing import Pausing
from seer_servers.service.watch import Watch
from seer_servers.service.weights import Weights
from seer_servers.service.workers import Workers

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from aiohttp import web

    from seer_async.service import Service
    from seer_async.types import EngineInfo
    from seer_servers.service.part import Handler, Route


class Control:
    """A part of the application.

    `abort` ends requests by the ids that clients know, within some seconds, and returns how many; without it, ids are
    the service's own.
    """

    def __init__(
        self, service: Service, *, abort: Callable[[Sequence[str], float], Awaitable[int]] | None = None
    ) -> None:
        fanout = Fanout(service)
        self._service = service
        self._watch = Watch(service, fanout)
        pausing = Pausing(service, fanout, self._watch, abort=abort or service.abort)
        self._adapters = Adapters(service, fanout, pausing)
        self._holders = Holders(service)
        facts = Facts(service, fanout)
        weights = Weights(service, fanout, facts, pausing, self._holders)
        pausing.updating = lambda: weights.updating
        pausing.lost = self._adapters.forget
        workers = Workers(service, fanout, self._watch, updating=pausing.updating)
        nouns = (pausing, facts, weights, self._adapters, Caches(fanout), workers)
        self._routes = [self._to_the_end(route) for noun in nouns for route in noun.routes]
        self._tasks: set[asyncio.Task[None]] = set()
        self._calls: set[asyncio.Task[web.StreamResponse]] = set()

    @property
    def routes(self) -> Sequence[Route]:
        """The part's routes."""
        return self._routes

    async def start(self) -> None:
        """Begin to watch the engines."""
        self._service.gate = self._objection
        self._tasks = {asyncio.create_task(self._watch.run()), asyncio.create_task(self._adapters.run())}

    async def stop(self) -> None:
        """End it; never raises."""
        tasks = [*self._tasks, *self._calls]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _objection(self, name: str, info: EngineInfo) -> str | None:
        return self._holders.objection(name, info) or self._adapters.objection(name, info)

    def _to_the_end(self, route: Route) -> Route:
        async def handler(request: web.Request) -> web.StreamResponse:
            await request.read()
            call = asyncio.ensure_future(inner(request))
            self._calls.add(call)
            call.add_done_callback(self._ended)
            return await asyncio.shield(call)

        inner: Handler = route.handler
        return msgspec.structs.replace(route, handler=handler)

    def _ended(self, call: asyncio.Task[web.StreamResponse]) -> None:
        self._calls.discard(call)
        if not call.cancelled():
            call.exception()  # seen, whether or not somebody still waits for it
