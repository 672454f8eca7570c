"""Faults of the HTTP exchange: answers in the place of generation, and hostile ways to send an honest reply.

A takeover returns the answer, or None where generation goes on after it. The first docstring line of each is its
description for users.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import zlib
from functools import cache
from typing import TYPE_CHECKING

from aiohttp import web

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

_MIB = 2**20
_HUGE_MIB = 256  # beyond any sane limit on a reply, yet quick to send on one machine
_DRIP_SECONDS = 0.2
_SPIKE_SECONDS = 2.0


async def error_500(_request: web.Request) -> web.Response:
    """Answer 500 in vLLM's error shape."""
    return _error(500, "InternalServerError")


async def error_503(_request: web.Request) -> web.Response:
    """Answer 503 without Retry-After."""
    return _error(503, "ServiceUnavailableError")


async def too_many_requests(_request: web.Request) -> web.Response:
    """Answer 429 with Retry-After: 1."""
    response = _error(429, "TooManyRequests")
    response.headers["Retry-After"] = "1"
    return response


async def redirect(_request: web.Request) -> web.Response:
    """Answer 307 to a host that does not exist; a client that follows would send its key there."""
    return web.Response(status=307, headers={"Location": "http://elsewhere.invalid/v1/completions"})


async def hang(_request: web.Request) -> None:
    """Accept the call and never answer."""
    await asyncio.Event().wait()


async def latency_spike(_request: web.Request) -> None:
    """Begin the call two seconds late."""
    await asyncio.sleep(_SPIKE_SECONDS)


async def empty_reply(_request: web.Request) -> web.Response:
    """Answer 200 with an empty body."""
    return web.Response(content_type="application/json")


async def html_reply(_request: web.Request) -> web.Response:
    """Answer 200 with a proxy's HTML page."""
    return web.Response(text="<!doctype html><title>Welcome</title><p>It works.</p>", content_type="text/html")


async def gzip_bomb(_request: web.Request) -> web.Response:
    """Answer 200 with a small gzip body that unpacks to 256 MiB."""
    bomb = await asyncio.to_thread(_bomb)
    return web.Response(body=bomb, content_type="application/json", headers={"Content-Encoding": "gzip"})


async def truncated_json(_request: web.Request, payload: bytes) -> web.Response:
    """Half the JSON, sent as if it were all."""
    return web.Response(body=payload[: len(payload) // 2], content_type="application/json")


async def reset_mid_body(request: web.Request, payload: bytes) -> web.StreamResponse:
    """Half the body, then a TCP reset."""
    response = await _begin(request, len(payload))
    await response.write(payload[: len(payload) // 2])
    if transport := request.transport:
        raw = transport.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close means reset
        transport.abort()
    return response


async def slow_drip(request: web.Request, payload: bytes) -> web.StreamResponse:
    """The body, one byte every 0.2 s."""
    response = await _begin(request, len(payload))
    for n in range(len(payload)):
        await response.write(payload[n : n + 1])
        await asyncio.sleep(_DRIP_SECONDS)
    return response


async def huge_body(request: web.Request, payload: bytes) -> web.StreamResponse:
    """The reply, valid, with 256 MiB of white space after it."""
    response = await _begin(request, len(payload) + _HUGE_MIB * _MIB)
    await response.write(payload)
    for _ in range(_HUGE_MIB):
        await response.write(b" " * _MIB)
    return response


def _error(status: int, kind: str) -> web.Response:
    body = {"error": {"message": "Injected fault.", "type": kind, "param": None, "code": status}}
    return web.json_response(body, status=status)


async def _begin(request: web.Request, length: int) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": str(length)})
    await response.prepare(request)
    return response


@cache
def _bomb() -> bytes:
    compress = zlib.compressobj(level=1, wbits=31)  # fast, and gzip's framing
    return b"".join([*(compress.compress(b" " * _MIB) for _ in range(_HUGE_MIB)), compress.flush()])


TAKEOVERS: tuple[Callable[[web.Request], Awaitable[web.StreamResponse | None]], ...] = (
    error_500,
    error_503,
    too_many_requests,
    redirect,
    hang,
    latency_spike,
    empty_reply,
    html_reply,
    gzip_bomb,
)

DELIVERIES: tuple[Callable[[web.Request, bytes], Awaitable[web.StreamResponse]], ...] = (
    truncated_json,
    reset_mid_body,
    slow_drip,
    huge_body,
)
