"""Whether the service works, and its figures for Prometheus: those of the fleet, and the engines' own."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from aiohttp import web

from seer_async.errors import EngineError
from seer_servers.service.errors import ApiError
from seer_servers.service.exposition import Exposition
from seer_servers.service.part import Route

if TYPE_CHECKING:
    from collections.abc import Sequence

    from seer_async.service import Service

_SCRAPE_S = 5.0


class Health:
    """The part."""

    def __init__(self, service: Service) -> None:
        self._service = service

    @property
    def routes(self) -> Sequence[Route]:
        """All of them open: whoever watches needs no key."""
        return [
            Route(method="GET", path="/health", handler=self._health, summary="200 if an engine is up", open=True),
            Route(method="GET", path="/ping", handler=self._health, summary="As /health", open=True),
            Route(method="POST", path="/ping", handler=self._health, summary="As /health", open=True),
            Route(
                method="GET", path="/metrics", handler=self._metrics, summary="Figures in Prometheus text", open=True
            ),
        ]

    async def start(self) -> None:
        """Nothing runs in the background."""

    async def stop(self) -> None:
        """Nothing runs in the background."""

    async def _health(self, _: web.Request) -> web.Response:
        if not any(instance.up for instance in self._service.core.instances.values()):
            raise ApiError(503, "no engine is up")
        return web.Response()

    async def _metrics(self, _: web.Request) -> web.Response:
        page = Exposition()
        self._fleet(page)
        names = list(self._service.core.instances)
        for name, said in zip(names, await asyncio.gather(*map(self._scrape, names)), strict=True):
            page.merge(said, engine=name)
        return web.Response(text=str(page), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def _scrape(self, name: str) -> str:
        """An engine's own page; empty if it does not answer."""
        try:
            answer = await self._service.client(name).ask("GET", "/metrics", timeout_s=_SCRAPE_S)
        except (EngineError, KeyError):  # KeyError: it was taken out of the fleet
            return ""
        return answer.body.decode(errors="replace") if answer.status == 200 else ""  # noqa: PLR2004 - HTTP

    def _fleet(self, page: Exposition) -> None:
        core, snapshot = self._service.core, self._service.snapshot()
        gauges = {
            "seer_requests_open": (core.buffer.open, "Responses that have not ended"),
            "seer_calls_in_flight": (len(core.calls), "Chunks that engines work on"),
            "seer_groups_open": (len(core.buffer.groups), "Groups with a response that has not ended"),
            "seer_paused": (int(core.paused), "1 while nothing is sent to engines"),
        }
        counters = {
            "seer_requests_done_total": (snapshot.done, "Responses that ended well"),
            "seer_requests_failed_total": (snapshot.failed, "Responses that ended with an error"),
            "seer_migrations_total": (snapshot.migrations, "Chunks on another engine than the one before"),
            "seer_retries_total": (snapshot.retries, "Calls that failed"),
            "seer_restarts_total": (snapshot.restarts, "Responses begun again under other weights"),
            "seer_process_cpu_seconds_total": (time.process_time(), "CPU time of the service itself"),
            "seer_pooled_tokens_total": (core.responses.pooled, "Tokens of prefixes that came from a KV pool"),
        }
        for kind, figures in (("gauge", gauges), ("counter", counters)):
            for name, (value, words) in figures.items():
                page.add(name, value, kind=kind, words=words)
        for name, instance in core.instances.items():
            words = "Tokens accepted from an engine"
            page.add("seer_tokens_total", instance.generated, kind="counter", words=words, engine=name)
            page.add("seer_engine_up", int(instance.up), kind="gauge", words="1 if the engine is used", engine=name)
