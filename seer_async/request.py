"""A group and its requests: the state the core owns.

Invariants: a request is in exactly one `State`; `tokens` only grows, except when the whole request is restarted;
`tokens` is the concatenation of its accepted chunks until it is emitted, and `generated` their number; `call` is set
exactly while the request is RUNNING. Only the core (through `RequestBuffer`) changes a request.
"""

from __future__ import annotations

from array import array
from enum import StrEnum
from typing import TYPE_CHECKING

from seer_async.types import Sample, Timings

if TYPE_CHECKING:
    from seer_async.options import GroupOptions
    from seer_async.text import TextStream
    from seer_async.types import Chunk, ChunkReply, Prompt, TopLogprob


class State(StrEnum):
    """Where a request is."""

    WAITING = "waiting"  # in the Request Buffer, known to the policy
    PARKED = "parked"  # in the Request Buffer, but no engine may take it now
    RUNNING = "running"  # one call is in flight
    DONE = "done"
    FAILED = "failed"
    UNFINISHED = "unfinished"  # given up: the policy has enough, or nobody wants it any more


TERMINAL = (State.DONE, State.FAILED, State.UNFINISHED)


class Group:
    """One prompt and its requests, of which `open` have not ended.

    `limit` is the most tokens any of its responses may have.
    """

    __slots__ = ("limit", "open", "options", "order", "prompt", "prompt_len", "requests")

    def __init__(self, prompt: Prompt, order: int, limit: int, options: GroupOptions) -> None:
        assert prompt.token_ids, "a prompt is tokenised before it reaches the core"
        self.prompt = prompt
        self.prompt_len = len(prompt.token_ids)
        self.order = order
        self.limit = limit
        self.options = options
        self.requests: list[Request] = []
        self.open = 0

    @property
    def id(self) -> str:
        """The prompt's id."""
        return self.prompt.id


class Request:
    """One response being generated.

    `forced_length`, when set, is the length at which the response is ended whatever the model says; it is hidden from
    every policy but the oracle, which reads lengths from its own table. While `closing`, it is to end with its call in
    flight, whatever that brings. `submitted` and the other times are seconds on the run's clock.
    """

    __slots__ = (
        "attempt",
        "avoid",
        "call",
        "chunks",
        "closing",
        "error",
        "failures",
        "finish_reason",
        "first_start",
        "forced_length",
        "generated",
        "group",
        "id",
        "index",
        "logprobs",
        "mixed",
        "queued",
        "rejected_by",
        "seed",
        "state",
        "stop_reason",
        "submitted",
        "text",
        "ticket",
        "tokens",
        "top_logprobs",
        "version",
    )

    def __init__(self, group: Group, index: int, seed: int, now: float, forced_length: int | None = None) -> None:
        self.group = group
        self.index = index
        self.id = f"{group.id}/{index}"  # unique in a run
        self.seed = seed
        self.forced_length = forced_length
        self.submitted = now
        self.queued = now
        self.first_start: float | None = None
        self.state = State.WAITING
        self.call: int | None = None
        self.ticket = 0  # changes whenever the request enters or leaves the waiting set
        self.failures = 0
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.error: str | None = None
        self.mixed = False
        self.closing = False
        self.avoid: str | None = None
        self.rejected_by: set[str] = set()
        self._clear()

    def _clear(self) -> None:
        self.generated = 0
        self.tokens = array("i")
        self.logprobs = array("d")
        self.top_logprobs: list[list[TopLogprob]] = []
        self.chunks: list[Chunk] = []
        self.text: TextStream | None = None
        self.version: str | None = None
        self.attempt = 0

    def drop_tokens(self) -> None:
        """Free the memory of a request that has been emitted; how much it generated stays known."""
        generated, version = self.generated, self.version
        self._clear()
        self.generated, self.version = generated, version

    def restart(self) -> None:
        """Forget every token: the response begins again from its prompt."""
        self._clear()
        self.mixed = False
        self.rejected_by.clear()

    @property
    def length(self) -> int:
        """Tokens of the whole sequence: prompt and accepted tokens."""
        return self.group.prompt_len + self.generated

    @property
    def remaining(self) -> int:
        """The most tokens that may still be generated, as far as a policy may know."""
        return self.group.limit - self.generated

    @property
    def end(self) -> int:
        """The length at which the response is over whatever the model says; forced lengths no policy may see."""
        return self.group.limit if self.forced_length is None else min(self.group.limit, self.forced_length)

    @property
    def last_engine(self) -> str | None:
        """The engine of the latest chunk, whose prefix cache may still hold this request."""
        return self.chunks[-1].engine if self.chunks else None

    def prefix(self) -> list[int]:
        """Token ids an engine continues from."""
        assert self.group.prompt.token_ids is not None
        return self.group.prompt.token_ids + self.tokens.tolist()

    def accept(self, reply: ChunkReply, chunk: Chunk) -> None:
        """Append one chunk's tokens."""
        self.generated += len(reply.token_ids)
        self.tokens.extend(reply.token_ids)
        self.logprobs.extend(reply.logprobs)
        if reply.top_logprobs is not None:
            self.top_logprobs.extend(reply.top_logprobs)
        self.chunks.append(chunk)
        self.attempt = 0

    def sample(self, *, run: str, now: float, text: str | None, on_policy: bool) -> Sample:
        """The finished request as one output line."""
        prompt = self.group.prompt
        assert prompt.token_ids is not None
        first = self.first_start if self.first_start is not None else now
        return Sample(
            id=self.id,
            group=prompt.id,
            index=self.index,
            prompt=prompt.text,
            messages=prompt.messages,
            prompt_token_ids=prompt.token_ids,
            token_ids=self.tokens.tolist(),
            text=text,
            logprobs=self.logprobs.tolist(),
            top_logprobs=self.top_logprobs or None,
            finish_reason=self.finish_reason or "error",
            stop_reason="" if self.stop_reason is None else str(self.stop_reason),
            error=self.error or "",
            seed=self.seed,
            weight_version=self.version or "",
            on_policy=on_policy and not self.mixed,
            chunks=self.chunks,
            timings=Timings(
                submitted=self.submitted,
                first_start=first,
                finished=now,
                total=now - self.submitted,
                queued=sum(c.start - c.queued for c in self.chunks),
                generating=sum(c.end - c.start for c in self.chunks),
            ),
            extra=prompt.extra,
            run=run,
        )
