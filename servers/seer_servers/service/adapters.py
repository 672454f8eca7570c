"""LoRA adapters: loaded into all engines, and into every engine that comes later before it samples anything.

Invariant: an engine that lacks an adapter which was loaded through us gets nothing; loading it is tried again until the
engine has it.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import msgspec
from aiohttp import web

from seer_servers.service.errors import bad_request
from seer_servers.service.parameters import read_body
from seer_servers.service.part import Route

if TYPE_CHECKING:
    from seer_async.service import Service
    from seer_async.types import EngineInfo
    from seer_servers.service.fanout import Fanout

LORA_S = 600.0
_POLL_S = 1.0
_LOAD, _UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
_HAS_IT, _LACKS_IT = 400, 404  # vLLM's answers to loading a name again, and to unloading one it does not know


class LoadBody(msgspec.Struct):
    """An adapter's name and where the engines find it; other fields are passed on."""

    lora_name: str
    lora_path: str


class UnloadBody(msgspec.Struct):
    """An adapter's name."""

    lora_name: str


class Adapters:
    """The adapters of the fleet."""

    def __init__(self, service: Service, fanout: Fanout) -> None:
        self._service = service
        self._fanout = fanout
        self._wanted: dict[str, bytes] = {}  # what loads each, by adapter
        self._has: dict[str, tuple[str, set[str]]] = {}  # by engine: its boot, and the adapters loaded into that

    @property
    def routes(self) -> list[Route]:
        """The routes."""
        return [
            Route(method="POST", path=_LOAD, handler=self._load, summary="Load a LoRA adapter", body=LoadBody),
            Route(method="POST", path=_UNLOAD, handler=self._unload, summary="Unload a LoRA adapter", body=UnloadBody),
        ]

    def objection(self, name: str, info: EngineInfo) -> str | None:
        """Why an engine must not sample, or None."""
        missing = self._wanted.keys() - self._loaded(name, info.boot)
        return f"LoRA adapters are being loaded into it: {', '.join(sorted(missing))}" if missing else None

    async def run(self) -> None:
        """Bring adapters to engines that lack them, again and again; ends with its task."""
        while True:
            await asyncio.sleep(_POLL_S)
            await asyncio.gather(*map(self._bring, list(self._service.fleet.clients)))

    async def _bring(self, engine: str) -> None:
        client = self._service.fleet.clients.get(engine)
        if client is None or (info := client.info) is None:
            return
        for adapter in list(self._wanted):
            if adapter in self._wanted and adapter not in self._loaded(engine, info.boot):
                outcome = await self._fanout.post(_LOAD, [engine], self._wanted[adapter], timeout_s=LORA_S)
                if outcome.ok or outcome.failed[engine].status == _HAS_IT:
                    self._loaded(engine, info.boot).add(adapter)

    def _loaded(self, engine: str, boot: str) -> set[str]:
        """The adapters that a process has."""
        known, adapters = self._has.get(engine, ("", set()))
        if known != boot:
            adapters = set()
            self._has[engine] = boot, adapters
        return adapters

    async def _load(self, request: web.Request) -> web.Response:
        adapter = (await read_body(request, LoadBody)).lora_name
        if not adapter:
            raise bad_request("lora_name is empty", "lora_name")
        body = await request.read()
        engines = await self._fanout.live()
        repeated = self._wanted.get(adapter) == body and not _in_place(body)
        outcome = await self._fanout.post(
            _LOAD, [name for name in engines if not (repeated and self._is_on(name, adapter))], body, timeout_s=LORA_S
        )
        for name in outcome.ok:
            if info := self._service.client(name).info:
                self._loaded(name, info.boot).add(adapter)
        if outcome.ok:
            self._wanted[adapter] = body
            self._service.check_engines()
        self._fanout.check(outcome, "the others have it, and the engine gets nothing before it has it too")
        return web.Response(text=f"Success: LoRA adapter '{adapter}' added successfully.")

    def _is_on(self, engine: str, adapter: str) -> bool:
        info = self._service.client(engine).info
        return info is not None and adapter in self._loaded(engine, info.boot)

    async def _unload(self, request: web.Request) -> web.Response:
        adapter = (await read_body(request, UnloadBody)).lora_name
        known = self._wanted.pop(adapter, None)
        for _, adapters in self._has.values():
            adapters.discard(adapter)
        outcome = await self._fanout.post(
            _UNLOAD, await self._fanout.live(), msgspec.json.encode({"lora_name": adapter}), timeout_s=LORA_S
        )
        if outcome.ok or known:
            lacking = [name for name, error in outcome.failed.items() if error.status == _LACKS_IT]
            for name in lacking:
                del outcome.failed[name]
        self._fanout.check(outcome, "the others have unloaded it")
        return web.Response(text=f"Success: LoRA adapter '{adapter}' removed successfully.")


def _in_place(body: bytes) -> bool:
    with contextlib.suppress(msgspec.DecodeError):
        fields: dict[str, Any] = msgspec.json.decode(body)
        return bool(fields.get("load_inplace"))
    return False
