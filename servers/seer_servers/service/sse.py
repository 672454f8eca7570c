"""Server-sent events: `data:` lines, an error as one of them, and `[DONE]`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
from aiohttp import web

from seer_servers.service.explain import explained

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

_HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}


async def stream(request: web.Request, events: AsyncIterator[Any]) -> web.StreamResponse:
    """Send `events` as they come. An error before the first one is a plain answer, a later one an event."""
    response = web.StreamResponse(headers=_HEADERS)
    try:
        async for event in events:
            await _send(request, response, msgspec.json.encode(event))
    except ConnectionError:
        raise
    except Exception as error:
        if not response.prepared:
            raise
        await _send(request, response, explained(error).body)
    finally:
        await events.aclose()  # type: ignore[attr-defined]  # a generator; what it holds open must not wait for the collector
    await _send(request, response, b"[DONE]")
    await response.write_eof()
    return response


async def _send(request: web.Request, response: web.StreamResponse, data: bytes) -> None:
    if not response.prepared:
        await response.prepare(request)
    await response.write(b"data: " + data + b"\n\n")
