"""Each of these mistakes, planted in the core, is found by the checks of the fault tests within a hundred seeds."""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

import seer_async.calls as calls_module
import seer_async.ending as ending_module
import seer_async.responses as responses_module
import seer_async.sampling as sampling_module
from seer_async.buffer import RequestBuffer
from seer_async.calls import Calls
from seer_async.context import Context
from seer_async.core import Core
from seer_async.errors import FailureKind
from seer_async.events import Cancel, Record
from seer_async.instance import Instance
from seer_async.policies.seer import Seer
from seer_async.request import Request
from seer_async.responses import Responses
from seer_async.scheduler import Scheduler
from seer_async.versions import Versions

from .scenario import Lasting, Scenario

MOST_SEEDS = 100

PLANTS: list[Callable[[pytest.MonkeyPatch], None]] = []
plant = PLANTS.append
PLANTS_IN_SERVICES: list[Callable[[pytest.MonkeyPatch], None]] = []  # in what only a core that lasts does
plant_in_services = PLANTS_IN_SERVICES.append


def before(patch: pytest.MonkeyPatch, owner: Any, name: str, extra: Callable[..., None]) -> None:
    """Do `extra`, with the same arguments, before a method."""
    original = getattr(owner, name)

    def mutant(*args: Any) -> Any:
        extra(*args)
        return original(*args)

    patch.setattr(owner, name, mutant)


def after(patch: pytest.MonkeyPatch, owner: Any, name: str, extra: Callable[..., None]) -> None:
    """Do `extra`, with the same arguments, after a method."""
    original = getattr(owner, name)

    def mutant(*args: Any) -> Any:
        value = original(*args)
        extra(*args)
        return value

    patch.setattr(owner, name, mutant)


# Calls and replies


@plant
def late_reply_accepted(patch: pytest.MonkeyPatch) -> None:
    """The fence of calls is gone: a reply to a call that was given up is taken for the request's latest."""
    close = Calls.close
    ever: dict[tuple[int, int], Any] = {}

    def mutant(self: Calls, call_id: int) -> Any:
        call = close(self, call_id)
        if call is not None:
            ever[id(self), call_id] = call
        elif call := ever.get((id(self), call_id)):
            if call.request.finish_reason or call.request.call is None:
                return None
            close(self, call.request.call)
            call.generated, call.n = call.request.generated, len(call.request.chunks)
        return call

    patch.setattr(Calls, "close", mutant)


@plant
def calls_survive_their_epoch(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Instance, "lost", lambda self, reason: setattr(self, "up", False) or [])


@plant
def epoch_not_counted(patch: pytest.MonkeyPatch) -> None:
    after(patch, Instance, "start_epoch", lambda self, info: setattr(self, "epoch", 1))


@plant
def lost_call_not_cancelled(patch: pytest.MonkeyPatch) -> None:
    def extra(self: Core, name: str, reason: str) -> None:
        self._turn.commands = [command for command in self._turn.commands if not isinstance(command, Cancel)]

    after(patch, Core, "_engine_down", extra)


@plant
def dispatched_twice(patch: pytest.MonkeyPatch) -> None:
    """A request that comes back after a failure is queued twice."""
    send = Calls.send

    def mutant(self: Calls, request: Request, instance: Instance, **size: int) -> None:
        again = request.failures > 0
        send(self, request, instance, **size)
        if again:
            send(self, request, instance, **size)

    patch.setattr(Calls, "send", mutant)


@plant
def stale_report_accepted(patch: pytest.MonkeyPatch) -> None:
    observe = Core._observe

    def mutant(self: Core, event: Any) -> None:
        instance = self.instances[event.engine]
        if instance.up and instance.info:
            epoch = instance.info
            instance.info = msgspec.structs.replace(epoch, boot=event.stats.boot)
            observe(self, event)
            instance.info = epoch

    patch.setattr(Core, "_observe", mutant)


# Room and health


@plant
def room_leaks_with_a_lost_engine(patch: pytest.MonkeyPatch) -> None:
    before(patch, Instance, "lost", lambda self, reason: setattr(self, "leak", self.reserved))
    after(patch, Instance, "lost", lambda self, reason: setattr(self, "reserved", self.leak))


@plant
def room_leaks_on_cancel(patch: pytest.MonkeyPatch) -> None:
    def mutant(self: Calls, call_id: int) -> Request:
        call = self._calls.pop(call_id)
        self._turn.say(Cancel(call=call.id, engine=call.instance.name))
        return call.request

    patch.setattr(Calls, "drop", mutant)


@plant
def kv_room_ignored(patch: pytest.MonkeyPatch) -> None:
    def mutant(self: Instance, request: Request, tokens: int) -> int | None:
        return self.need(request, tokens) if len(self.in_flight) < self.slots else None

    patch.setattr(Instance, "room_for", mutant)


