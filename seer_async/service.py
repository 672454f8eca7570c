"""A fleet that serves: groups come in at any time, samples go out as they finish, for as long as it is wanted.

Invariants: every request that was submitted ends in exactly one sample, which its ticket gets, unless it was cancelled;
seeds are unique to a request unless the caller gave them; while the service is paused nothing new is sent to an engine.
Nothing is kept on disk: what a caller has not taken when the process ends is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
import time
from typing import TYPE_CHECKING, Self

import msgspec

from seer_async.core import Core
from seer_async.errors import BusyError, RefusedError, SeerError
from seer_async.events import (
    AbortRequested,
    AdapterChanged,
    EngineHeld,
    GroupAdded,
    HandBackRequested,
    Paused,
    RequestsCancelled,
    Resumed,
    VersionSet,
)
from seer_async.fleet import open_fleet
from seer_async.held import Held
from seer_async.sampling import mix_seed
from seer_async.shell import Clock, Shell
from seer_async.snapshot import Snapshot, take_snapshot
from seer_async.tickets import Desk, Ticket, ended_sample
from seer_async.types import Prompt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from seer_async.config import Config
    from seer_async.engine import EngineClient
    from seer_async.fleet import Fleet
    from seer_async.tickets import Work
    from seer_async.types import EngineInfo

_BUSY_RETRY_S = 1.0
_END_S = 10.0
_LOOK_S = 0.01
_GROUPS_KEPT = 1024
_MOST_SIBLINGS = 256  # that join; a group that always has an open request would never be forgotten


class Service:
    """The engines at `urls`, ready for work inside the `async with` block.

    `gate` says why an engine, by its name, must not sample now although it could, or None; it may be replaced.
    `adapters` are the LoRA adapters that all engines have which may sample; whoever loads them keeps the set.

    Raises:
        FleetError: On entering, if no engine can be used.
    """

    def __init__(self, config: Config, urls: Sequence[str]) -> None:
        self.config = config
        self.run_id = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
        self.paused: str | None = None  # the mode
        self.adapters: set[str] = set()
        self._lost_weights: str | None = None  # what is sampled from while engines have none
        self.gate: Callable[[str, EngineInfo], str | None] = lambda *_: None
        self._urls = urls
        self._clock = Clock()
        self._seed = config.sampling.seed if config.sampling.seed is not None else secrets.randbits(62)
        self._serial = 0
        self._desk = Desk()
        self._groups: dict[bytes, str] = {}  # id of the latest group by what makes siblings
        self._held = Held()
        self._stack = contextlib.AsyncExitStack()
        self._loop_task: asyncio.Task[str] | None = None

    async def __aenter__(self) -> Self:
        try:
            self.fleet: Fleet = await self._stack.enter_async_context(open_fleet(self.config, self._urls))
            await self.fleet.attach(mixed=True)  # the core samples from one version at a time
            self.tokenizer = await self.fleet.tokenizer()
        except BaseException:
            await self._stack.aclose()
            raise
        self.core = Core(
            self.config,
            list(self.fleet.clients),
            run=self.run_id,
            seed=self._seed,
            tokenizer=self.tokenizer,
            lasting=True,
        )
        self._info = self.fleet.info
        self._shell = Shell(self.core, self.fleet.clients, self._desk, clock=self._clock, accepts=self._accept)
        self._loop_task = asyncio.create_task(self._shell.run(self.fleet.attached), name="service")
        self._loop_task.add_done_callback(lambda _: self._desk.end())
        await asyncio.sleep(0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._loop_task is not None
        self._shell.post(AbortRequested())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_END_S):
                await asyncio.wait([self._loop_task])
        await self._stack.aclose()

    async def wait(self) -> None:
        """Return or raise when the service has ended by itself; it should not."""
        assert self._loop_task is not None
        await asyncio.shield(self._loop_task)

    @property
    def info(self) -> EngineInfo:
        """What the engines had in common when the service began."""
        return self._info

    def snapshot(self) -> Snapshot:
        """Look at the fleet now."""
        return take_snapshot(self.core, self._clock.now())

    @property
    def lengths(self) -> Sequence[int]:
        """Lengths in tokens of the latest responses that ended by themselves."""
        return self._desk.lengths

    # Work

    def submit(self, work: Work) -> Ticket:
        """Take in a group.

        Raises:
            RefusedError: It can never be sampled; says why.
            BusyError: Too much is open; says when to come again.
        """
        room = self.info.max_model_len - len(work.prompt_token_ids)
        self._check(work, room)
        group, first = self._place_of(work)
        ticket = Ticket([f"{group}/{first + number}" for number in range(work.n)])
        self._desk.open(ticket)
        event = GroupAdded(
            prompt=Prompt(id=group, token_ids=work.prompt_token_ids),
            n=work.n,
            limit=min(work.options.sampling.max_tokens, room),
            options=work.options,
            seeds=work.seeds or tuple(self._fresh_seed() for _ in range(work.n)),
        )
        if self.paused:
            self._held.add(event, ticket.requests)
        else:
            self._shell.post(event)
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Nobody wants the rest of it: stop working for it, and tell its reader nothing more."""
        self._desk.drop(ticket)
        self._held.drop(ticket.requests)
        self._shell.post(RequestsCancelled(requests=tuple(ticket.requests)))

    def _check(self, work: Work, room: int) -> None:
        ids = work.prompt_token_ids
        if self._loop_task is None or self._loop_task.done():
            raise SeerError("the service has ended")
        if work.options.model and work.options.model not in self.adapters:
            raise RefusedError(f"there is no adapter {work.options.model!r}")
        if not ids:
            raise RefusedError("the prompt has no tokens")
        if room < 1:
            raise RefusedError(
                f"the prompt has {len(ids)} tokens and leaves no room in the context of {self.info.max_model_len}"
            )
        if self.info.vocab_size is not None and not 0 <= min(ids) <= max(ids) < self.info.vocab_size:
            raise RefusedError(f"a token id is outside the model's vocabulary of {self.info.vocab_size}")
        if work.n < 1:
            raise RefusedError("n must be at least 1")
        opened = self.core.buffer.open + self._held.wanted
        if opened + work.n > self.config.serve.max_requests:
            raise BusyError(
                f"{opened} requests are open, of {self.config.serve.max_requests} at most",
                retry_after=_BUSY_RETRY_S,
            )

    def _place_of(self, work: Work) -> tuple[str, int]:
        """The id of the open group that the work belongs to, or of a new one, and its first response's number there.

        A group that has had many requests is joined no more: it is forgotten when those have ended.
        What is held while paused joins no group of before: that may have ended when the service goes on.
        """
        key = _kinship(work)
        group = self._groups.get(key, "")
        size = self._size(group)
        if 0 < size < _MOST_SIBLINGS:
            return group, size
        self._forget_groups()
        self._serial += 1
        group = self._groups[key] = f"g{self._serial}"
        return group, 0

    def _size(self, group: str) -> int:
        """Requests of a group that can be joined; 0 if it cannot."""
        if self.paused:
            return self._held.size(group)
        known = self.core.buffer.groups.get(group)
        return len(known.requests) if known else 0

    def _forget_groups(self) -> None:
        if len(self._groups) > 2 * (len(self.core.buffer.groups) + len(self._held)) + _GROUPS_KEPT:
            self._groups = {key: group for key, group in self._groups.items() if self._size(group)}

    def _fresh_seed(self) -> int:
        self._serial += 1
        return mix_seed(self._seed, self._serial)

    # The fleet

    async def pause(self, mode: str) -> None:
        """Send nothing more; what comes in waits for `resume`.

        What is open is finished first ("wait"), stays as it is ("keep"), or is to be ended by `end` ("abort").
        """
        self.paused = mode
        if mode == "wait":
            self._shell.post(Resumed())
            await self._desk.ended(self._open())
            return
        self._shell.post(Paused())

    async def end(self, grace_s: float) -> None:
        """End what is open as it is, with all tokens that paused engines hand back within `grace_s` seconds."""
        await self._end(self._open(), grace_s)

    async def abort(self, requests: Iterable[str] | None, grace_s: float) -> int:
        """End these requests, or all, as they are; returns how many.

        They have what their calls in flight have sampled, as far as engines hand it back within `grace_s` seconds.
        """
        opened, held = self._open(), self._held.requests()
        wanted = (opened | held) if requests is None else (opened | held).intersection(requests)
        for request in wanted & held:
            self._desk.emit(ended_sample(request, "abort", prompt=self._held.prompt(request)))
        self._held.drop(wanted)
        self._shell.post(HandBackRequested(requests=tuple(wanted & opened)))
        await self._end(wanted & opened, grace_s)
        return len(wanted)

    async def _end(self, requests: set[str], grace_s: float) -> None:
        """End requests when none of them is in flight any more, or the time is over."""
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    while any(map(self._in_flight, requests)):  # noqa: ASYNC110 - a second
                        await asyncio.sleep(_LOOK_S)
        finally:
            self._shell.post(RequestsCancelled(requests=tuple(requests)))

    def _in_flight(self, name: str) -> bool:
        request = self.core.buffer.requests.get(name)
        return request is not None and request.call is not None

    def _open(self) -> set[str]:
        return {request.id for request in self.core.buffer.unfinished()}

    def resume(self) -> None:
        """Go on, with what has come in meanwhile."""
        self.paused = None
        self._shell.post(Resumed(), *self._held.release())

    def set_version(self, version: str) -> None:
        """Sample from these weights only; what was begun with others begins again."""
        self._shell.post(VersionSet(version=version))
        self._shell.hurry()  # the core learns from telemetry which engines have it

    def lose_weights(self) -> None:
        """No engine has weights any more: nothing is sampled before the next `set_version`."""
        self._serial += 1
        self._lost_weights = f"none since sleep {self._serial}"
        self._shell.post(VersionSet(version=self._lost_weights))

    @property
    def has_weights(self) -> bool:
        """Whether there are weights to sample from."""
        return self._lost_weights is None or self.core.versions.current != self._lost_weights

    def change_adapter(self, name: str) -> None:
        """A LoRA adapter is about to be replaced; the service must be paused."""
        self._shell.post(AdapterChanged(model=name))

    def add_engine(self, url: str) -> str:
        """Make a server part of the fleet; returns its name."""
        taken = {int(name.rpartition("-")[2]) for name in self.fleet.clients}
        name = f"engine-{max(taken, default=-1) + 1}"
        self._shell.add_engine(name, self.fleet.add(name, url))
        return name

    def remove_engine(self, name: str) -> None:
        """Take a server out of the fleet; what it works on goes on elsewhere."""
        self._shell.remove_engine(name)
        self.fleet.remove(name)

    def objection(self, name: str, info: EngineInfo) -> str | None:
        """Why an engine must not sample, or None."""
        return self.fleet.objection(name, info) or self.gate(name, info)

    def _accept(self, name: str, info: EngineInfo) -> str | None:
        return self.objection(name, info) or self.fleet.accept(name, info)

    def check_engines(self) -> None:
        """Ask the gate about all engines, because its answers may have changed."""
        for name in self.fleet.clients:
            self._shell.check_engine(name)

    def hold_engine(self, name: str, *, held: bool) -> None:
        """Somebody else has paused an engine, or lets it go on."""
        if self.core.instances[name].held != held:
            self._shell.post(EngineHeld(engine=name, held=held))

    def client(self, name: str) -> EngineClient:
        """The client of an engine."""
        return self.fleet.clients[name]


def _kinship(work: Work) -> bytes:
    """What siblings have in common."""
    options = msgspec.structs.replace(work.options, sampling=msgspec.structs.replace(work.options.sampling, seed=None))
    return hashlib.blake2b(
        msgspec.msgpack.encode((work.group, work.prompt_token_ids, options)), digest_size=16
    ).digest()
