"""Rollouts as jobs: a client hands in prompts, goes away, and reads the samples when and as often as it likes."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated, Any
from weakref import WeakValueDictionary

import msgspec
from aiohttp import web

from seer_async.api import LOST, GroupSamples, RolloutList, RolloutRequest, RolloutStatus
from seer_async.errors import DatasetError
from seer_async.types import Sample
from seer_servers.service.errors import ApiError, bad_request
from seer_servers.service.jobbody import asked
from seer_servers.service.jobfeed import Feed
from seer_servers.service.jobspool import JobInfo
from seer_servers.service.jobstatus import status_of
from seer_servers.service.jobstore import Store
from seer_servers.service.jobstream import By, End, Wanted, stream, wanted
from seer_servers.service.part import EVENTS, NDJSON, Route

if TYPE_CHECKING:
    from collections.abc import Sequence

    from seer_async.service import Service
    from seer_servers.service.jobbody import Asked
    from seer_servers.service.jobspool import Spool

_Count = Annotated[int, msgspec.Meta(ge=0)]
_KEY = "Idempotency-Key"
_LONGEST_KEY = 256
_FULL_RETRY_S = 5.0
_EXPIRE_S = 60.0


class Jobs:
    """The part."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._config = service.config.jobs
        self._store = Store(self._config, service.run_id)
        self._feed = Feed(service, self._store)
        self._arriving: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # by idempotency key
        self._admitting = 0  # accepted, but their prompts are not tokenised yet
        self._expiry: asyncio.Task[None] | None = None

    @property
    def routes(self) -> Sequence[Route]:
        """Begin, list, look, cancel, read."""
        one = "/v1/rollouts/{id}"
        return [
            Route(
                method="POST",
                path="/v1/rollouts",
                handler=self._begin,
                summary="Begin a rollout. The body may also be a dataset (application/x-ndjson), with the options as "
                "query parameters and `sampling` there as a JSON object. With an Idempotency-Key, a repeated request "
                "begins nothing and gets the same answer",
                body=RolloutRequest,
                reply=RolloutStatus,
                status=HTTPStatus.ACCEPTED,
                streams={NDJSON: (Sample,)},
                lines={NDJSON: dict[str, Any]},
                query={"n": int, "sampling": str, "model": str, "chunk_size": int, "stream": bool},
                headers={_KEY: Annotated[str, msgspec.Meta(max_length=_LONGEST_KEY)]},
            ),
            Route(
                method="GET",
                path="/v1/rollouts",
                handler=self._list,
                summary="Every rollout, newest first",
                reply=RolloutList,
            ),
            Route(method="GET", path=one, handler=self._look, summary="A rollout now", reply=RolloutStatus),
            Route(
                method="DELETE",
                path=one,
                handler=self._cancel,
                summary="Cancel a rollout; what has finished can still be read",
                reply=RolloutStatus,
            ),
            Route(
                method="GET",
                path=f"{one}/samples",
                handler=self._samples,
                summary="Samples, or whole groups, after the first `after`, as they finish: one JSON value a line, or "
                "server-sent events for a client that accepts text/event-stream. Blank lines keep the connection alive",
                streams={NDJSON: (Sample, GroupSamples), EVENTS: (Sample, GroupSamples, End)},
                query={"after": _Count, "by": By},
                headers={"Last-Event-ID": _Count},
            ),
        ]

    async def start(self) -> None:
        """Find what earlier servers have left."""
        self._store.open()
        self._feed.start()
        self._expiry = asyncio.create_task(self._expire(), name="expiry of rollouts")

    async def stop(self) -> None:
        """Rollouts that run are lost; their samples so far can be read through the next server."""
        if self._expiry:
            self._expiry.cancel()
        await self._feed.stop(LOST, "its server was stopped before it ended; what had finished can be read")
        self._store.close()

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(min(_EXPIRE_S, max(1.0, self._config.keep_s / 2)))
            self._store.expire()

    def statuses(self) -> list[RolloutStatus]:
        """Every rollout, newest first."""
        spools = sorted(self._store.spools.values(), key=lambda spool: spool.info.created, reverse=True)
        return [self._status(spool) for spool in spools]

    def _status(self, spool: Spool) -> RolloutStatus:
        return status_of(spool, self._feed.jobs.get(spool.info.id), self._service.core)

    # Handlers

    async def _begin(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        key, digest = _digest(_key_of(request)), _digest(request.query_string, request.content_type, body)
        lock = self._arriving.setdefault(key or secrets.token_hex(), asyncio.Lock())
        async with lock:  # the same request again, while the first one is being tokenised, waits for it
            what = asked(request, body, self._service)
            spool = self._known(key, digest) or await self._admit(what, key, digest)
        if what.stream:
            return await stream(request, spool, Wanted())
        location = {"Location": f"/v1/rollouts/{spool.info.id}"}
        return _json(self._status(spool), HTTPStatus.ACCEPTED, location)

    def _known(self, key: str, digest: str) -> Spool | None:
        """The rollout that this request has begun before."""
        for spool in self._store.spools.values() if key else ():
            if spool.info.key == key:
                if spool.info.body != digest:
                    raise ApiError(409, f"this {_KEY} came with another request before; use a new one", param=_KEY)
                return spool
        return None

    async def _admit(self, what: Asked, key: str, digest: str) -> Spool:
        if len(self._feed.jobs) + self._admitting >= self._config.max_open:
            raise ApiError(
                429,
                f"{self._config.max_open} rollouts are running (jobs.max_open); come again when one has ended",
                retry_after=_FULL_RETRY_S,
            )
        self._admitting += 1
        try:
            prompts = await self._service.fleet.tokenise(what.prompts)
        except DatasetError as error:
            raise bad_request(str(error), "prompts") from error
        finally:
            self._admitting -= 1
        info = JobInfo(
            id=f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}",
            created=time.time(),
            groups=len(prompts),
            n=what.n,
            seed=what.seed,
            chunk_size=what.options.chunk_size,
            sampling=msgspec.to_builtins(what.options.sampling),
            key=key,
            body=digest,
        )
        spool = self._store.create(info, prompts)
        self._feed.add(spool, what.options)
        return spool

    async def _list(self, _: web.Request) -> web.Response:
        return _json(RolloutList(rollouts=self.statuses()))

    async def _look(self, request: web.Request) -> web.Response:
        return _json(self._status(self._spool(request)))

    async def _cancel(self, request: web.Request) -> web.Response:
        spool = self._spool(request)
        if job := self._feed.jobs.get(spool.info.id):
            self._feed.cancel(job)
        return _json(self._status(spool))

    async def _samples(self, request: web.Request) -> web.StreamResponse:
        return await stream(request, self._spool(request), wanted(request))

    def _spool(self, request: web.Request) -> Spool:
        name = request.match_info["id"]
        if spool := self._store.spools.get(name):
            return spool
        raise ApiError(404, f"there is no rollout {name!r}: it never was, or it ended too long ago", param="id")


def _key_of(request: web.Request) -> str:
    key = request.headers.get(_KEY, "")
    if len(key) > _LONGEST_KEY:
        raise bad_request(f"{_KEY} must have at most {_LONGEST_KEY} characters", _KEY)
    return key


def _digest(*parts: str | bytes) -> str:
    """Of something; nothing if that is empty."""
    if not any(parts):
        return ""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8) + data)
    return digest.hexdigest()


def _json(value: msgspec.Struct, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(value), status=status, content_type="application/json", headers=headers
    )
