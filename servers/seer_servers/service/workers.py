"""The fleet as users see and change it: /workers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from aiohttp import web

from seer_async.address import canonical
from seer_async.errors import EngineError, UsageError
from seer_servers.service.errors import ApiError, bad_request
from seer_servers.service.parameters import read_body
from seer_servers.service.part import Route

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from seer_async.service import Service
    from seer_servers.service.fanout import Fanout
    from seer_servers.service.watch import Watch


class Worker(msgspec.Struct, kw_only=True):
    """One engine. `state` is UP, PAUSED, STALE (it lacks the current weights or adapters) or DOWN; `reason` says why.

    `epoch` counts the lives of its process; `in_flight` chunks are being sampled, `generated` tokens came from it.
    """

    name: str
    url: str
    state: str
    reason: str
    epoch: int
    weight_version: str
    in_flight: int
    generated: int


class Fleet(msgspec.Struct, kw_only=True):
    """All engines, and what holds for them together; `paused` is the mode of the pause, None while running."""

    workers: list[Worker]
    weight_version: str | None
    paused: str | None
    updating: bool


class AddBody(msgspec.Struct):
    """Where a vLLM server is."""

    url: str


class Workers:
    """The routes under /workers."""

    def __init__(self, service: Service, fanout: Fanout, watch: Watch, *, updating: Callable[[], bool]) -> None:
        self._service = service
        self._fanout = fanout
        self._watch = watch
        self._updating = updating

    @property
    def routes(self) -> list[Route]:
        """The routes."""
        one = "/workers/{name}"
        return [
            Route(method="GET", path="/workers", handler=self._list, summary="The engines", reply=Fleet),
            Route(
                method="POST",
                path="/workers",
                handler=self._add,
                summary="Add an engine",
                body=AddBody,
                reply=Worker,
            ),
            Route(
                method="DELETE",
                path="/workers",
                handler=self._remove,
                summary="Remove an engine by its URL",
                query={"url": str},
                reply=Worker,
            ),
            Route(method="GET", path=one, handler=self._get, summary="One engine", reply=Worker),
            Route(method="DELETE", path=one, handler=self._remove, summary="Remove an engine", reply=Worker),
        ]

    async def _list(self, _request: web.Request) -> web.Response:
        live = await self._live()
        return _answer(
            Fleet(
                workers=[self._view(name, live) for name in self._service.fleet.clients],
                weight_version=self._service.core.versions.current,
                paused=self._service.paused,
                updating=self._updating(),
            )
        )

    async def _get(self, request: web.Request) -> web.Response:
        return _answer(self._view(self._named(request), await self._live()))

    async def _add(self, request: web.Request) -> web.Response:
        url = (await read_body(request, AddBody)).url.rstrip("/")
        try:
            canonical(url)
        except UsageError as error:
            raise bad_request(str(error), "url") from None
        name = self._at(url)
        if name is None:
            await self._check(url)
            name = self._at(url) or self._service.add_engine(url)  # somebody may have been faster
        return _answer(self._view(name, await self._live()))

    async def _check(self, url: str) -> None:
        try:
            info = await self._service.fleet.look_at(url)
        except EngineError as error:
            raise ApiError(400, f"{url} is no vLLM server that works: {error}", param="url") from None
        if info.model != self._service.info.model:
            raise ApiError(
                400,
                f"{url} serves {info.model!r}, the fleet {self._service.info.model!r}: it needs one model",
                param="url",
            )
        if twin := self._service.fleet.twin("", info):
            raise ApiError(400, f"{url} is the same server as {twin}, which is in the fleet", param="url")

    async def _remove(self, request: web.Request) -> web.Response:
        name = self._named(request)
        view = self._view(name, {name})
        self._service.remove_engine(name)
        return _answer(view)

    def _named(self, request: web.Request) -> str:
        given = request.match_info.get("name") or request.query.get("url", "")
        name = given if given in self._service.fleet.clients else self._at(given.rstrip("/"))  # routers take URLs
        if name is None:
            raise ApiError(404, f"no such engine; there are {', '.join(self._service.fleet.clients)}")
        return name

    def _at(self, url: str) -> str | None:
        try:
            here = canonical(url)
        except UsageError:
            return None
        return next(
            (name for name, client in self._service.fleet.clients.items() if canonical(client.url) == here), None
        )

    async def _live(self) -> Collection[str]:
        await self._watch.look()
        try:
            return await self._fanout.live()
        except ApiError:
            return ()

    def _view(self, name: str, live: Collection[str]) -> Worker:
        instance, client = self._service.core.instances[name], self._service.client(name)
        state, reason = self._state(name, live)
        version = instance.version if instance.up or client.info is None else client.info.weight_version
        return Worker(
            name=name,
            url=client.url,
            state=state,
            reason=reason,
            epoch=instance.epoch,
            weight_version=version,
            in_flight=len(instance.in_flight),
            generated=instance.generated,
        )

    def _state(self, name: str, live: Collection[str]) -> tuple[str, str]:
        service = self._service
        instance, info = service.core.instances[name], service.client(name).info
        if name not in live:
            return "DOWN", instance.last_error or "it does not answer"
        if info is not None and (objection := service.objection(name, info)):
            return "STALE", objection
        if not instance.up:
            return "DOWN", "it answers, and is about to be tried"
        if instance.version != service.core.versions.current:
            return "STALE", f"it has weight version {instance.version}, the fleet {service.core.versions.current}"
        if service.paused or instance.held:
            return "PAUSED", "" if service.paused else "somebody has paused the engine itself"
        return "UP", ""


def _answer(body: msgspec.Struct) -> web.Response:
    return web.Response(body=msgspec.json.encode(body), content_type="application/json")
