"""A rollout's samples or whole groups as they finish: NDJSON, or server-sent events that resume by themselves.

Invariants: item k of a stream that began after N is item N + k of the rollout, whoever reads it and how often; a slow
reader makes nobody else wait, and nothing is kept for it in memory; while nothing happens, blank lines (NDJSON) or
comments (events) keep the connection alive.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Literal

import msgspec
from aiohttp import web

from seer_servers.service.errors import bad_request
from seer_servers.service.part import EVENTS, NDJSON

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from seer_servers.service.jobspool import Reader, Spool

_QUIET_S = 10.0
_LONGEST_NUMBER = 18  # digits


By = Literal["sample", "group"]
"""What one item is."""


class End(msgspec.Struct, frozen=True, kw_only=True):
    """The data of the last event, `end`: how the rollout ended."""

    status: str
    error: str


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What to stream: items after the first `after`, as samples or groups."""

    after: int = 0
    by: By = "sample"
    events: bool = False


def wanted(request: web.Request) -> Wanted:
    """Read a request; Last-Event-ID, which browsers send when they come back, goes before `after`."""
    events = EVENTS in request.headers.get("Accept", "")
    last = request.headers.get("Last-Event-ID") if events else None
    by = request.query.get("by", "sample")
    if by not in {"sample", "group"}:
        raise bad_request("by must be sample or group", "by")
    after = request.query.get("after", "0") if last is None else last
    if not (after.isascii() and after.isdigit() and len(after) <= _LONGEST_NUMBER):
        raise bad_request("after must be the number of items that you have, from 0", "after")
    return Wanted(after=int(after), by="group" if by == "group" else "sample", events=events)


async def stream(request: web.Request, spool: Spool, what: Wanted) -> web.StreamResponse:
    """Send what there is and what comes, until the rollout ends."""
    kind = EVENTS if what.events else NDJSON
    response = web.StreamResponse(
        headers={
            "Content-Type": f"{kind}; charset=utf-8",
            "Cache-Control": "no-store",
            "X-Accel-Buffering": "no",
            "X-Seer-Rollout": spool.info.id,
        }
    )
    with spool.reader() as reader:
        await response.prepare(request)
        number = what.after
        async for item in _items(spool, reader, what):
            if item:
                number += 1
            await response.write(_framed(item, number, events=what.events))
    if what.events:
        end = End(status=spool.info.status, error=spool.info.error)
        await response.write(b"event: end\ndata: %b\n\n" % msgspec.json.encode(end))
    await response.write_eof()
    return response


def _framed(item: bytes, number: int, *, events: bool) -> bytes:
    if not events:
        return item + b"\n"
    return b"id: %d\ndata: %b\n\n" % (number, item) if item else b":\n\n"


async def _items(spool: Spool, reader: Reader, what: Wanted) -> AsyncIterator[bytes]:
    """The items, and empty ones while nothing happens."""
    number = what.after
    while True:
        running = spool.running  # before looking: what came with the end must be seen
        while number < (spool.whole_groups if what.by == "group" else spool.count):
            yield reader.group(number) if what.by == "group" else reader.sample(number)
            number += 1
        if not running:
            return
        try:
            async with asyncio.timeout(_QUIET_S):
                await spool.news()
        except TimeoutError:
            yield b""
