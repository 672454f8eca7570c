"""Pause, resume, sleep and wake up: dispatch first, then the engines; and the other way round.

Invariants: when a pause is answered, nothing is sent to any engine until the fleet is resumed; a mode of "keep" keeps
requests with us, not inside the engines: those hand back what they have sampled, and any engine can go on with it.
A weight update that finds the fleet running holds it for as long as it is open, and then lets it go. After a sleep that
discards weights nothing is sampled before there are new ones, awake or not.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING
from urllib.parse import urlencode

import msgspec
from aiohttp import web

from seer_servers.service.errors import ApiError, bad_request
from seer_servers.service.parameters import choice, flag, read_body
from seer_servers.service.part import Route
from seer_servers.service.watch import Paused

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from seer_async.service import Service
    from seer_servers.service.fanout import Fanout, Outcome
    from seer_servers.service.watch import Watch

PAUSE_S = 60.0
WAIT_S = 1800.0
"""For what is open to end by itself, in a pause that waits for it."""
SLEEP_S = 300.0
HAND_BACK_S = 2.0
"""For engines to hand back what they have sampled; what comes later is lost."""

_MODES = ("abort", "wait", "keep")
_LEVELS = ("0", "1", "2")
_DISCARDING = "2"  # the level at which engines do not keep their weights


class AbortBody(msgspec.Struct):
    """Which requests to abort; all if there is no list."""

    request_ids: list[str] | None = None


class Status(msgspec.Struct):
    """What the fleet is now: "paused", "resumed", "sleeping", "awake" or "aborted"."""

    status: str


class _Woken(msgspec.Struct):
    status: str = "awake"


class Pausing:
    """Whether the fleet runs.

    `abort` ends requests by the ids that clients know, within some seconds, and returns how many. `updating` says
    whether a weight update is open; `lost` is told that engines have lost all that was loaded into them.
    """

    def __init__(
        self, service: Service, fanout: Fanout, watch: Watch, *, abort: Callable[[Sequence[str], float], Awaitable[int]]
    ) -> None:
        self._service = service
        self._fanout = fanout
        self._watch = watch
        self._abort = abort
        self._engines = asyncio.Lock()  # one order to the engines at a time
        self._held = False  # paused by `_hold`, not by a trainer
        self.updating: Callable[[], bool] = lambda: False
        self.lost: Callable[[], None] = lambda: None

    @property
    def routes(self) -> list[Route]:
        """The routes."""
        switch = {"mode": str, "clear_cache": bool}
        return [
            Route(method="POST", path="/pause", handler=self._pause, summary="Pause", query=switch, reply=Status),
            Route(method="POST", path="/resume", handler=self._resume, summary="Resume", reply=Status),
            Route(method="GET", path="/is_paused", handler=self._is_paused, summary="Is it paused?", reply=Paused),
            Route(
                method="POST",
                path="/abort_requests",
                handler=self._abort_requests,
                summary="Abort requests",
                body=AbortBody,
                reply=Status,
            ),
            Route(
                method="POST",
                path="/sleep",
                handler=self._sleep,
                summary="Put all engines to sleep",
                query={"level": int, "mode": str},
                reply=Status,
            ),
            Route(
                method="POST",
                path="/wake_up",
                handler=self._wake_up,
                summary="Wake all engines up",
                query={"tags": list[str]},
                reply=Status,
            ),
            Route(method="GET", path="/is_sleeping", handler=self._is_sleeping, summary="Is it asleep?"),
        ]

    # For weight updates and adapters

    @contextlib.asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """Nothing is sampled inside, nor after it while an update is open."""
        try:
            await self._hold()
            yield
        finally:
            if not self.updating():
                await self._release()

    async def _hold(self) -> None:
        """Let nothing be sampled until `_release`, unless the fleet is paused already.

        An engine that does not obey samples from the weights it has, and says so with every token.
        """
        if self._service.paused is None:
            self._held = True
            await self._stop("keep", _pause_path("keep", clear_cache=False), PAUSE_S)

    async def _release(self) -> None:
        """End a `_hold`."""
        if self._held:
            self._held = False
            await self._go_on("/resume", PAUSE_S)

    # Routes

    async def _pause(self, request: web.Request) -> web.Response:
        mode = choice(request, "mode", _MODES, default="abort")
        path = _pause_path(mode, clear_cache=flag(request, "clear_cache", default=True))
        outcome = await self._stopped_by_trainer(mode, path, PAUSE_S)
        self._fanout.check(outcome, "the other engines are paused, and nothing is sent to any before /resume")
        return web.json_response({"status": "paused"})

    async def _resume(self, _request: web.Request) -> web.Response:
        if self.updating():
            raise ApiError(409, "a weight update is open: /finish_weight_update comes first")
        self._held = False
        outcome = await self._go_on("/resume", PAUSE_S)
        self._fanout.check(outcome, "the other engines go on")
        return web.json_response({"status": "resumed"})

    async def _is_paused(self, _request: web.Request) -> web.Response:
        return web.json_response({"is_paused": self._service.paused is not None or await self._all("/is_paused")})

    async def _is_sleeping(self, _request: web.Request) -> web.Response:
        return web.json_response({"is_sleeping": await self._all("/is_sleeping")})

    async def _all(self, path: str) -> bool:
        outcome = await self._fanout.get(path, await self._fanout.live())
        answers = outcome.decoded(dict[str, bool])
        self._fanout.check(outcome, "")
        return all(any(answer.values()) for answer in answers.values())

    async def _abort_requests(self, request: web.Request) -> web.Response:
        wanted = (await read_body(request, AbortBody)).request_ids
        if wanted:
            aborted = await self._abort(wanted, HAND_BACK_S)
        else:
            aborted = await self._service.abort(None, HAND_BACK_S)
        return web.json_response({"status": "aborted", "aborted": aborted})

    async def _sleep(self, request: web.Request) -> web.Response:
        mode = choice(request, "mode", _MODES, default="abort")
        level = request.query.get("level", "1")
        if level not in _LEVELS:
            raise bad_request(f"level must be 0, 1 or 2, not {level!r}", "level")
        query = urlencode({"level": level, "mode": "abort" if mode == "keep" else mode})
        outcome = await self._stopped_by_trainer(mode, f"/sleep?{query}", SLEEP_S)
        if level == _DISCARDING and outcome.ok:
            self._service.lose_weights()
            self.lost()
        self._fanout.check(outcome, "the other engines sleep, and nothing is sent to any before /wake_up")
        return web.json_response({"status": "sleeping", "level": int(level)})

    async def _wake_up(self, request: web.Request) -> web.Response:
        tags = request.query.getall("tags", [])
        path = "/wake_up" + (f"?{urlencode([('tags', tag) for tag in tags])}" if tags else "")
        async with self._engines:
            outcome = await self._fanout.post(path, await self._fanout.live(), timeout_s=SLEEP_S)
            woken = all(said.status == "awake" for said in outcome.decoded(_Woken).values())
            if woken and outcome.ok:
                await self._go()
        self._fanout.check(outcome, "the other engines have woken up")
        return web.json_response({"status": "awake" if woken else "sleeping", "tags": tags or None})

    # Stopping and going on

    async def _stopped_by_trainer(self, mode: str, path: str, timeout_s: float) -> Outcome:
        if mode == "wait" and self.updating():
            raise ApiError(409, "a weight update is open, so nothing can end by itself: finish the update first")
        if mode == "wait" and self._service.paused is not None:
            await self._go_on("/resume", PAUSE_S)  # what the pause before has kept is to end
        self._held = False
        return await self._stop(mode, path, timeout_s)

    async def _stop(self, mode: str, path: str, timeout_s: float) -> Outcome:
        try:
            async with asyncio.timeout(WAIT_S):
                await self._service.pause(mode)
        except TimeoutError:
            still = self._service.core.buffer.open
            raise ApiError(
                504, f"{still} requests are still open after {WAIT_S:g} s: wait again, or pause with mode=abort"
            ) from None
        async with self._engines:
            if self._service.paused != mode:
                raise ApiError(409, f"another call has changed the pause; the fleet is now {self._now()}")
            try:
                return await self._fanout.post(path, await self._fanout.live(), timeout_s=timeout_s)
            finally:
                if mode == "abort":
                    await self._service.end(HAND_BACK_S)

    async def _go_on(self, path: str, timeout_s: float) -> Outcome:
        async with self._engines:
            try:
                return await self._fanout.post(path, await self._fanout.live(), timeout_s=timeout_s)
            finally:
                await self._go()

    async def _go(self) -> None:
        """The engines run: let dispatch go on too, or leave that to the weight update that is open."""
        await self._watch.look()
        if self.updating():
            self._held = True
        elif self._service.paused is not None:
            self._service.resume()

    def _now(self) -> str:
        return f"paused with mode={self._service.paused}" if self._service.paused else "running"


def _pause_path(mode: str, *, clear_cache: bool) -> str:
    """VLLM never clears caches in a pause that keeps requests."""
    if mode == "keep":
        return "/pause?mode=abort&clear_cache=false"
    return f"/pause?{urlencode({'mode': mode, 'clear_cache': str(clear_cache).lower()})}"
