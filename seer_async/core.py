"""The core: a state machine from events to commands. No await, clock, random source, socket or logger inside.

Invariants (checked by `invariants.check` after every event in tests):
- every request is in exactly one state, and every RUNNING request has exactly one call in flight;
- a reply is accepted only for the call that the request is waiting for, in the engine epoch it was sent to;
- the `Record` of an accepted chunk comes before any later `Dispatch` of that request;
- a response's tokens are of one weight version, unless they are marked;
- each request ends in exactly one `Emit`.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

import msgspec

from seer_async.buffer import RequestBuffer
from seer_async.context import Context
from seer_async.errors import FailureKind
from seer_async.events import (
    AbortRequested,
    AdapterChanged,
    Cancel,
    ChunkFailed,
    ChunkFinished,
    Command,
    Dispatch,
    DrainRequested,
    Emit,
    EngineAdded,
    EngineDown,
    EngineHeld,
    EngineRemoved,
    EngineReport,
    EngineUp,
    Event,
    GroupAdded,
    InputClosed,
    Paused,
    Record,
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
from seer_async.request import TERMINAL, Group, Request, State
from seer_async.sampling import call_params, response_seed
from seer_async.text import TextStream, whole_text
from seer_async.types import Chunk, ChunkReply

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from tokenizers import Tokenizer

    from seer_async.config import Config

NO_ENGINE = "no usable engine"  # begins the error of a request that a lasting core gives up
_BUSY_WAIT_S = 1.0  # when an engine says it is busy but not for how long
_TAIL = 0.1  # the last tenth of the requests
_SHORTEST_FIRST = 0.25  # of the usual length, a request's first chunk
_GOLDEN = 0.6180339887498949
_GROUP_STRIDE = 16  # between the numbers of one group's first requests and the next
_MOST_SKIPPED = 8  # requests set aside in one cycle because the only engines that may take them are full


class Call(msgspec.Struct):
    """A call in flight: what its reply must match."""

    id: int
    request: Request
    instance: Instance
    epoch: int
    n: int
    generated: int
    max_tokens: int
    weight_version: str
    start: float


class Core:
    """All decisions of a rollout.

    `run` names the run; `tokenizer` decides text and stop strings (None: no text); `lengths` are true lengths
    by request id, for policies that need them. Feed events to `handle` and execute what it returns, in order.

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
        lasting: bool = False,
    ) -> None:
        self.config = config
        self.lasting = lasting
        self.version: str | None = None  # what is sampled from, in a core that lasts
        self.paused = False
        self.run = run
        self.seed = seed
        self.context = Context()
        self.policy = find_policy(config.scheduler.policy)(config.scheduler, self.context, lengths)
        self.buffer = RequestBuffer(self.policy)
        self.instances = {name: Instance(name, config.engine) for name in engines}
        self.calls: dict[int, Call] = {}
        self.stopped: str | None = None
        self.closing: str | None = None
        self.tokens = 0  # accepted and not thrown away by a restart
        self.retries = 0
        self.migrations = 0
        self.pooled = 0  # tokens of prefixes that engines loaded from a KV pool, by their own account
        self.restarts = 0
        self._adapters = Counter[str]()  # how often each LoRA adapter was replaced
        self._options = GroupOptions.of(config)
        self._tokenizer = tokenizer
        self._next_call = self._next_group = 0
        self._input_closed = False
        self._idle_since: float | None = None  # requests are open, and nothing is in flight
        self._woken_at: float | None = None
        self._out: list[Command] = []
        self._now = 0.0

    def handle(self, event: Event, now: float) -> list[Command]:
        """Take in one event that happened at `now`; returns the commands to execute, in order."""
        return self.handle_all([event], now)

    def handle_all(self, events: Iterable[Event], now: float) -> list[Command]:
        """Take in events of one moment before deciding: engines that come up together share the work at once."""
        self._now = now
        self._out = []
        if self.stopped is None:
            for event in events:
                self._take(event)
            self._schedule()
            self._settle()
        return self._out

    def _take(self, event: Event) -> None:  # noqa: C901, PLR0912 - one arm for each event
        match event:
            case ChunkFinished():
                self._chunk_finished(event)
            case ChunkFailed():
                self._chunk_failed(event)
            case EngineReport():
                self._observe(event)
            case GroupAdded():
                self._add(event)
            case Restored():
                self._restore(event)
            case EngineUp():
                self._engine_up(event)
            case EngineDown():
                self._engine_down(event.engine, event.reason)
            case RequestsCancelled():
                self._give_up(event)
            case EngineHeld():
                self._hold(self.instances[event.engine], held=event.held)
            case EngineAdded():
                self.instances[event.engine] = Instance(event.engine, self.config.engine)
            case EngineRemoved():
                self._engine_down(event.engine, "removed")
                del self.instances[event.engine]
            case VersionSet():
                self._set_version(event.version)
            case AdapterChanged():
                self._change_adapter(event.model)
            case Paused() | Resumed():
                self.paused = isinstance(event, Paused)
                self._idle_since = None
            case DrainRequested():
                self.closing = self.closing or "drained"
            case AbortRequested():
                self.closing = "aborted"
                self._cancel_all()
            case InputClosed():
                self._input_closed = True
            case Woke():
                self._woken_at = None
                self.buffer.unpark()

    # Prompts in

    def _add(self, event: GroupAdded) -> None:
        group = self.buffer.groups.get(event.prompt.id)
        assert group is None or self.lasting, f"group {event.prompt.id} is added twice"
        if group is None:
            group = Group(event.prompt, self._next_group, event.limit, event.options or self._options)
            self._next_group += 1
        first = len(group.requests)
        requests = []
        for number in range(event.n):
            forced = event.forced_lengths[number] if event.forced_lengths else None
            seed = event.seeds[number] if event.seeds else response_seed(self.seed, group.id, first + number)
            requests.append(Request(group, first + number, seed, self._now, forced))
        self.buffer.add(group, requests)

    def _give_up(self, event: RequestsCancelled) -> None:
        for name in event.requests:
            request = self.buffer.requests.get(name)
            if request is None or request.state in TERMINAL:
                continue
            if request.call is not None:
                self._drop(self.calls[request.call])
            request.finish_reason = "abort"
            self._end(request, State.UNFINISHED)

    def _restore(self, event: Restored) -> None:
        record = event.record
        request = self.buffer.requests[record.request]
        if record.chunk is None:
            self.tokens -= request.generated
            request.restart()
            self.buffer.wait(request, self._now)
            return
        request.accept(_reply_of(record), record.chunk)
        self.tokens += record.chunk.tokens
        request.version = record.chunk.weight_version
        request.mixed = request.mixed or record.mixed
        if request.first_start is None:
            request.first_start = record.chunk.start
        self.context.observe(request)
        self.policy.learned(request)
        request.finish_reason, request.stop_reason = record.finish_reason, record.stop_reason
        if request.finish_reason is None and request.generated >= request.group.limit:
            request.finish_reason = "length"  # today's engines have a shorter context than those before
        if request.finish_reason is None:
            self.buffer.wait(request, self._now)  # its place in the queue depends on what it has generated
            return
        self._finish(request, emit=not event.emitted)

    # Engines

    def _engine_up(self, event: EngineUp) -> None:
        instance = self.instances[event.engine]
        if instance.up:
            self._engine_down(event.engine, "restarted")
        instance.start_epoch(event.info)
        self.version = self.version or instance.version
        self.buffer.unpark()

    def _engine_down(self, name: str, reason: str) -> None:
        for call in self.instances[name].lost(reason):
            self._out.append(Cancel(call=call, engine=name))
            self._put_back(self.calls.pop(call).request)
        self.buffer.unpark()

    def _hold(self, instance: Instance, *, held: bool) -> None:
        if held and not instance.held:
            for call in [call for call in self.calls.values() if call.instance is instance]:
                self._drop(call)
                self._put_back(call.request)
        instance.held = held
        self.buffer.unpark()

    def _observe(self, event: EngineReport) -> None:
        instance = self.instances[event.engine]
        if not instance.up or instance.info is None or event.stats.boot != instance.info.boot:
            return  # a report of another epoch says nothing about this one
        instance.observe(event.stats)
        version = event.stats.weight_version
        if version is not None and version != instance.version:
            instance.version = version
            self._set_version(version)

    def _set_version(self, version: str) -> None:
        self.version = version
        self.buffer.unpark()

    def _change_adapter(self, model: str) -> None:
        self._adapters[model] += 1
        for request in self.buffer.unfinished():
            if request.group.options.model != model:
                continue
            if request.call is not None:
                self._drop(self.calls[request.call])
                self._put_back(request)
            if request.group.options.mixed_versions == "mark":
                request.mixed = request.mixed or request.generated > 0
            elif request.generated:
                self._restart(request)

    # Replies

    def _chunk_failed(self, event: ChunkFailed) -> None:
        call = self._close(event.call)
        if call is None:
            return
        request, instance = call.request, call.instance
        self.retries += 1
        if event.kind is FailureKind.BUSY:
            instance.close_for(event.retry_after or _BUSY_WAIT_S, self._now)
        elif event.kind is FailureKind.REJECTED:
            request.rejected_by.add(instance.name)
        else:
            request.failures += 1
            request.avoid = instance.name
            instance.failed(event.message, self._now)
        if self._hopeless(request):
            self._fail(request, f"{event.kind}: {event.message}")
        else:
            self._put_back(request)

    def _hopeless(self, request: Request) -> bool:
        ups = sum(instance.up for instance in self.instances.values())
        return len(request.rejected_by) >= min(2, max(ups, 1)) or request.failures >= self.config.rollout.max_attempts

    def _chunk_finished(self, event: ChunkFinished) -> None:
        call = self._close(event.call)
        if call is None:
            return
        request, reply = call.request, event.reply
        call.instance.succeeded()
        assert request.generated == call.generated, "a request's tokens change only through its call"
        if not reply.token_ids:  # aborted on the engine before its first token: someone paused it
            if not self.paused:
                call.instance.close_for(_BUSY_WAIT_S, self._now)
            self._put_back(request)
            return
        version, mixed = self._version_of(call, reply)
        options = request.group.options
        cut_short = options.indivisible and reply.finish_reason == "abort"
        if cut_short or (mixed and options.mixed_versions == "restart"):
            self._restart(request)
            return
        reply, stop = self._cut_at_stop(request, reply)
        chunk = Chunk(
            n=call.n,
            tokens=len(reply.token_ids),
            engine=call.instance.name,
            epoch=call.epoch,
            weight_version=version,
            attempt=request.attempt,
            queued=request.queued,
            start=call.start,
            end=self._now,
            cached=reply.cached,
            pooled=reply.pooled,
        )
        self.migrations += request.last_engine not in {None, chunk.engine}
        self.pooled += reply.pooled
        request.accept(reply, chunk)
        request.version, request.mixed = version, request.mixed or mixed
        request.failures, request.avoid = 0, None
        request.rejected_by.clear()
        call.instance.generated += chunk.tokens
        call.instance.paced(chunk.tokens, self._now - call.start)
        self.tokens += chunk.tokens
        request.finish_reason, request.stop_reason = stop or self._ending(request, reply)
        self._out.append(_record_of(request, reply, chunk))
        self.context.observe(request)
        self.policy.learned(request)
        if request.finish_reason:
            self._finish(request)
        else:
            self.buffer.wait(request, self._now)

    def _version_of(self, call: Call, reply: ChunkReply) -> tuple[str, bool]:
        """The weight version of the reply's last token, and whether the response now mixes versions."""
        versions = [span.version for span in reply.versions if span.end > span.start]
        if not versions:
            versions = [call.weight_version, reply.version_after or call.instance.version]
        last = versions[-1]
        if last != call.weight_version == call.instance.version:  # the reply knows before the telemetry does
            call.instance.version = last
            self._set_version(last)
        before = call.request.version or versions[0]
        return last, any(version != before for version in versions)

    def _cut_at_stop(self, request: Request, reply: ChunkReply) -> tuple[ChunkReply, tuple[str, str] | None]:
        """The reply up to the token that completes a stop string, if one does."""
        if not request.group.options.sampling.stop or self._tokenizer is None:
            return reply, None
        if request.text is None:
            request.text = self._replayed(request)
        if (match := request.text.push(_shown(request, reply))) is None:
            return reply, None
        kept = match.tokens - request.generated
        return _truncated(reply, kept), ("stop", match.stop)

    def _replayed(self, request: Request) -> TextStream:
        assert self._tokenizer is not None
        group = request.group
        stream = TextStream(self._tokenizer, group.options.sampling, group.prompt.token_ids or [])
        stream.push(request.tokens)
        return stream

    def _ending(self, request: Request, reply: ChunkReply) -> tuple[str | None, int | str | None]:
        """Finish reason and stop reason, or None and None while the response goes on.

        A chunk's own "length" or "abort" never ends a response; neither does a stop string that only the engine saw.
        """
        if _ended_by_token(reply):
            return "stop", reply.stop_reason
        if request.forced_length is not None and request.generated >= request.forced_length:
            return "stop", "forced"
        if request.generated >= request.group.limit:
            return "length", None
        return None, None

    def _drop(self, call: Call) -> None:
        """Give up a call in flight; its request must be moved on."""
        self._out.append(Cancel(call=call.id, engine=call.instance.name))
        self._close(call.id)

    def _close(self, call_id: int) -> Call | None:
        """Take a call out of flight; None if its request is not waiting for it any more."""
        call = self.calls.pop(call_id, None)
        if call is not None:
            assert call.request.call == call_id
            assert call.epoch == call.instance.epoch
            call.instance.release(call_id)
        return call

    # Ends

    def _put_back(self, request: Request) -> None:
        self.buffer.wait(request, self._now)

    def _restart(self, request: Request) -> None:
        self.restarts += 1
        self.tokens -= request.generated
        request.restart()
        self._out.append(Record(request=request.id))
        self._put_back(request)

    def _fail(self, request: Request, error: str) -> None:
        request.finish_reason, request.error = "error", error
        self._end(request, State.FAILED)

    def _finish(self, request: Request, *, emit: bool = True) -> None:
        self.context.finish(request)
        self.policy.learned(request)
        self._end(request, State.DONE, emit=emit)

    def _end(self, request: Request, state: State, *, emit: bool = True) -> None:
        self.buffer.end(request, state)
        if emit:
            self._emit(request)
        request.drop_tokens()
        group = request.group
        if self.lasting and all(each.state in TERMINAL for each in group.requests):
            self.buffer.forget(group)
            self.context.forget(group)

    def _emit(self, request: Request) -> None:
        sample = request.sample(run=self.run, now=self._now, text=self._text(request), on_policy=self.policy.unbiased)
        self._out.append(Emit(sample=sample))

    def _text(self, request: Request) -> str | None:
        if self._tokenizer is None:
            return None
        if request.text is not None:
            return request.text.text
        ended_by_token = request.finish_reason == "stop" and not isinstance(request.stop_reason, str)
        prompt, sampling = request.group.prompt.token_ids or [], request.group.options.sampling
        return whole_text(self._tokenizer, sampling, prompt, request.tokens, ended_by_token=ended_by_token)

    # Scheduling

    def _schedule(self) -> None:
        usable = [
            instance
            for instance in self.instances.values()
            if instance.usable(self._now) and (not self.lasting or instance.version == self.version)
        ]
        if self.closing or self.paused or not usable:
            return
        for instance in usable:
            instance.tick(self._now)
        skipped: list[Request] = []
        while (request := self.policy.choose()) is not None:
            tokens = request.length + self._chunk_bound(request)
            instances = self._candidates(request, tokens, usable)
            if not instances:
                self._no_candidate(request, tokens)
            elif place := self.policy.place(request, tokens, instances):
                self._dispatch(request, place, tokens)
            elif len(instances) < len(usable) and len(skipped) < _MOST_SKIPPED:
                self.buffer.park(request)  # bound to engines that are full; others may still use the rest
                skipped.append(request)
            else:
                break  # no room: what goes first waits for it
        self.buffer.unpark(skipped)

    def _candidates(self, request: Request, tokens: int, usable: Sequence[Instance]) -> list[Instance]:
        """Engines that may take the request, whether they have room now or not; never the one that just failed it."""
        fit = [instance for instance in usable if tokens <= instance.longest]
        if request.version is not None:
            version = request.version
            fit = [instance for instance in fit if instance.version == version or self._version_fits(request, instance)]
        if request.rejected_by:
            fit = [instance for instance in fit if instance.name not in request.rejected_by]
        if request.avoid is not None:
            return [instance for instance in fit if instance.name != request.avoid] or fit
        return fit

    def _version_fits(self, request: Request, instance: Instance) -> bool:
        return (
            request.version is None
            or request.version == instance.version
            or request.group.options.mixed_versions == "mark"
        )

    def _no_candidate(self, request: Request, tokens: int) -> None:
        """Nobody may take the request now: begin it again, give it up, or set it aside until the fleet changes."""
        ups = [instance for instance in self.instances.values() if instance.up]
        if self._outdated(request, ups):
            self._restart(request)
        elif len(ups) == len(self.instances) and not any(instance.could_hold(tokens) for instance in ups):
            self._fail(request, f"too long: a sequence of {tokens} tokens does not fit any engine's KV cache")
        else:
            self.buffer.park(request)

    def _outdated(self, request: Request, ups: Sequence[Instance]) -> bool:
        """Whether what the request has generated can never be continued: its weights are gone."""
        if request.version is None or request.group.options.mixed_versions == "mark":
            return False
        if self.lasting:
            return request.version != self.version
        return not any(self._version_fits(request, instance) for instance in ups)

    def _chunk_bound(self, request: Request) -> int:
        """The most tokens the next chunk may add, as far as a policy may know.

        Requests that begin together should not ask for their next chunks together (see `occupancy`): their first
        chunks are of different lengths, spread evenly by the golden ratio.
        """
        options = request.group.options
        size = 0 if options.indivisible else options.chunk_size
        if not size or not self.policy.divided:
            return request.remaining
        if not request.generated and self.config.engine.stagger:
            number = request.group.order * _GROUP_STRIDE + request.index
            size = math.ceil(size * (_SHORTEST_FIRST + (1 - _SHORTEST_FIRST) * (number * _GOLDEN % 1)))
        return min(size, request.remaining)

    def _dispatch(self, request: Request, instance: Instance, tokens: int) -> None:
        self._next_call += 1
        most = self._chunk_bound(request)
        most = max(1, min(most, request.end - request.generated))
        call = Call(
            id=self._next_call,
            request=request,
            instance=instance,
            epoch=instance.epoch,
            n=len(request.chunks),
            generated=request.generated,
            max_tokens=most,
            weight_version=instance.version,
            start=self._now,
        )
        self.calls[call.id] = call
        instance.dispatch(call.id, request, tokens)
        request.attempt += 1
        if request.first_start is None:
            request.first_start = self._now
        self.buffer.run(request, call.id)
        self._out.append(self._dispatch_command(call))

    def _dispatch_command(self, call: Call) -> Dispatch:
        request = call.request
        return Dispatch(
            call=call.id,
            n=call.n,
            engine=call.instance.name,
            epoch=call.epoch,
            request=request.id,
            prefix=request.prefix(),
            params=call_params(
                request.group.options.sampling,
                seed=request.seed,
                prompt_len=request.group.prompt_len,
                generated=request.generated,
                max_tokens=call.max_tokens,
                position_seeds=call.instance.position_seeds,
                ignore_eos=request.forced_length is not None,
                kinship=self._kinship(call) if call.instance.drafts else None,
                passed=request.group.options.passed,
            ),
            max_tokens=call.max_tokens,
            weight_version=call.weight_version,
            model=request.group.options.model,
            salt=self._salt(request.group.options),
            continues=request.generated + call.max_tokens < request.end,
        )

    def _salt(self, options: GroupOptions) -> str:
        """What keeps KV apart beside run and weights: an adapter and which one of its name, and the client's salt."""
        return self._lineage(options) + (f"/{options.salt}" if options.salt else "")

    def _lineage(self, options: GroupOptions) -> str:
        return f"@{options.model}#{self._adapters[options.model]}" if options.model else ""

    def _kinship(self, call: Call) -> dict[str, str]:
        """What an engine that drafts is told: whose sibling the request is, and whether its tokens are urgent.

        A response that began again under other weights, or another adapter, is another sequence.
        """
        request = call.request
        tail = self._input_closed and self.buffer.open <= _TAIL * self.buffer.total
        return {
            "seer_group": f"{self.run}/{request.group.id}",
            "seer_request": f"{request.index}@{call.weight_version}{self._lineage(request.group.options)}",
            "seer_priority": "high" if tail or self.policy.is_probe(request) else "low",
        }

    # Ending the run

    def _cancel_all(self) -> None:
        for call in list(self.calls.values()):
            self._drop(call)
            self._put_back(call.request)

    def _settle(self) -> None:
        """Stop when nothing more can happen, else ask to be woken when time alone may change something."""
        if self._input_closed and not self.buffer.open and not self.calls:
            self._stop("done")
        elif self._input_closed and self.buffer.open and self.policy.enough(self.buffer.ended, self.buffer.total):
            self._cancel_all()
            for request in self.buffer.unfinished():
                request.finish_reason = "unfinished"
                self._end(request, State.UNFINISHED)
            self._stop("done")
        elif self.closing and not self.calls:
            self._stop(self.closing)
        else:
            self._wake_when_needed()

    def _wake_when_needed(self) -> None:
        closed = [i.closed_until for i in self.instances.values() if i.up and i.closed_until > self._now]
        due = closed
        held = any(i.held and i.up for i in self.instances.values())
        if self.calls or not self.buffer.open or self.paused or held:
            self._idle_since = None
        else:
            self._idle_since = self._now if self._idle_since is None else self._idle_since
            end = self._idle_since + self.config.engine.patience_s
            if self._now < end:
                due.append(end)
            elif self.lasting:
                self._despair()
            else:
                self._stop("no_engine")
                return
        if due and (self._woken_at is None or min(due) < self._woken_at):
            self._woken_at = min(due)
            self._out.append(Wake(at=self._woken_at))

    def _despair(self) -> None:
        self._idle_since = None
        stale = [i.name for i in self.instances.values() if i.up and i.version != self.version]
        said = "; ".join(f"{i.name}: {i.last_error}" for i in self.instances.values() if i.last_error)
        why = f"{', '.join(stale)} must get weight version {self.version} first" if stale else said or "none answers"
        for request in self.buffer.unfinished():
            self._fail(request, f"{NO_ENGINE}: {why}")

    def _stop(self, reason: str) -> None:
        self.stopped = reason
        self._out.append(Stop(reason=reason))


