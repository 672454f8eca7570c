"""A part of the HTTP service: routes that belong together, described once for the router and for the OpenAPI page."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

import msgspec
from aiohttp import web

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """One route. `body` and `reply` are the msgspec types of its JSON, None where there is none.

    `query` names its query parameters with their types. An `open` route needs no key.
    """

    method: str
    path: str
    handler: Handler
    summary: str
    body: Any = None
    reply: Any = None
    query: dict[str, Any] = {}
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
