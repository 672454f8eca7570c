"""Responses from their prompt to their sample: what is accepted, begun again, ended and told.

Invariants: each response ends in exactly one `Emit`; the `Record` of an accepted chunk, or of a restart, is said before
anything that follows from it; `tokens` counts what was accepted and not thrown away by a restart.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from seer_async.ending import ending
from seer_async.events import Emit, Record
from seer_async.request import Group, Request, State
from seer_async.sampling import response_seed
from seer_async.types import Chunk, ChunkReply

if TYPE_CHECKING:
    from seer_async.buffer import RequestBuffer
    from seer_async.calls import Call
    from seer_async.ending import Texts
    from seer_async.events import GroupAdded, Restored
    from seer_async.options import GroupOptions
    from seer_async.policies import Policy
    from seer_async.turn import Turn


class Responses:
    """All responses of `run`, whose seeds derive from `seed`; a group without options has `options`.

    If `lasting`, groups are joined while they are open, and forgotten when they have ended.
    """

    def __init__(
        self,
        turn: Turn,
        buffer: RequestBuffer,
        policy: Policy,
        texts: Texts,
        *,
        run: str,
        seed: int,
        options: GroupOptions,
        lasting: bool,
    ) -> None:
        self.tokens = 0
        self.restarts = 0
        self.migrations = 0
        self.pooled = 0  # tokens of prefixes that engines loaded from a KV pool, by their own account
        self._turn = turn
        self._buffer = buffer
        self._policy = policy
        self._context = policy.context
        self._texts = texts
        self._run = run
        self._seed = seed
        self._options = options
        self._lasting = lasting
        self._groups = 0  # that ever were

    # Begin and go on

    def add(self, event: GroupAdded) -> None:
        """Take in a prompt, or more responses to one."""
        group = self._buffer.groups.get(event.prompt.id)
        assert group is None or self._lasting, f"group {event.prompt.id} is added twice"
        if group is None:
            group = Group(event.prompt, self._groups, event.limit, event.options or self._options)
            self._groups += 1
        first = len(group.requests)
        requests = []
        for number in range(event.n):
            forced = event.forced_lengths[number] if event.forced_lengths else None
            seed = event.seeds[number] if event.seeds else response_seed(self._seed, group.id, first + number)
            requests.append(Request(group, first + number, seed, self._turn.now, forced))
        self._buffer.add(group, requests)

    def accept(self, call: Call, reply: ChunkReply, version: str, *, mixed: bool) -> Chunk:
        """Append what a call has brought, up to the end of the response; `mixed` if its weights are not the others'."""
        request = call.request
        reply, stop = self._texts.cut(request, reply)
        chunk = Chunk(
            n=call.n,
            tokens=len(reply.token_ids),
            engine=call.instance.name,
            epoch=call.epoch,
            weight_version=version,
            attempt=request.attempt,
            queued=request.queued,
            start=call.start,
            end=self._turn.now,
            cached=reply.cached,
            pooled=reply.pooled,
        )
        self.migrations += request.last_engine not in {None, chunk.engine}
        self.pooled += reply.pooled
        self._append(request, reply, chunk, mixed=mixed)
        request.failures, request.avoid = 0, None
        request.rejected_by.clear()
        request.finish_reason, request.stop_reason = stop or ending(request, reply) or (None, None)
        self._turn.say(_record_of(request, reply, chunk))
        self._go_on(request)
        return chunk

    def restore(self, event: Restored) -> None:
        """Take in what an earlier life of the run has recorded."""
        record = event.record
        request = self._buffer.requests[record.request]
        if record.chunk is None:
            self._clear(request)
            return
        self._append(request, _reply_of(record), record.chunk, mixed=record.mixed)
        if request.first_start is None:
            request.first_start = record.chunk.start
        request.finish_reason, request.stop_reason = record.finish_reason, record.stop_reason
        self._go_on(request, emit=not event.emitted)

    def close(self) -> None:
        """No more groups or records come: what is at its limit ends, if today's contexts are shorter than before."""
        self._buffer.closed = True
        for request in self._buffer.unfinished():
            if request.generated >= request.group.limit:
                request.finish_reason = "length"
                self._go_on(request)

    def put_back(self, request: Request) -> None:
        """It waits for its next call, unless it was to end with the one before."""
        if request.closing:
            self.give_up(request, "abort")
        else:
            self._buffer.wait(request, self._turn.now)

    def restart(self, request: Request) -> None:
        """Throw away what was generated, and begin again; one that is to end now ends with it."""
        if request.closing:
            self.put_back(request)
            return
        self.restarts += 1
        self._turn.say(Record(request=request.id))
        self._clear(request)

    def _append(self, request: Request, reply: ChunkReply, chunk: Chunk, *, mixed: bool) -> None:
        request.accept(reply, chunk)
        request.version, request.mixed = chunk.weight_version, request.mixed or mixed
        self.tokens += chunk.tokens

    def _clear(self, request: Request) -> None:
        self.tokens -= request.generated
        request.restart()
        self._buffer.wait(request, self._turn.now)

    def _go_on(self, request: Request, *, emit: bool = True) -> None:
        self._context.observe(request)
        self._policy.learned(request)
        if request.finish_reason is None:
            self.put_back(request)  # its place in the queue depends on what it has generated
            return
        self._context.finish(request)
        self._policy.learned(request)
        self._end(request, State.DONE, emit=emit)

    # End

    def fail(self, request: Request, error: str) -> None:
        """It cannot be finished; says why."""
        request.finish_reason, request.error = "error", error
        self._end(request, State.FAILED)

    def give_up(self, request: Request, reason: str) -> None:
        """Nobody needs the rest of it."""
        request.finish_reason = reason
        self._end(request, State.UNFINISHED)

    def _end(self, request: Request, state: State, *, emit: bool = True) -> None:
        self._buffer.end(request, state)
        if emit:
            self._emit(request)
        request.drop_tokens()
        group = request.group
        if self._lasting and not group.open:
            self._buffer.forget(group)
            self._context.forget(group)

    def _emit(self, request: Request) -> None:
        text, on_policy = self._texts.whole(request), self._policy.unbiased
        self._turn.say(Emit(sample=request.sample(run=self._run, now=self._turn.now, text=text, on_policy=on_policy)))


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
