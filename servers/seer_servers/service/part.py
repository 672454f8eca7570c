"""A part of the HTTP service: routes that belong together, described once for the router and for the OpenAPI page."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

import msgspec
from aiohttp import web

NDJSON, EVENTS = "application/x-ndjson", "text/event-stream"
"""Media types of answers that come in pieces."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """One route. `body` and `reply` are the msgspec types of its JSON, None where there is none.

    `status` is that of `reply`. An answer may also be a stream: `streams` has the types that one piece of it may have
    (a line of NDJSON, an event's data) by media type; `lines` likewise the type of a line of a body that is not JSON.
    `query` and `headers` name the request's parameters with their types. An `open` route needs no key.
    """

    method: str
    path: str
    handler: Handler
    summary: str
    body: Any = None
    reply: Any = None
    status: int = 200
    streams: dict[str, tuple[Any, ...]] = {}
    lines: dict[str, Any] = {}
    query: dict[str, Any] = {}
    headers: dict[str, Any] = {}
    open: bool = False


class Part(Protocol):
    """What the application is made of."""

    @property
    def routes(self) -> Sequence[Route]:
        """The part's routes."""

    async def start(self) -> None:
        """Begin what runs in the background; the service is ready."""

    async def stop(self) -> None:
        """End it; never raises."""
