"""The mock engine's control routes beyond pausing: weight transfer, sleep, LoRA, resets, as vLLM answers them.

Invariants: the steps of a weight update are refused out of order, as vLLM's workers refuse them; a sleeping engine is
paused; every call is noted with its body and the time it took (`GET /mock/calls`), which is what tests look at, and
`POST /mock/refuse` makes the next ones to a path fail. No tensor moves: new weights are a new version, and `"seconds"`
in an update's info is how long the transfer takes.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import msgspec
from aiohttp import web

from seer_servers.mock.engine import MockEngine, PauseMode
from seer_servers.mock.wire import ApiError, bad_request, decode

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_LEVELS = ("0", "1", "2")


class _Init(msgspec.Struct):
    init_info: dict[str, Any]


class _Update(msgspec.Struct):
    update_info: dict[str, Any] | list[dict[str, Any]]


class _Finish(msgspec.Struct):
    weight_version: str | None = None


class _Rpc(msgspec.Struct):
    method: str
    args: list[Any] = []
    kwargs: dict[str, Any] = {}


class _Lora(msgspec.Struct):
    lora_name: str
    lora_path: str = ""
    load_inplace: bool = False


class _Refuse(msgspec.Struct):
    path: str
    times: int = 1


class MockControl:
    """The control state of one engine."""

    def __init__(self, engine: MockEngine) -> None:
        self._engine = engine
        self._calls: list[dict[str, Any]] = []
        self._refused = Counter[str]()  # calls to be refused, by path
        self._group: dict[str, Any] | None = None  # the init info of the transfer group
        self._updating = False
        self._asleep: set[str] = set()  # what is not in memory

    def routes(self) -> list[web.RouteDef]:
        """The routes, for the server's table."""
        handlers: dict[str, Handler] = {
            "/init_weight_transfer_engine": self._init,
            "/start_weight_update": self._start,
            "/update_weights": self._update,
            "/finish_weight_update": self._finish,
            "/sleep": self._sleep,
            "/wake_up": self._wake_up,
            "/reset_prefix_cache": self._reset_prefix_cache,
            "/reset_mm_cache": self._reset,
            "/reset_encoder_cache": self._reset,
            "/collective_rpc": self._collective_rpc,
            "/v1/load_lora_adapter": self._load,
            "/v1/unload_lora_adapter": self._unload,
        }
        return [
            *(web.post(path, self.noted(handler)) for path, handler in handlers.items()),
            web.get("/get_world_size", self._world_size),
            web.get("/is_sleeping", self._is_sleeping),
            web.get("/mock/calls", self._get_calls),
            web.post("/mock/refuse", self._refuse),
        ]

    def cards(self) -> list[dict[str, Any]]:
        """The adapters as /v1/models lists them."""
        base = self._engine.config.name
        return [
            {"id": name, "object": "model", "created": 0, "owned_by": "vllm", "root": path, "parent": base}
            for name, path in self._engine.adapters.items()
        ]

    def noted(self, handler: Handler) -> Handler:
        """The handler, with its calls kept for `GET /mock/calls`, and refused where `POST /mock/refuse` wants that."""

        async def note(request: web.Request) -> web.StreamResponse:
            body = await request.read()
            call = {"path": request.path_qs, "body": body.decode(errors="replace"), "begun": time.time(), "ended": None}
            self._calls.append(call)
            try:
                if self._refused[request.path] > 0:
                    self._refused[request.path] -= 1
                    raise _failure("It was asked to refuse this.")
                return await handler(request)
            finally:
                call["ended"] = time.time()

        return note

    # Weights

    async def _world_size(self, request: web.Request) -> web.Response:
        del request  # without data parallelism, include_dp changes nothing
        return web.json_response({"world_size": self._engine.config.world_size})

    async def _init(self, request: web.Request) -> web.Response:
        self._group = decode(await request.read(), _Init).init_info
        return web.json_response({"message": "Weight transfer initialized"})

    async def _start(self, _request: web.Request) -> web.Response:
        if self._updating:
            raise _failure("start_weight_update called while a weight update is already active.")
        self._updating = True
        return web.json_response({"message": "Weight update started"})

    async def _update(self, request: web.Request) -> web.Response:
        info = decode(await request.read(), _Update).update_info
        if not self._updating:
            raise _failure("start_weight_update must be called before update_weights.")
        mine = info[0] if isinstance(info, list) else info
        await asyncio.sleep(mine.get("seconds", 0))
        if mine.get("fail"):
            self._updating = False
            raise _failure(str(mine["fail"]))
        return web.json_response({"message": "Weights updated"})

    async def _finish(self, request: web.Request) -> web.Response:
        body = decode(await request.read() or b"{}", _Finish)
        if not self._updating:
            raise _failure("start_weight_update must be called before finish_weight_update.")
        self._updating = False
        if body.weight_version is not None:
            self._engine.load_version(body.weight_version)
        return web.json_response({"message": "Weight update finished"})

    # Sleep

    async def _sleep(self, request: web.Request) -> web.Response:
        given, mode = request.query.get("level", "1"), request.query.get("mode", "abort")
        if given not in _LEVELS or mode not in set(PauseMode):
            raise bad_request("level is 0 to 2, mode one of abort, wait, keep")
        level = int(given)
        await self._engine.pause(PauseMode(mode), clear_cache=level > 0)
        self._asleep = {"weights", "kv_cache"} if level else set()
        return web.json_response({"status": "sleeping", "level": level})

    async def _wake_up(self, request: web.Request) -> web.Response:
        tags = request.query.getall("tags", [])
        self._asleep -= set(tags or self._asleep)
        if not self._asleep:
            self._engine.resume()
        return web.json_response({"status": "sleeping" if self._asleep else "awake", "tags": tags or None})

    async def _is_sleeping(self, _request: web.Request) -> web.Response:
        return web.json_response({"is_sleeping": self._engine.paused or bool(self._asleep)})

    # Caches, workers, adapters

    async def _reset_prefix_cache(self, _request: web.Request) -> web.Response:
        idle = not self._engine.running
        if idle:
            self._engine.cache.clear()
        return web.json_response({"success": idle})

    async def _reset(self, _request: web.Request) -> web.Response:
        return web.Response()

    async def _collective_rpc(self, request: web.Request) -> web.Response:
        body = decode(await request.read(), _Rpc)
        return web.json_response({"results": [body.method] * self._engine.config.world_size})

    async def _load(self, request: web.Request) -> web.Response:
        body = decode(await request.read(), _Lora)
        if not body.lora_name or not body.lora_path:
            raise bad_request("Both 'lora_name' and 'lora_path' must be provided.")
        if body.lora_name in self._engine.adapters and not body.load_inplace:
            raise bad_request(f"The lora adapter '{body.lora_name}' has already been loaded.")
        self._engine.adapters[body.lora_name] = body.lora_path
        return web.Response(text=f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    async def _unload(self, request: web.Request) -> web.Response:
        body = decode(await request.read(), _Lora)
        if body.lora_name not in self._engine.adapters:
            raise ApiError(404, "NotFoundError", f"The lora adapter '{body.lora_name}' cannot be found.")
        del self._engine.adapters[body.lora_name]
        return web.Response(text=f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    async def _refuse(self, request: web.Request) -> web.Response:
        body = decode(await request.read(), _Refuse)
        self._refused[body.path] = body.times
        return web.json_response({})

    async def _get_calls(self, _request: web.Request) -> web.Response:
        return web.json_response({"calls": self._calls, "group": self._group})


def _failure(message: str) -> ApiError:
    """What vLLM answers when its workers raise."""
    return ApiError(500, "InternalServerError", message)
