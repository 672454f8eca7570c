"""Resetting caches, and calling a method of every worker."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from aiohttp import web

from seer_servers.service.parameters import read_body
from seer_servers.service.part import Route

if TYPE_CHECKING:
    from seer_servers.service.fanout import Fanout

RESET_S = 60.0
RPC_S = 600.0
_RPC_MARGIN_S = 5.0


class RpcBody(msgspec.Struct):
    """A method of vLLM's workers and its arguments; `timeout` in seconds."""

    method: str
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    timeout: Annotated[float, msgspec.Meta(gt=0)] | None = None


class RpcResults(msgspec.Struct):
    """One result for each worker, engine after engine."""

    results: list[Any]


class Reset(msgspec.Struct):
    """Whether the caches of all engines are empty."""

    success: bool


class Caches:
    """Routes that do the same on every engine."""

    def __init__(self, fanout: Fanout) -> None:
        self._fanout = fanout

    @property
    def routes(self) -> list[Route]:
        """The routes."""
        return [
            Route(
                method="POST",
                path="/reset_prefix_cache",
                handler=self._reset_prefix_cache,
                summary="Reset the prefix caches",
                query={"reset_running_requests": bool, "reset_external": bool},
                reply=Reset,
            ),
            Route(method="POST", path="/reset_mm_cache", handler=self._reset, summary="Reset the multi-modal caches"),
            Route(method="POST", path="/reset_encoder_cache", handler=self._reset, summary="Reset the encoder caches"),
            Route(
                method="POST",
                path="/collective_rpc",
                handler=self._collective_rpc,
                summary="Call a method of all workers",
                body=RpcBody,
                reply=RpcResults,
            ),
        ]

    async def _reset_prefix_cache(self, request: web.Request) -> web.Response:
        outcome = await self._fanout.post(request.path_qs, await self._fanout.live(), timeout_s=RESET_S)
        said = outcome.decoded(Reset)
        self._fanout.check(outcome, "the others have reset theirs")
        return web.json_response({"success": all(each.success for each in said.values())})

    async def _reset(self, request: web.Request) -> web.Response:
        outcome = await self._fanout.post(request.path, await self._fanout.live(), timeout_s=RESET_S)
        self._fanout.check(outcome, "the others have reset theirs")
        return web.Response()

    async def _collective_rpc(self, request: web.Request) -> web.Response:
        body = await read_body(request, RpcBody)
        timeout_s = RPC_S if body.timeout is None else body.timeout + _RPC_MARGIN_S
        raw = await request.read()
        outcome = await self._fanout.post(request.path, await self._fanout.live(), raw, timeout_s=timeout_s)
        if not any(outcome.ok.values()) and not outcome.failed:
            return web.Response()  # a method without results
        said = outcome.decoded(RpcResults)
        self._fanout.check(outcome, "the others have done it", repeatable=False)
        return web.json_response({"results": [result for each in said.values() for result in each.results]})
