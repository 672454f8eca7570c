"""LoRA adapters: loaded into all engines, and into every engine that comes later before it samples anything.

Invariants: an engine that lacks an adapter which was loaded through us gets nothing; loading it is tried again until
the engine has it. While one is replaced nothing is sampled, and what was sampled with the one before begins again.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import msgspec
from aiohttp import web

from seer_servers.service.errors import bad_request
from seer_servers.service.parameters import read_body
from seer_servers.service.part import Route

if TYPE_CHECKING:
    from collections.abc import Sequence

    from seer_async.service import Service
    from seer_async.types import EngineInfo
    from seer_servers.service.fanout import Fanout, Outcome
    from seer_servers.service.pausing import Pausing

LORA_S = 600.0
_POLL_S = 1.0
_LOAD, _UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
_LACKS_IT = 404  # vLLM's answer to unloading a name that it does not know


class LoadBody(msgspec.Struct):
    """An adapter's name and where the engines find it; other fields are passed on."""

    lora_name: str
    lora_path: str


class UnloadBody(msgspec.Struct):
    """An adapter's name."""

    lora_name: str


class Adapters:
    """The adapters of the fleet."""

    def __init__(self, service: Service, fanout: Fanout, pausing: Pausing) -> None:
        self._service = service
        self._fanout = fanout
        self._pausing = pausing
        self._one_at_a_time = asyncio.Lock()
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

    def forget(self) -> None:
        """No engine has any adapter now: they are to be loaded again."""
        self._has.clear()
        self._service.check_engines()

    async def run(self) -> None:
        """Bring adapters to engines that lack them, again and again; ends with its task."""
        while True:
            await asyncio.sleep(_POLL_S)
            if self._service.paused is None:  # a sleeping engine has no room for them
                async with self._one_at_a_time:
                    await asyncio.gather(*map(self._bring, list(self._service.fleet.clients)))

    async def _bring(self, engine: str) -> None:
        if (info := self._info(engine)) is None:
            return
        for adapter in self._wanted.keys() - self._loaded(engine, info.boot):
            body = msgspec.json.encode(msgspec.json.decode(self._wanted[adapter]) | {"load_inplace": True})
            outcome = await self._fanout.post(_LOAD, [engine], body, timeout_s=LORA_S)
            if outcome.ok:
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
        async with self._one_at_a_time:
            engines = await self._fanout.live()
            if adapter not in self._wanted:
                outcome = await self._fanout.post(_LOAD, engines, body, timeout_s=LORA_S)
                self._take_in(adapter, body, outcome)
            elif _in_place(body):
                outcome = await self._replace(adapter, body, engines)
            elif self._wanted[adapter] == body:  # the same again is no mistake
                lacking = [name for name in engines if not self._is_on(name, adapter)]
                outcome = await self._fanout.post(_LOAD, lacking, body, timeout_s=LORA_S)
                self._note(adapter, outcome)
            else:
                raise bad_request(
                    f"The lora adapter '{adapter}' has already been loaded. If you want to load the adapter in place, "
                    "set 'load_inplace' to True."
                )
        self._fanout.check(outcome, "the others have it, and the engine gets nothing before it has it too")
        return web.Response(text=f"Success: LoRA adapter '{adapter}' added successfully.")

    async def _replace(self, adapter: str, body: bytes, engines: Sequence[str]) -> Outcome:
        """New weights under a name that is in use: no response has tokens of both."""
        async with self._pausing.held():
            self._service.change_adapter(adapter)
            outcome = await self._fanout.post(_LOAD, engines, body, timeout_s=LORA_S)
            self._take_in(adapter, body, outcome)
        return outcome

    def _take_in(self, adapter: str, body: bytes, outcome: Outcome) -> None:
        """Where one engine has it, all must; if none has, nothing has changed."""
        if outcome.ok:
            for _, adapters in self._has.values():
                adapters.discard(adapter)
            self._wanted[adapter] = body
            self._service.adapters.add(adapter)
        self._note(adapter, outcome)

    def _note(self, adapter: str, outcome: Outcome) -> None:
        for name in outcome.ok:
            if info := self._info(name):
                self._loaded(name, info.boot).add(adapter)
        self._service.check_engines()

    def _is_on(self, engine: str, adapter: str) -> bool:
        info = self._info(engine)
        return info is not None and adapter in self._loaded(engine, info.boot)

    def _info(self, engine: str) -> EngineInfo | None:
        client = self._service.fleet.clients.get(engine)
        return client.info if client else None

    async def _unload(self, request: web.Request) -> web.Response:
        adapter = (await read_body(request, UnloadBody)).lora_name
        body = msgspec.json.encode({"lora_name": adapter})
        async with self._one_at_a_time:
            known = self._wanted.pop(adapter, None)
            self._service.adapters.discard(adapter)
            for _, adapters in self._has.values():
                adapters.discard(adapter)
            outcome = await self._fanout.post(_UNLOAD, await self._fanout.live(), body, timeout_s=LORA_S)
        if outcome.ok or known:
            lacking = [name for name, error in outcome.failed.items() if error.status == _LACKS_IT]
            for name in lacking:
                del outcome.failed[name]
        self._fanout.check(outcome, "the others have unloaded it")
        return web.Response(text=f"Success: LoRA adapter '{adapter}' removed successfully.")


def _in_place(body: bytes) -> bool:
    fields: dict[str, Any] = msgspec.json.decode(body)
    return bool(fields.get("load_inplace"))
