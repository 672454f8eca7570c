"""What the engines say of their workers, weights and processes."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import msgspec
from aiohttp import web

from seer_async.errors import EngineError
from seer_servers.service.errors import ApiError
from seer_servers.service.fanout import ASK_S
from seer_servers.service.part import Route

if TYPE_CHECKING:
    from collections.abc import Iterable

    from seer_async.service import Service
    from seer_servers.service.fanout import Fanout


class WorldSize(msgspec.Struct):
    """How many workers there are."""

    world_size: int


class WeightInfo(msgspec.Struct):
    """What weights are called."""

    weight_version: str


class Facts:
    """Questions to all engines."""

    def __init__(self, service: Service, fanout: Fanout) -> None:
        self._service = service
        self._fanout = fanout

    @property
    def routes(self) -> list[Route]:
        """The routes."""
        return [
            Route(
                method="GET",
                path="/get_world_size",
                handler=self._get_world_size,
                summary="Workers of all engines together",
                query={"include_dp": bool},
                reply=WorldSize,
            ),
            Route(
                method="GET",
                path="/weight_info",
                handler=self._weight_info,
                summary="The weights that are sampled from",
                reply=WeightInfo,
            ),
        ]

    async def sizes(self, engines: Iterable[str], query: str = "") -> dict[str, int]:
        """Workers of each of these engines; raises ApiError if one does not say."""
        outcome = await self._fanout.get(f"/get_world_size{query}", engines)
        sizes = outcome.decoded(WorldSize)
        self._fanout.check(outcome, "without it the fleet's size is unknown")
        return {name: said.world_size for name, said in sizes.items()}

    async def boots(self, engines: Iterable[str]) -> dict[str, str]:
        """Identities of the processes behind engines; those that do not answer are left out."""

        async def boot(name: str) -> tuple[str, str | None]:
            with contextlib.suppress(EngineError, KeyError):
                return name, (await self._service.client(name).stats(timeout_s=ASK_S)).boot
            return name, None

        return {name: found for name, found in await asyncio.gather(*map(boot, engines)) if found is not None}

    async def _get_world_size(self, request: web.Request) -> web.Response:
        query = f"?{request.query_string}" if request.query_string else ""
        return web.json_response({"world_size": sum((await self.sizes(await self._fanout.live(), query)).values())})

    async def _weight_info(self, _request: web.Request) -> web.Response:
        """What is sampled from is always one version; engines that have another one are named beside it."""
        outcome = await self._fanout.get("/weight_info", await self._fanout.live())
        if not self._service.has_weights:
            raise ApiError(409, "no engine has weights since the fleet slept at level 2: update them first")
        has = {name: said.weight_version for name, said in outcome.decoded(WeightInfo).items()}
        if not has:
            self._fanout.check(outcome, "")
        agreed = set(has.values())
        current = next(iter(agreed)) if len(agreed) == 1 else self._service.core.versions.current
        others = {self._fanout.title(name): version for name, version in has.items() if version != current}
        if len(others) == len(has):
            said = ", ".join(f"{name} has {version}" for name, version in others.items())
            raise ApiError(409, f"no engine has weight version {current}, which is sampled from: {said}")
        return web.json_response({"weight_version": current} | ({"others": others} if others else {}))
