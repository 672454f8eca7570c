"""The asyncio shell around the core: it executes commands, turns what happens into events, and decides nothing.

Invariants: commands are executed in the order given, without an await in between, so a chunk is in the journal before
its request's next call leaves; every task belongs to one task group and ends with the rollout; a call's result is
posted at most once, and not at all after it was cancelled.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from seer_async.errors import EngineError, FailureKind, StorageError
from seer_async.events import (
    Cancel,
    ChunkFailed,
    ChunkFinished,
    Command,
    Dispatch,
    Emit,
    EngineAdded,
    EngineDown,
    EngineRemoved,
    EngineUp,
    Event,
    HandBack,
    Record,
    RequestsCancelled,
    Stop,
    Wake,
    Woke,
)
from seer_async.monitor import Monitor
from seer_async.salt import cache_salt
from seer_async.snapshot import take_snapshot
from seer_async.wire import CallSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from seer_async.core import Core
    from seer_async.engine import EngineClient
    from seer_async.sink import Sink, Tracer
    from seer_async.snapshot import Snapshot
    from seer_async.types import EngineInfo

_REPORT_SHARE = 50  # watching may take one fiftieth of the loop's time,
_REPORT_PAUSE_S = 2.0  # unless that would look frozen
_INSIST_S = 1.0


class Clock:
    """Unix time that never steps: the wall clock at the start, moved on by the monotonic clock."""

    def __init__(self) -> None:
        self._offset = time.time() - time.monotonic()

    def now(self) -> float:
        """Unix seconds."""
        return time.monotonic() + self._offset


class Shell:
    """Runs one rollout to its end, or a service for as long as it is wanted.

    `clients` are the engines by name. `accepts` says why an engine, by its name, cannot be used now, or None.
    `watch` is called with every snapshot.
    """

    def __init__(
        self,
        core: Core,
        clients: Mapping[str, EngineClient],
        sink: Sink,
        *,
        clock: Clock,
        tracer: Tracer | None = None,
        accepts: Callable[[str, EngineInfo], str | None] = lambda *_: None,
        watch: Callable[[Snapshot], None] = lambda _: None,
        watch_s: float = 0.25,
    ) -> None:
        self._core = core
        self._clients = dict(clients)
        self._sink = sink
        self._clock = clock
        self._tracer = tracer
        self._accepts = accepts
        self._watch = watch
        self._watch_s = watch_s
        self._config = core.config
        self._calls: dict[int, asyncio.Task[None]] = {}
        self._errands: set[asyncio.Task[None]] = set()  # to engines, and what was cancelled
        self._stopped: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._alarm: asyncio.TimerHandle | None = None
        self._tasks: asyncio.TaskGroup | None = None
        self._monitors: dict[str, Monitor] = {}

    async def run(self, attached: Mapping[str, EngineInfo]) -> str:
        """Roll out until the core stops; returns its reason.

        `attached` are engines that are known to work; the others are attached when they answer.

        Raises:
            StorageError: The run folder cannot be written any more; what is in it is whole.
        """
        async with asyncio.TaskGroup() as self._tasks:
            self.post(*(EngineUp(engine=name, info=info) for name, info in attached.items()))
            for name in self._clients:
                self._follow(name)
            tasks = [self._tasks.create_task(self._report()), self._tasks.create_task(self._measure())]
            await asyncio.wait([self._stopped])
            monitors = [monitor.task for monitor in self._monitors.values()]
            await _ended([*tasks, *monitors, *self._calls.values(), *self._errands])
        if self._alarm:
            self._alarm.cancel()
        self._report_once()
        return self._stopped.result()

    def add_engine(self, name: str, client: EngineClient) -> None:
        """Make an engine part of the fleet; it is attached when it answers."""
        self._clients[name] = client
        self.post(EngineAdded(engine=name))
        self._follow(name)

    def remove_engine(self, name: str) -> None:
        """Forget an engine; what is in flight there goes on elsewhere."""
        self._leave(name)
        self.post(EngineRemoved(engine=name))
        del self._clients[name]

    def check_engine(self, name: str) -> None:
        """Ask again whether an engine is accepted; one that is not gets nothing more until it is."""
        info = self._clients[name].info
        if not self._core.instances[name].up or info is None:
            return  # it is asked when it is attached
        if reason := self._accepts(name, info):
            self._leave(name)
            self.post(EngineDown(engine=name, reason=reason))
            self._follow(name)

    def hurry(self) -> None:
        """Read the telemetry of all engines now."""
        for monitor in self._monitors.values():
            monitor.hurry()

    def _follow(self, name: str) -> None:
        assert self._tasks is not None, "run() comes first"
        monitor = self._monitors[name] = Monitor(
            name, self._clients[name], self._config.engine, accepts=self._accepts, post=self.post
        )
        monitor.start(self._tasks, up=self._core.instances[name].up)

    def _leave(self, name: str) -> None:
        monitor = self._monitors.pop(name)
        monitor.stop()
        self._remember(monitor.task)

    def _remember(self, task: asyncio.Task[None]) -> None:
        """It must end with the rollout, also if it was cancelled: that may be lost."""
        self._errands.add(task)
        task.add_done_callback(self._errands.discard)

    def post(self, *events: Event) -> None:
        """Tell the core what happened in this moment, and do what it says."""
        if self._stopped.done():
            return
        now = self._clock.now()
        try:
            for command in self._core.handle_all(events, now):
                self._execute(command, now)
        except OSError as error:
            self._stopped.set_exception(StorageError.of(self._sink.name, error))
        except Exception as error:  # noqa: BLE001 - a defect ends the run instead of leaving it hanging
            self._stopped.set_exception(error)

    def _execute(self, command: Command, now: float) -> None:
        match command:
            case Dispatch():
                self._dispatch(command, now)
            case Record():
                self._sink.record(command)
            case Emit():
                self._sink.emit(command.sample)
            case Cancel():
                self._cancel(command, now)
            case HandBack():
                self._hand_back(command)
            case Wake():
                self._wake_at(command.at, now)
            case Stop():
                self._stopped.set_result(command.reason)

    def _dispatch(self, dispatch: Dispatch, now: float) -> None:
        assert self._tasks is not None
        self._calls[dispatch.call] = self._tasks.create_task(self._call(dispatch))
        if self._tracer:
            self._tracer.dispatched(dispatch, now)

    def _cancel(self, cancel: Cancel, now: float) -> None:
        if task := self._calls.pop(cancel.call, None):
            task.cancel()
            self._remember(task)
        if self._tracer:
            self._tracer.cancelled(cancel.call, now)

    def _hand_back(self, command: HandBack) -> None:
        assert self._tasks is not None
        self._remember(self._tasks.create_task(self._ask_back(self._clients[command.engine], command.calls)))

    def _wake_at(self, at: float, now: float) -> None:
        if self._alarm:
            self._alarm.cancel()
        self._alarm = asyncio.get_running_loop().call_later(max(0.0, at - now), self.post, Woke())

    # Calls

    async def _call(self, dispatch: Dispatch) -> None:
        client = self._clients[dispatch.engine]
        info = client.info
        assert info is not None, "calls go to attached engines only"
        spec = CallSpec(
            request_id=self._name(dispatch.call),
            model=dispatch.model or info.model,
            prefix=dispatch.prefix,
            params=dispatch.params,
            cache_salt=cache_salt(self._core.run, dispatch.weight_version, dispatch.salt),
            max_tokens=dispatch.max_tokens,
            vocab_size=info.vocab_size,
            load=self._config.engine.kv_pool or info.kv_pool is None,
            save=(self._config.engine.kv_pool and dispatch.continues) or info.kv_pool is None,
        )
        try:
            reply = await client.generate(spec, info, timeout_s=self._config.engine.chunk_timeout_s)
        except EngineError as error:
            if self._calls.pop(dispatch.call, None):
                self._failed(dispatch, error)
            return
        if not self._calls.pop(dispatch.call, None):
            return  # it was cancelled, and the cancellation lost
        if self._tracer:
            self._tracer.finished(
                dispatch.call,
                self._clock.now(),
                tokens=len(reply.token_ids),
                outcome="ok",
                finish_reason=reply.finish_reason,
            )
        self.post(ChunkFinished(call=dispatch.call, reply=reply))

    def _name(self, call: int) -> str:
        """What engines are told that a call is called."""
        return f"{self._core.run}-{self._sink.life}-{call}"

    async def _ask_back(self, client: EngineClient, calls: Sequence[int]) -> None:
        try:
            await client.hand_back(map(self._name, calls), timeout_s=self._config.engine.probe_timeout_s)
        except EngineError:  # it cannot, so there is nothing to wait for
            still = [self._core.calls[call] for call in calls if call in self._core.calls]
            self.post(RequestsCancelled(requests=tuple(call.request.id for call in still)))

    def _failed(self, dispatch: Dispatch, error: EngineError) -> None:
        if error.kind is FailureKind.CONNECTION and dispatch.engine in self._monitors:
            self._monitors[dispatch.engine].hurry()
        if self._tracer:
            self._tracer.finished(
                dispatch.call, self._clock.now(), tokens=0, outcome=str(error.kind), finish_reason=None
            )
        self.post(ChunkFailed(call=dispatch.call, kind=error.kind, message=str(error), retry_after=error.retry_after))

    # Observation

    async def _report(self) -> None:
        while True:
            begun = time.thread_time()
            self._report_once()
            spent = time.thread_time() - begun  # grows with the run; keep it a small share of the loop's time
            await asyncio.sleep(max(self._watch_s, min(_REPORT_PAUSE_S, _REPORT_SHARE * spent)))

    def _report_once(self) -> None:
        self._watch(take_snapshot(self._core, self._clock.now()))

    async def _measure(self) -> None:
        output = self._config.output
        synced = self._clock.now()
        while True:
            snapshot = take_snapshot(self._core, self._clock.now())
            try:
                self._sink.measure(snapshot)
                if self._tracer:
                    self._tracer.counter(snapshot)
                if output.fsync_s and snapshot.now - synced >= output.fsync_s:
                    await asyncio.to_thread(self._sink.sync)
                    synced = snapshot.now
            except OSError as error:
                if not self._stopped.done():
                    self._stopped.set_exception(StorageError.of(self._sink.name, error))
                return
            await asyncio.sleep(output.metrics_s)


async def _ended(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Cancel tasks until they have ended: libraries lose a cancellation that comes in the moment of a timeout."""
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=_INSIST_S)
