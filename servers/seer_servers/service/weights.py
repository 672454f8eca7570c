"""Weight transfer: the trainer sees one server with as many workers as the fleet has.

Invariants: nothing is sampled while an update is open; the fleet's version changes once, when every engine that took
the whole update has it; an engine that missed any part of it gets nothing until the next one; no two updates have the
same version, whatever the trainer calls them, or old KV blocks and samples could not be told from new ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import msgspec
from aiohttp import web

from seer_async.errors import EngineError, FailureKind
from seer_servers.service.errors import ApiError, bad_request
from seer_servers.service.fanout import gathered
from seer_servers.service.parameters import read_body
from seer_servers.service.part import Route
from seer_servers.service.worldsize import shifted, slices

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Mapping

    from seer_async.service import Service
    from seer_servers.service.facts import Facts
    from seer_servers.service.fanout import Fanout, Outcome
    from seer_servers.service.holders import Holders
    from seer_servers.service.pausing import Pausing

INIT_S = 600.0
START_S = 300.0
UPDATE_S = 1800.0
FINISH_S = 600.0
GRACE_S = 30.0
"""For the others, after one engine has failed in what they do together."""

_GONE = EngineError(FailureKind.CONNECTION, "it does not answer any more")


class InitBody(msgspec.Struct):
    """Of `init_info`, `rank_offset` and `world_size` are looked at; the rest is between trainer and engines."""

    init_info: dict[str, Any]


class UpdateBody(msgspec.Struct):
    """What the engines are about to receive; a list has one entry for each worker of the fleet.

    Or a whole update in one call, as prime-rl asks for it: the folder of a checkpoint, for engines with `seer_files`.
    """

    update_info: dict[str, Any] | list[dict[str, Any]] | None = None
    weight_dir: str | None = None


class FinishBody(msgspec.Struct):
    """What the new weights are called; without it we name them."""

    weight_version: str | None = None


class VersionBody(msgspec.Struct):
    """What the weights are called."""

    new_version: str


class Message(msgspec.Struct):
    """What was done."""

    message: str


class Named(msgspec.Struct):
    """What the weights are called now."""

    success: bool
    new_version: str


class Weights:
    """Weight updates of the fleet, one at a time."""

    def __init__(self, service: Service, fanout: Fanout, facts: Facts, pausing: Pausing, holders: Holders) -> None:
        self._service = service
        self._fanout = fanout
        self._facts = facts
        self._pausing = pausing
        self._holders = holders
        self._busy = ""  # the call that is under way
        self._open: set[str] | None = None  # engines that have all of the open update so far
        self._group: dict[str, str] | None = None  # engines of the transfer group, and their boots
        self._workers: dict[str, int] = {}  # of each engine, as the trainer counts them
        self._rest: asyncio.Task[None] | None = None  # engines still at work when another had failed
        self._updates = 0
        self._names: set[str] = set()  # what weights have been called
        self._transferred = False  # weights came through us, not only names for them

    @property
    def updating(self) -> bool:
        """Whether an update is open."""
        return self._open is not None

    @property
    def routes(self) -> list[Route]:
        """The routes."""

        def post(path: str, handler: Any, summary: str, body: Any = None, reply: Any = Message) -> Route:
            return Route(method="POST", path=path, handler=handler, summary=summary, body=body, reply=reply)

        return [
            post("/init_weight_transfer_engine", self._init, "Make one transfer group of all engines", InitBody),
            post("/start_weight_update", self._start, "Begin an update on all engines"),
            post("/update_weights", self._update, "Receive weights on all engines at the same time", UpdateBody),
            post("/finish_weight_update", self._finish, "End the update; sample from it", FinishBody),
            post("/update_weight_version", self._update_version, "Name the weights engines have", VersionBody, Named),
        ]

    # The steps of an update

    async def _init(self, request: web.Request) -> web.Response:
        info = (await read_body(request, InitBody)).init_info
        async with self._alone("/init_weight_transfer_engine"):
            engines = await self._fanout.live()
            self._group, self._workers = None, await self._facts.sizes(engines)
            boots = await self._facts.boots(engines)
            bodies = shifted(info, self._workers)
            outcome = await self._together("/init_weight_transfer_engine", bodies, INIT_S)
            self._fanout.check(outcome, "so there is no transfer group: initialise it again", repeatable=False)
            self._group = boots
        return web.json_response({"message": "Weight transfer initialized"})

    async def _start(self, _request: web.Request) -> web.Response:
        async with self._alone("/start_weight_update"), self._pausing.held():
            live = await self._fanout.live()
            boots = await self._facts.boots(live)
            engines = [name for name in boots if self._group is None or self._group.get(name) == boots[name]]
            if self._group is None:
                self._workers = await self._facts.sizes(engines)
            begun = self._open or set()  # vLLM refuses to begin twice, and a trainer that was restarted has to
            outcome = await self._start_on([name for name in engines if name not in begun])
            outcome.failed |= dict.fromkeys(set(live) - boots.keys(), _GONE)
            self._open = {name for name in engines if name in begun or name in outcome.ok} or None
            self._fanout.check(outcome, "the update is open on the other engines", repeatable=False)
            self._check_group(boots)
        return web.json_response({"message": "Weight update started"})

    async def _start_on(self, engines: Iterable[str]) -> Outcome:
        """An engine that was left in the middle of an earlier update has to end that first."""
        outcome = await self._fanout.post("/start_weight_update", engines, b"{}", timeout_s=START_S)
        left = [name for name, error in outcome.failed.items() if error.kind is FailureKind.SERVER]
        ended = await self._fanout.post("/finish_weight_update", left, b"{}", timeout_s=FINISH_S)
        again = await self._fanout.post("/start_weight_update", ended.ok, b"{}", timeout_s=START_S)
        for name in ended.ok:
            del outcome.failed[name]
        outcome.ok |= again.ok
        outcome.failed |= again.failed
        return outcome

    def _check_group(self, boots: Mapping[str, str]) -> None:
        lost = [name for name, boot in (self._group or {}).items() if boots.get(name) != boot]
        if lost:
            names = ", ".join(map(self._fanout.title, lost))
            raise ApiError(
                424,
                f"the transfer group was made with {names}, gone or started again since: the update is open on the "
                "other engines, but what all ranks do together will hang; make a new group with "
                "/init_weight_transfer_engine",
            )

    async def _update(self, request: web.Request) -> web.Response:
        body = await read_body(request, UpdateBody)
        if body.weight_dir is not None:
            await self._start(request)
            await self._receive({"path": body.weight_dir})
            return await self._end(PurePath(body.weight_dir).name)
        if body.update_info is None:
            raise bad_request("update_info is missing", "update_info")
        return await self._receive(body.update_info)

    async def _receive(self, info: dict[str, Any] | list[dict[str, Any]]) -> web.Response:
        async with self._alone("/update_weights"):
            if self._open is None:
                raise ApiError(400, "no weight update is open: /start_weight_update comes first")
            outcome = await self._together("/update_weights", self._parts(info, self._open), UPDATE_S)
            self._fanout.check(
                outcome,
                f"the others have {GRACE_S:g} s to end theirs; the update goes on with those that do",
                repeatable=False,
            )
        return web.json_response({"message": "Weights updated"})

    def _parts(self, info: dict[str, Any] | list[dict[str, Any]], engines: set[str]) -> dict[str, bytes]:
        return {name: part for name, part in slices(info, self._workers).items() if name in engines}

    async def _together(self, path: str, bodies: Mapping[str, bytes], timeout_s: float) -> Outcome:
        """One collective: all begin at once, the first failure is reported at once, and the others get a while."""
        tasks = self._fanout.begin(path, bodies, timeout_s=timeout_s)
        pending = set(tasks.values())
        while pending:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            if any(isinstance(task.result(), EngineError) for task in done):
                break
        ended = {name: task.result() for name, task in tasks.items() if task not in pending}
        outcome = gathered(list(ended), ended.values())
        self._drop(outcome.failed)
        if pending:
            rest = {name: task for name, task in tasks.items() if task in pending}
            self._rest = asyncio.create_task(self._wait_for(rest))
        return outcome

    async def _wait_for(self, rest: Mapping[str, asyncio.Task[bytes | EngineError]]) -> None:
        _, late = await asyncio.wait(rest.values(), timeout=GRACE_S)
        for task in late:
            task.cancel()
        self._drop(name for name, task in rest.items() if task in late or isinstance(task.result(), EngineError))

    def _drop(self, engines: Iterable[str]) -> None:
        """These have missed a part of the open update."""
        if self._open is not None:
            self._open.difference_update(engines)

    async def _finish(self, request: web.Request) -> web.Response:
        return await self._end((await read_body(request, FinishBody)).weight_version)

    async def _end(self, name: str | None) -> web.Response:
        async with self._alone("/finish_weight_update"):
            if self._open is None:
                return self._finished_before()
            self._updates += 1
            version = self._unused(name or f"update-{self._updates}-{self._service.run_id[-6:]}")
            async with self._pausing.held():
                outcome = await self._finish_on(self._open, version)
            self._fanout.check(outcome, f"the others sample from {version}", repeatable=False)
            if not outcome.ok:
                raise ApiError(424, "no engine has the whole update, so nothing is sampled before the next one")
        return web.json_response({"message": "Weight update finished", "weight_version": version})

    async def _finish_on(self, engines: set[str], version: str) -> Outcome:
        boots = await self._facts.boots(engines)  # before: a process that starts after this has nothing to finish
        said = msgspec.json.encode({"weight_version": version})
        outcome = await self._fanout.post("/finish_weight_update", boots, said, timeout_s=FINISH_S)
        outcome.failed |= dict.fromkeys(engines - boots.keys(), _GONE)
        self._open, self._transferred = None, True
        await self._adopt(version, {name: boots[name] for name in outcome.ok})
        return outcome

    def _finished_before(self) -> web.Response:
        """A trainer may repeat itself when an answer was lost."""
        if not self._transferred:
            raise ApiError(400, "no weight update is open: /start_weight_update comes first")
        return web.json_response(
            {"message": "Weight update finished", "weight_version": self._service.core.versions.current}
        )

    async def _update_version(self, request: web.Request) -> web.Response:
        body = await read_body(request, VersionBody)
        async with self._alone("/update_weight_version"), self._pausing.held():
            boots = await self._facts.boots(await self._fanout.live())
            engines = self._holders.among(boots) if self._transferred else list(boots)
            same = body.new_version == self._service.core.versions.current
            version = body.new_version if same else self._unused(body.new_version)
            said = msgspec.json.encode({"new_version": version})
            outcome = await self._fanout.post("/update_weight_version", engines, said)
            await self._adopt(version, {name: boots[name] for name in outcome.ok})
            self._fanout.check(outcome, f"the others sample from {version}")
        return web.json_response({"success": True, "new_version": version})

    def _unused(self, name: str) -> str:
        """A name that no weights had before: trainers that start again count from one again."""
        self._names.add(self._service.core.versions.current or "")
        names = itertools.chain([name], (f"{name}#{number}" for number in itertools.count(2)))
        unused = next(each for each in names if each not in self._names)
        self._names.add(unused)
        return unused

    async def _adopt(self, version: str, boots: Mapping[str, str]) -> None:
        """Sample from these weights, on the engines that have them."""
        self._holders.replace(boots)
        self._service.set_version(version)
        self._service.check_engines()
        await self._service.fleet.flush_pools(self._service.run_id)

    @contextlib.asynccontextmanager
    async def _alone(self, call: str) -> AsyncIterator[None]:
        """One call at a time: what overlaps is a mistake, or a repetition by a client that has lost patience."""
        if self._busy:
            raise ApiError(409, f"{self._busy} is under way: wait for its answer")
        self._busy = call
        try:
            if self._rest:
                await self._rest
                self._rest = None
            yield
        finally:
            self._busy = ""
