"""What lies between an orchestrator and one engine: calls, replies and readings, over a network that may misbehave.

It stands for the asyncio shell and the HTTP client, and is less kind than they are: a cancelled call may still be
answered, an outcome may be told twice, a reading may arrive when its engine is already another process. What it never
does is tell a new orchestrator about calls of a dead one: connections die with their process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from seer_async.errors import FailureKind
from seer_async.events import ChunkFailed, ChunkFinished, EngineDown, EngineReport, EngineUp
from seer_async.testing.faults import Mishap
from seer_async.testing.work import Work

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from seer_async.config import EngineConfig
    from seer_async.events import Dispatch, Event
    from seer_async.testing.clock import VirtualClock
    from seer_async.testing.engine import SimulatedEngine
    from seer_async.testing.faults import Faults
    from seer_async.types import ChunkReply, EngineStats

_LATENCY_S = 0.002
_LATE_S = 5.0
_HEAL_CHECK_S = 0.2


class Link:
    """One orchestrator's connection to one engine; `post` tells that orchestrator, its `incarnation`-th."""

    def __init__(
        self,
        engine: SimulatedEngine,
        post: Callable[[Event], None],
        *,
        incarnation: int,
        config: EngineConfig,
        clock: VirtualClock,
        faults: Faults,
        rng: random.Random,
    ) -> None:
        self.engine = engine
        self._incarnation = incarnation
        self._config = config
        self._clock = clock
        self._faults = faults
        self._rng = rng
        self._post = post
        self._calls: dict[int, Mishap | None] = {}  # not yet answered, and what befalls them
        self._attached: str | None = None  # the boot that the orchestrator knows
        self._silent = 0
        self._closed = False

    # Calls

    def send(self, dispatch: Dispatch) -> None:
        """Bring a call to the engine."""
        self._calls[dispatch.call] = self._faults.mishap()
        self._clock.after(self._delay(), lambda: self._arrive(dispatch))
        self._clock.after(self._config.chunk_timeout_s, lambda: self._time_out(dispatch.call))

    def cancel(self, call: int) -> None:
        """Give a call up; an outcome that is under way still arrives."""
        mishap = self._calls.pop(call, None)
        if mishap is not Mishap.DEAF:
            self._clock.after(self._delay(), lambda: self.engine.abort(self._name(call)))

    def hand_back(self, call: int) -> None:
        """Have a call answered with what it has; an engine that cannot be reached never hears of it."""
        if call in self._calls:
            self._clock.after(self._delay(), lambda: self._ask_back(call))

    def _ask_back(self, call: int) -> None:
        if call in self._calls and self.engine.alive and not self.engine.partitioned:
            self.engine.hand_back(self._name(call))

    def close(self) -> None:
        """The orchestrator is gone, and its connections with it."""
        self._closed = True
        for call in list(self._calls):
            self.cancel(call)

    def _name(self, call: int) -> str:
        return f"{self._incarnation}-{call}"  # an engine may still work for a dead orchestrator

    def _arrive(self, dispatch: Dispatch) -> None:
        if dispatch.call not in self._calls:
            return  # cancelled on the way
        mishap = self._calls[dispatch.call]
        if self.engine.partitioned:
            self._clock.after(_HEAL_CHECK_S, lambda: self._arrive(dispatch))
        elif not self.engine.alive:
            self._fail(dispatch.call, FailureKind.CONNECTION, "refused")
        elif mishap is Mishap.FAIL:
            self._fail(dispatch.call, self._faults.failure(), "made to fail")
        elif mishap is not Mishap.HANG:
            work = Work(
                self._name(dispatch.call),
                dispatch.prefix,
                dispatch.params,
                lambda reply: self._answer(dispatch.call, mishap, reply),
            )
            if refusal := self.engine.submit(work):
                self._fail(dispatch.call, FailureKind.REJECTED, refusal)

    def _answer(self, call: int, mishap: Mishap | None, reply: ChunkReply | None) -> None:
        if reply is None or mishap is Mishap.LOSE:
            self._fail(call, FailureKind.CONNECTION, "reset")
        else:
            self._tell(call, ChunkFinished(call=call, reply=self._spoilt(reply, mishap)))

    def _spoilt(self, reply: ChunkReply, mishap: Mishap | None) -> ChunkReply:
        before_end = len(reply.token_ids) - (reply.finish_reason == "stop")
        if mishap is Mishap.ABORT:
            return shortened(reply, self._rng.randint(0, before_end), "abort", None)
        if mishap is Mishap.FALSE_STOP and before_end:
            return shortened(reply, self._rng.randint(1, before_end), "stop", "only the engine saw it")
        return reply

    def _time_out(self, call: int) -> None:
        if call in self._calls:
            self.engine.abort(self._name(call))
            self._fail(call, FailureKind.TIMEOUT, "no answer in time")

    def _fail(self, call: int, kind: FailureKind, message: str) -> None:
        retry_after = self._rng.choice([None, self._rng.uniform(0, 3)]) if kind is FailureKind.BUSY else None
        self._tell(call, ChunkFailed(call=call, kind=kind, message=message, retry_after=retry_after))

    def _tell(self, call: int, event: Event) -> None:
        mishap = self._calls.pop(call, None)
        self._deliver(event, self._delay(late=mishap is Mishap.LATE))
        if mishap is Mishap.TWICE:
            self._deliver(event, self._delay(late=True))

    def _deliver(self, event: Event, seconds: float) -> None:
        self._clock.after(seconds, lambda: self._receive(event))

    def _receive(self, event: Event) -> None:
        if self._closed:
            return
        if self.engine.partitioned:
            self._deliver(event, _HEAL_CHECK_S)
        elif isinstance(event, ChunkFinished) and not event.reply.versions:
            # Read now, as the client does.
            reply = msgspec.structs.replace(event.reply, version_after=self.engine.version)
            self._post(ChunkFinished(call=event.call, reply=reply))
        else:
            self._post(event)

    def _delay(self, *, late: bool = False) -> float:
        return self._rng.uniform(0, _LATE_S) if late else self._rng.expovariate(1 / _LATENCY_S)

    # Engine

    def watch(self) -> None:
        """Attach the engine when it answers, read its telemetry, and notice when it is gone; for ever."""
        if self._closed:
            return
        self._clock.after(self._config.telemetry_s * self._rng.uniform(0.9, 1.1), self.watch)
        if self._attached is None:
            self._try_attach()
        elif not self.engine.alive:
            self._detach("refused")
        elif self.engine.partitioned:
            self._silent += 1
            if self._silent >= self._config.silent_after:
                self._detach("silent")
        elif self._attached != self.engine.boot:
            self._replace()
        else:
            self._silent = 0
            late = self._faults.mishap() is not None  # it may outlive the process it was taken from
            self._deliver(EngineReport(engine=self.engine.name, stats=self._reading()), self._delay(late=late))

    def _try_attach(self) -> None:
        if self.engine.alive and not self.engine.partitioned:
            self._attached = self.engine.boot
            self._silent = 0
            self._post(EngineUp(engine=self.engine.name, info=self.engine.info))

    def _detach(self, reason: str) -> None:
        self._attached = None
        self._post(EngineDown(engine=self.engine.name, reason=reason))

    def _replace(self) -> None:
        """Another process answers: say that the old one is gone, or only that there is a new one."""
        if self._rng.random() < 0.5:  # noqa: PLR2004 - either must be understood
            self._detach("restarted")
        self._try_attach()

    def _reading(self) -> EngineStats:
        stats = self.engine.stats()
        if not self.engine.lying:
            return stats
        return msgspec.structs.replace(
            stats, running=0, waiting=0, kv_used=self._rng.random(), preemptions=self._rng.randint(0, 10**6)
        )


def shortened(reply: ChunkReply, tokens: int, finish_reason: str, stop_reason: str | None) -> ChunkReply:
    """The reply as if it had ended after `tokens` tokens."""
    return msgspec.structs.replace(
        reply,
        token_ids=reply.token_ids[:tokens],
        logprobs=reply.logprobs[:tokens],
        top_logprobs=None if reply.top_logprobs is None else reply.top_logprobs[:tokens],
        finish_reason=finish_reason,
        stop_reason=stop_reason,
        versions=tuple(
            msgspec.structs.replace(span, end=min(span.end, tokens)) for span in reply.versions if span.start < tokens
        ),
    )