@plant
def prompt_taken_for_shared_by_nobody(patch: pytest.MonkeyPatch) -> None:
    need = Instance.need

    def mutant(self: Instance, request: Any, tokens: int) -> int:
        alone = (request.group.id, self.version) not in self._sharers
        return need(self, request, tokens) - (self._shared_blocks(request) if alone else 0)

    patch.setattr(Instance, "need", mutant)


@plant
def prompt_taken_for_shared_where_nothing_is(patch: pytest.MonkeyPatch) -> None:
    def mutant(self: Instance, request: Any) -> int:
        assert self.info
        return (request.group.prompt_len - 1) // self.info.block_size

    patch.setattr(Instance, "_shared_blocks", mutant)


@plant
def shared_prompt_never_given_back(patch: pytest.MonkeyPatch) -> None:
    release = Instance.release

    def mutant(self: Instance, call: int) -> None:
        _, sharers = self.in_flight.get(call, (0, None))
        if sharers is not None and sharers.calls == 1:
            self.reserved += sharers.blocks
        release(self, call)

    patch.setattr(Instance, "release", mutant)


@plant
def rejection_blamed_on_the_engine(patch: pytest.MonkeyPatch) -> None:
    def extra(self: Core, event: Any) -> None:
        if event.kind is FailureKind.REJECTED and (call := self.calls.get(event.call)):
            call.instance.failed("4xx", self._turn.now)

    before(patch, Core, "_chunk_failed", extra)


@plant
def pause_ignored(patch: pytest.MonkeyPatch) -> None:
    """Retry-After is not honoured."""
    patch.setattr(Instance, "close_for", lambda self, seconds, now: None)


@plant
def busy_counts_as_failure(patch: pytest.MonkeyPatch) -> None:
    failed = Core._chunk_failed

    def mutant(self: Core, event: Any) -> None:
        busy = event.kind is FailureKind.BUSY
        failed(self, msgspec.structs.replace(event, kind=FailureKind.SERVER) if busy else event)

    patch.setattr(Core, "_chunk_failed", mutant)


@plant
def attempts_without_end(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Core, "_hopeless", lambda self, request: False)


@plant
def never_woken(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Core, "_wake_when_needed", lambda self: None)


@plant
def parked_request_forgotten(patch: pytest.MonkeyPatch) -> None:
    unpark = RequestBuffer.unpark
    patch.setattr(RequestBuffer, "unpark", lambda self, requests=None: requests and unpark(self, requests))


# Tokens


@plant
def tokens_appended_twice(patch: pytest.MonkeyPatch) -> None:
    after(patch, Request, "accept", lambda self, reply, chunk: self.tokens.extend(reply.token_ids[-1:]))


@plant
def chunk_accepted_twice(patch: pytest.MonkeyPatch) -> None:
    """Tokens, logprobs and count agree with each other, but with nothing else."""

    def extra(self: Request, reply: Any, chunk: Any) -> None:
        if chunk.n == 1:
            self.tokens.extend(reply.token_ids)
            self.logprobs.extend(reply.logprobs)
            self.generated += chunk.tokens
            self.chunks[-1] = msgspec.structs.replace(chunk, tokens=2 * chunk.tokens)

    after(patch, Request, "accept", extra)


@plant
def restart_keeps_logprobs(patch: pytest.MonkeyPatch) -> None:
    restart = Request.restart

    def mutant(self: Request) -> None:
        logprobs = self.logprobs
        restart(self)
        self.logprobs = logprobs

    patch.setattr(Request, "restart", mutant)


@plant
def limit_ignored(patch: pytest.MonkeyPatch) -> None:
    def mutant(self: Scheduler, request: Request) -> int:
        return request.group.options.chunk_size or request.group.limit

    patch.setattr(Scheduler, "_chunk_bound", mutant)


@plant
def stop_string_cut_off_by_one(patch: pytest.MonkeyPatch) -> None:
    truncated = ending_module._truncated
    patch.setattr(ending_module, "_truncated", lambda reply, tokens: truncated(reply, tokens - 1))


@plant
def stop_string_of_the_engine_believed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ending_module, "_ended_by_token", lambda reply: reply.finish_reason == "stop")


@plant
def end_of_chunk_ends_the_response(patch: pytest.MonkeyPatch) -> None:
    ending = responses_module.ending

    def mutant(request: Request, reply: Any) -> Any:
        return ("length", None) if reply.finish_reason == "length" else ending(request, reply)

    patch.setattr(responses_module, "ending", mutant)


@plant
def min_tokens_of_each_chunk(patch: pytest.MonkeyPatch) -> None:
    params = calls_module.call_params

    def mutant(sampling: Any, **options: Any) -> dict[str, Any]:
        return params(sampling, **options) | {"min_tokens": sampling.min_tokens}

    patch.setattr(calls_module, "call_params", mutant)