def _ended_by_token(reply: ChunkReply) -> bool:
    """Whether the model's end-of-sequence token or a stop token id ended the response."""
    return reply.finish_reason == "stop" and not isinstance(reply.stop_reason, str)


def _shown(request: Request, reply: ChunkReply) -> list[int]:
    hidden = _ended_by_token(reply) and not request.group.options.sampling.include_stop_str_in_output
    return reply.token_ids[:-1] if hidden else reply.token_ids


def _truncated(reply: ChunkReply, tokens: int) -> ChunkReply:
    return ChunkReply(
        token_ids=reply.token_ids[:tokens],
        logprobs=reply.logprobs[:tokens],
        top_logprobs=reply.top_logprobs[:tokens] if reply.top_logprobs is not None else None,
        finish_reason="stop",
        versions=reply.versions,
    )


def _record_of(request: Request, reply: ChunkReply, chunk: Chunk) -> Record:
    return Record(
        request=request.id,
        chunk=chunk,
        token_ids=reply.token_ids,
        logprobs=reply.logprobs,
        top_logprobs=reply.top_logprobs,
        finish_reason=request.finish_reason,
        stop_reason=request.stop_reason,
        mixed=request.mixed,
    )


def _reply_of(record: Record) -> ChunkReply:
    return ChunkReply(
        token_ids=record.token_ids,
        logprobs=record.logprobs,
        top_logprobs=record.top_logprobs,
        finish_reason="length",
    )
