"""A small application around one part or two, on a port that stays the same over its lives."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from aiohttp import web

from seer_async.config import resolve
from seer_async.service import Service
from seer_servers.service.errors import ApiError
from seer_servers.service.jobs import Jobs
from seer_servers.service.page import Page
from seer_servers.service.status import Status
from tests.live.engines import mock_engines

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
    from pathlib import Path

    from seer_servers.service.part import Part
    from tests.live.engines import MockProcess

FAST = ["--step-ms", "2", "--per-request-ms", "0.01", "--mean-length", "60"]
SLOW = ["--step-ms", "20", "--per-request-ms", "0.01", "--mean-length", "200"]
__all__ = ["FAST", "SLOW", "Served", "mock_engines", "prompts", "served"]


class Served:
    """What runs."""

    def __init__(self, url: str, service: Service, jobs: Jobs) -> None:
        self.url = url
        self.service = service
        self.jobs = jobs


@asynccontextmanager
async def served(
    engines: Sequence[MockProcess], folder: Path, *, port: int = 0, key: str = "", **tree: Any
) -> AsyncIterator[Served]:
    """The native API over `engines`, its spools in `folder`."""
    jobs_tree = {"folder": str(folder)} | tree.pop("jobs", {})
    defaults = {"engine": {"telemetry_s": 0.1}, "rollout": {"chunk_size": 16}, "sampling": {"max_tokens": 200}}
    config = resolve(defaults | tree | {"jobs": jobs_tree})
    async with Service(config, [engine.url for engine in engines]) as service:
        jobs = Jobs(service)
        parts: list[Part] = [jobs, Status(service, jobs), Page()]
        runner = web.AppRunner(_application(parts, key), handler_cancellation=True, shutdown_timeout=1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        for part in parts:
            await part.start()
        try:
            host, bound = runner.addresses[0][:2]
            yield Served(f"http://{host}:{bound}", service, jobs)
        finally:
            await runner.cleanup()
            for part in parts:
                await part.stop()


def _application(parts: Sequence[Part], key: str) -> web.Application:
    routes = [route for part in parts for route in part.routes]
    opened = {route.path for route in routes if route.open}

    @web.middleware
    async def explained(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        if key and request.path not in opened and request.headers.get("Authorization") != f"Bearer {key}":
            return ApiError(401, "no key").response()
        try:
            return await handler(request)
        except ApiError as error:
            return error.response()

    app = web.Application(middlewares=[explained], client_max_size=64 << 20)
    for route in routes:
        app.router.add_route(route.method, route.path, route.handler)
    return app


def prompts(count: int) -> list[dict[str, Any]]:
    return [{"id": f"p{number}", "prompt_token_ids": [3 + number, 5, 7, 11 + number]} for number in range(count)]
