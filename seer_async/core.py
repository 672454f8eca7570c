"""The core: a state machine from events to commands. No await, clock, random source, socket or logger inside.

Invariants (checked by `invariants.check` after every event in tests):
- every request is in exactly one state, and every RUNNING request has exactly one call in flight;
- a reply is accepted only for the call that the request is waiting for, in the engine epoch it was sent to;
- the `Record` of an accepted chunk comes before any later `Dispatch` of that request;
- a response's tokens are of one weight version, unless they are marked;
- each request ends in exactly one `Emit`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from seer_async.buffer import RequestBuffer
from seer_async.calls import Calls
from seer_async.context import Context
from seer_async.ending import Texts
from seer_async.errors import FailureKind
from seer_async.events import (
    AbortRequested,
    AdapterChanged,
    ChunkFailed,
    ChunkFinished,
    Command,
    DrainRequested,
    EngineAdded,
    EngineDown,
    EngineHeld,
    EngineRemoved,
    EngineReport,
    EngineUp,
    Event,
    GroupAdded,
    HandBackRequested,
    InputClosed,
    Paused,
    RequestsCancelled,
    Restored,
    Resumed,
    Stop,
    VersionSet,
    Wake,
    Woke,
)
from seer_async.instance import Instance
from seer_async.options import GroupOptions
from seer_async.policies import find_policy
from seer_async.request import TERMINAL, Request, State
from seer_async.responses import Responses
from seer_async.scheduler import Scheduler
from seer_async.turn import Turn
from seer_async.versions import Versions

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from tokenizers import Tokenizer

    from seer_async.config import Config

NO_ENGINE = "no usable engine"  # begins the error of a request that a lasting core gives up
_BUSY_WAIT_S = 1.0  # when an engine says it is busy but not for how long


class Core:
    """All decisions of a rollout.

    `run` names the run; `tokenizer` decides text and stop strings (None: no text); `lengths` are true lengths
    by request id, for policies that need them; `context` estimates lengths. Feed events to `handle` and execute what it
    returns, in order.

    A core that is `lasting` serves groups that come and go: it forgets those that have ended, fails requests for which
    there is no engine instead of stopping, and samples from one weight version at a time, the latest it has heard of
    from a running engine; an engine that has another one, as after a restart, gets nothing.
    """

    def __init__(
        self,
        config: Config,
        engines: Sequence[str],
        *,
        run: str,
        seed: int,
        tokenizer: Tokenizer | None = None,
        lengths: Mapping[str, int] | None = None,
        context: Context | None = None,
        lasting: bool = False,
    ) -> None:
        self.config = config
        self.run = run
        self.lasting = lasting
        self.paused = False
        self.stopped: str | None = None
        self.closing: str | None = None
        self.retries = 0
        self.context = context or Context()
        self.policy = find_policy(config.scheduler.policy)(config.scheduler, self.context, lengths)
        self.buffer = RequestBuffer(self.policy)
        self.instances = {name: Instance(name, config.engine) for name in engines}
        self.versions = Versions(self.buffer, lasting=lasting)
        self._turn = turn = Turn()
        self.calls = Calls(turn, run, self.buffer, self.policy, self.versions)
        self.responses = Responses(
            turn,
            self.buffer,
            self.policy,
            Texts(tokenizer),
            run=run,
            seed=seed,
            options=GroupOptions.of(config),
            lasting=lasting,
        )
        self._scheduler = Scheduler(
            self.buffer,
            self.instances,
            policy=self.policy,
            versions=self.versions,
            calls=self.calls,
            responses=self.responses,
            staggered=config.engine.stagger > 0,
        )
        self._idle_since: float | None = None  # requests are open, and nothing is in flight
        self._woken_at: float | None = None

    def handle(self, event: Event, now: float) -> list[Command]:
        """Take in one event that happened at `now`; returns the commands to execute, in order."""
        return self.handle_all([event], now)

    def handle_all(self, events: Iterable[Event], now: float) -> list[Command]:
        """Take in events of one moment before deciding: engines that come up together share the work at once."""
        self._turn.begin(now)
        if self.stopped is None:
            for event in events:
                self._take(event)
            if not (self.closing or self.paused):
                self._scheduler.schedule(now)
            self._settle(now)
        return self._turn.commands

    def _take(self, event: Event) -> None:  # noqa: C901, PLR0912 - one arm for each event
        match event:
            case EngineUp() | EngineDown() | EngineReport() | EngineHeld() | EngineRemoved() if (
                event.engine not in self.instances
            ):
                pass  # it was removed meanwhile
            case ChunkFinished():
                self._chunk_finished(event)
            case ChunkFailed():
                self._chunk_failed(event)
            case EngineReport():
                self._observe(event)
            case GroupAdded():
                self.responses.add(event)
            case Restored():
                self.responses.restore(event)
            case EngineUp():
                self._engine_up(event)
            case EngineDown():
                self._engine_down(event.engine, event.reason)
            case RequestsCancelled():
                self._give_up(event)
            case HandBackRequested():
                self._hand_back(event)
            case EngineHeld():
                self._hold(self.instances[event.engine], held=event.held)
            case EngineAdded():
                self.instances[event.engine] = Instance(event.engine, self.config.engine)
            case EngineRemoved():
                self._engine_down(event.engine, "removed")
                del self.instances[event.engine]
            case VersionSet():
                self.versions.set(event.version)
            case AdapterChanged():
                self._change_adapter(event.model)
            case Paused() | Resumed():
                self.paused = isinstance(event, Paused)
                self._idle_since = None
                self._scheduler.stranded.clear()
                self.buffer.unpark()
            case DrainRequested():
                self.closing = self.closing or "drained"
            case AbortRequested():
                self.closing = "aborted"
                self._take_back(list(self.calls))
            case InputClosed():
                self.responses.close()
            case Woke():
                self._woken_at = None
                self.buffer.unpark()

    # Requests

    def _open(self, names: Iterable[str]) -> list[Request]:
        """Those of the requests that have not ended."""
        found = [self.buffer.requests[name] for name in names if name in self.buffer.requests]
        return [request for request in found if request.state not in TERMINAL]

    def _take_back(self, calls: Iterable[int]) -> None:
        """Give up calls; their requests wait for others."""
        for call in calls:
            self.responses.put_back(self.calls.drop(call))

    def _give_up(self, event: RequestsCancelled) -> None:
        for request in self._open(event.requests):
            if request.call is not None:
                self.calls.drop(request.call)
            self.responses.give_up(request, "abort")

    def _hand_back(self, event: HandBackRequested) -> None:
        calls: list[int] = []
        for request in self._open(event.requests):
            if request.call is None:
                self.responses.give_up(request, "abort")
            elif not request.closing:
                request.closing = True
                calls.append(request.call)
        self.calls.hand_back(calls)

    def _change_adapter(self, model: str) -> None:
        self.versions.replace_adapter(model)
        for request in self.buffer.unfinished():
            if request.group.options.model != model:
                continue
            if request.call is not None:
                self._take_back([request.call])
            if request.state in TERMINAL:
                continue
            if request.group.options.mixed_versions == "mark":
                request.mixed = request.mixed or request.generated > 0
            elif request.generated:
                self.responses.restart(request)

    # Engines

    def _engine_up(self, event: EngineUp) -> None:
        instance = self.instances[event.engine]
        if instance.up:
            self._engine_down(event.engine, "restarted")
        instance.start_epoch(event.info)
        self.versions.current = self.versions.current or instance.version
        self._scheduler.review()
        self.buffer.unpark()

    def _engine_down(self, name: str, reason: str) -> None:
        for request in self.calls.lose(self.instances[name], reason):
            self.responses.put_back(request)
        self.buffer.unpark()

    def _hold(self, instance: Instance, *, held: bool) -> None:
        if held and not instance.held:
            self._take_back(list(instance.in_flight))
        instance.held = held
        self.buffer.unpark()

    def _observe(self, event: EngineReport) -> None:
        instance = self.instances[event.engine]
        if not instance.up or instance.info is None or event.stats.boot != instance.info.boot:
            return  # a report of another epoch says nothing about this one
        instance.observe(event.stats)
        version = event.stats.weight_version
        if version is not None and version != instance.version:
            self.versions.changed(instance, version)

    # Replies

    def _chunk_failed(self, event: ChunkFailed) -> None:
        call = self.calls.close(event.call)
        if call is None:
            return
        request, instance = call.request, call.instance
        self.retries += 1
        if event.kind is FailureKind.BUSY:
            instance.close_for(event.retry_after or _BUSY_WAIT_S, self._turn.now)
        elif event.kind is FailureKind.REJECTED:
            request.rejected_by.add(instance.name)
        else:
            request.failures += 1
            request.avoid = instance.name
            instance.failed(event.message, self._turn.now)
        if self._hopeless(request) and not request.closing:
            self.responses.fail(request, f"{event.kind}: {event.message}")
        else:
            self.responses.put_back(request)

    def _hopeless(self, request: Request) -> bool:
        ups = sum(instance.up for instance in self.instances.values())
        return len(request.rejected_by) >= min(2, max(ups, 1)) or request.failures >= self.config.rollout.max_attempts

    def _chunk_finished(self, event: ChunkFinished) -> None:
        call = self.calls.close(event.call)
        if call is None:
            return
        request, instance, reply = call.request, call.instance, event.reply
        instance.succeeded()
        assert request.generated == call.generated, "a request's tokens change only through its call"
        if not reply.token_ids:  # aborted on the engine before its first token: someone paused it
            if not self.paused and not request.closing:
                instance.close_for(_BUSY_WAIT_S, self._turn.now)
            self.responses.put_back(request)
            return
        version, mixed = self.versions.of_reply(call, reply)
        options = request.group.options
        cut_short = options.indivisible and reply.finish_reason == "abort" and not request.closing
        if cut_short or (mixed and options.mixed_versions == "restart"):
            self.responses.restart(request)
            return
        chunk = self.responses.accept(call, reply, version, mixed=mixed)
        instance.sampled(chunk.tokens, chunk.end - chunk.start)

    # Ending the run

    def _settle(self, now: float) -> None:
        """Stop when nothing more can happen, else ask to be woken when time alone may change something."""
        buffer = self.buffer
        if buffer.closed and not buffer.open and not self.calls:
            self._stop("done")
        elif buffer.closed and buffer.open and self.policy.enough(buffer.counts[State.DONE], buffer.total):
            self._take_back(list(self.calls))
            for request in buffer.unfinished():
                self.responses.give_up(request, "unfinished")
            self._stop("done")
        elif self.closing and not self.calls:
            self._stop(self.closing)
        else:
            self._wake_when_needed(now)

    def _wake_when_needed(self, now: float) -> None:
        due = [i.closed_until for i in self.instances.values() if i.up and i.closed_until > now]
        if self.lasting and not self.paused:
            due += self._despair_of_stranded(now)
        held = any(i.held and i.up for i in self.instances.values())
        if self.calls or not self.buffer.open or self.paused or held:
            self._idle_since = None
        else:
            self._idle_since = now if self._idle_since is None else self._idle_since
            end = self._idle_since + self.config.engine.patience_s
            if now < end:
                due.append(end)
            elif self.lasting:
                self._despair()
            else:
                self._stop("no_engine")
                return
        if due and (self._woken_at is None or min(due) < self._woken_at):
            self._woken_at = min(due)
            self._turn.say(Wake(at=self._woken_at))

    def _despair(self) -> None:
        self._idle_since = None
        error = self._no_engine()
        for request in self.buffer.unfinished():
            self.responses.fail(request, error)

    def _despair_of_stranded(self, now: float) -> list[float]:
        """Fail requests that no engine could take for too long, while others run; returns when the next is due."""
        stranded = self._scheduler.stranded
        while stranded:
            request, since = next(iter(stranded.items()))
            end = since + self.config.engine.patience_s
            lost = request.state not in TERMINAL and not self._scheduler.could_go(request)
            if lost and now < end:
                return [end]
            del stranded[request]
            if lost:
                self.responses.fail(request, self._no_engine())
        return []

    def _no_engine(self) -> str:
        current = self.versions.current
        stale = [i.name for i in self.instances.values() if i.up and i.version != current]
        said = "; ".join(f"{i.name}: {i.last_error}" for i in self.instances.values() if i.last_error)
        why = f"{', '.join(stale)} must get weight version {current} first" if stale else said or "none answers"
        return f"{NO_ENGINE}: {why}"

    def _stop(self, reason: str) -> None:
        self.stopped = reason
        self._turn.say(Stop(reason=reason))