@plant
def seed_of_each_chunk_the_same(patch: pytest.MonkeyPatch) -> None:
    """Engines that draw noise anew for each call would repeat the noise of the chunk before."""
    patch.setattr(sampling_module, "chunk_seed", lambda seed, generated, position_seeds: seed)


# Weight versions


@plant
def mixed_reply_accepted(patch: pytest.MonkeyPatch) -> None:
    of_reply = Versions.of_reply
    patch.setattr(Versions, "of_reply", lambda self, call, reply: (of_reply(self, call, reply)[0], False))


@plant
def continued_on_other_weights(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Versions, "fit", lambda self, request, instance: True)


# Journal and resuming


@plant
def record_skipped(patch: pytest.MonkeyPatch) -> None:
    def extra(self: Core, event: Any) -> None:
        commands = self._turn.commands
        commands[:] = [c for c in commands if not (isinstance(c, Record) and c.chunk and c.chunk.n == 2)]

    after(patch, Core, "_chunk_finished", extra)


@plant
def restart_not_recorded(patch: pytest.MonkeyPatch) -> None:
    def extra(self: Responses, request: Request) -> None:
        self._turn.commands.pop()

    after(patch, Responses, "restart", extra)


@plant
def record_after_dispatch(patch: pytest.MonkeyPatch) -> None:
    handle = Core.handle
    patch.setattr(
        Core, "handle", lambda self, event, now: sorted(handle(self, event, now), key=lambda c: isinstance(c, Record))
    )


@plant
def emitted_again_on_resume(patch: pytest.MonkeyPatch) -> None:
    restore = Responses.restore
    patch.setattr(
        Responses, "restore", lambda self, event: restore(self, msgspec.structs.replace(event, emitted=False))
    )


@plant
def chunk_forgotten_on_resume(patch: pytest.MonkeyPatch) -> None:
    restore = Responses.restore

    def mutant(self: Responses, event: Any) -> None:
        if event.record.chunk is None or event.record.chunk.n == 0:
            restore(self, event)

    patch.setattr(Responses, "restore", mutant)


@plant
def mark_forgotten_on_resume(patch: pytest.MonkeyPatch) -> None:
    restore = Responses.restore

    def mutant(self: Responses, event: Any) -> None:
        restore(self, msgspec.structs.replace(event, record=msgspec.structs.replace(event.record, mixed=False)))

    patch.setattr(Responses, "restore", mutant)


# A core that lasts


@plant_in_services
def group_never_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RequestBuffer, "forget", lambda self, group: None)


@plant_in_services
def estimate_never_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Context, "forget", lambda self, group: None)


@plant_in_services
def policy_remembers(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Seer, "forget", lambda self, group: None)


@plant_in_services
def open_requests_miscounted_when_joined(patch: pytest.MonkeyPatch) -> None:
    after(patch, RequestBuffer, "add", lambda self, group, requests: setattr(group, "open", len(requests)))


@plant_in_services
def handed_back_and_sent_again(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Responses, "put_back", lambda self, request: self._buffer.wait(request, self._turn.now))


@plant_in_services
def sent_in_a_pause(patch: pytest.MonkeyPatch) -> None:
    after(patch, Core, "_take", lambda self, event: setattr(self, "paused", False))


@plant_in_services
def held_engine_used(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Instance, "usable", lambda self, now: self.up and now >= self.closed_until)


@plant_in_services
def despair_too_early(patch: pytest.MonkeyPatch) -> None:
    before(patch, Core, "_despair_of_stranded", lambda self, now: _age(self._scheduler))


def _age(scheduler: Scheduler) -> None:
    scheduler.stranded = dict.fromkeys(scheduler.stranded, 0.0)


@pytest.mark.parametrize(
    ("planted", "kind"),
    [*((planted, Scenario) for planted in PLANTS), *((planted, Lasting) for planted in PLANTS_IN_SERVICES)],
    ids=lambda value: value.__name__,
)
def test_planted_bug_is_found(
    planted: Callable[[pytest.MonkeyPatch], None], kind: type[Scenario], monkeypatch: pytest.MonkeyPatch
) -> None:
    planted(monkeypatch)
    for seed in range(MOST_SEEDS):
        try:
            kind(seed).run()
        except Exception as error:  # noqa: BLE001 - a planted bug may break anything
            print(f"found by seed {seed}: {type(error).__name__}: {str(error)[:200]}")
            return
    pytest.fail(f"{MOST_SEEDS} seeds do not find it")


def test_these_seeds_find_nothing_in_the_core_itself() -> None:
    for seed in range(60):
        Scenario(seed).run()
        Lasting(seed).run()
