"""What is submitted to a service and what comes back: work, the ticket for it, and the desk that serves tickets.

Invariants: each request of a ticket ends in exactly one sample unless the ticket was dropped; its pieces come in order,
the one with the sample last.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import TYPE_CHECKING

import msgspec

from seer_async.options import GroupOptions
from seer_async.types import Sample, Timings, TopLogprob

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from seer_async.events import Record
    from seer_async.snapshot import Snapshot

_LENGTHS_KEPT = 4096
_ENDED_BY_ITSELF = {"stop", "length"}


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """A group that somebody wants: `n` responses to one tokenised prompt.

    `seeds`, one for each response, make it repeatable. Submissions with the same `group` name, prompt and options are
    siblings while any of them is open; without a name, equal prompts and options are enough. After 256 siblings others
    begin.
    """

    prompt_token_ids: list[int]
    n: int = 1
    options: GroupOptions = GroupOptions()
    seeds: tuple[int, ...] | None = None
    group: str = ""


class Piece(msgspec.Struct, frozen=True, kw_only=True):
    """Progress of response `index` of a ticket: the tokens of one more chunk, or with `restarted` none, from the start.

    `sample` is the whole response, with the last piece; that one has no tokens of its own.
    """

    index: int
    token_ids: list[int] = []
    logprobs: list[float] = []
    top_logprobs: list[list[TopLogprob]] | None = None
    weight_version: str = ""
    restarted: bool = False
    sample: Sample | None = None


class Ticket:
    """One submission on its way. `requests` are the ids of its responses, in order."""

    def __init__(self, requests: Sequence[str]) -> None:
        self.requests = list(requests)
        self.samples: dict[int, Sample] = {}  # by index, as they finish
        self._pieces: asyncio.Queue[Piece] = asyncio.Queue()

    @property
    def done(self) -> bool:
        """Whether every response has ended."""
        return len(self.samples) == len(self.requests)

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yield what happens, in order, to the end of the last response. For one reader."""
        ended = 0
        while ended < len(self.requests):
            piece = await self._pieces.get()
            ended += piece.sample is not None
            yield piece

    async def finished(self) -> AsyncIterator[tuple[int, Sample]]:
        """Yield index and sample of each response as it finishes. For one reader."""
        async for piece in self.pieces():
            if piece.sample is not None:
                yield piece.index, piece.sample

    async def all(self) -> list[Sample]:
        """Return the samples of all responses, in order, once they have ended. For one reader."""
        samples = {index: sample async for index, sample in self.finished()}
        return [samples[index] for index in range(len(self.requests))]

    def push(self, piece: Piece) -> None:
        """Take in what has happened; the service's own."""
        if piece.sample is not None:
            self.samples[piece.index] = piece.sample
        self._pieces.put_nowait(piece)


class Desk:
    """The service's sink: records and samples go to the ticket of their request."""

    name = "the service"
    life = 0

    def __init__(self) -> None:
        self._tickets: dict[str, tuple[Ticket, int]] = {}
        self._awaited: set[str] = set()  # requests whose end `ended` waits for
        self._ended = asyncio.Event()
        self.lengths: deque[int] = deque(maxlen=_LENGTHS_KEPT)

    def open(self, ticket: Ticket) -> None:
        """Give what comes of a ticket's requests to it."""
        for index, request in enumerate(ticket.requests):
            self._tickets[request] = ticket, index

    def drop(self, ticket: Ticket) -> None:
        """Tell a ticket nothing more."""
        for request in ticket.requests:
            self._close(request)

    def end(self) -> None:
        """The service has ended: nobody should wait for it."""
        for request in list(self._tickets):
            self.emit(ended_sample(request, "error", "the service has ended"))

    async def ended(self, requests: set[str]) -> None:
        """Return when nobody waits for any of these requests any more."""
        self._awaited = requests & self._tickets.keys()
        while self._awaited:
            self._ended.clear()
            await self._ended.wait()

    def record(self, record: Record) -> None:
        """A chunk or a restart is a piece of its ticket."""
        if place := self._tickets.get(record.request):
            ticket, index = place
            ticket.push(
                Piece(
                    index=index,
                    token_ids=record.token_ids,
                    logprobs=record.logprobs,
                    top_logprobs=record.top_logprobs,
                    weight_version=record.chunk.weight_version if record.chunk else "",
                    restarted=record.chunk is None,
                )
            )

    def emit(self, sample: Sample) -> None:
        """The last piece."""
        if sample.finish_reason in _ENDED_BY_ITSELF:
            self.lengths.append(len(sample.token_ids))
        if place := self._close(sample.id):
            ticket, index = place
            ticket.push(Piece(index=index, sample=sample))

    def measure(self, snapshot: Snapshot) -> None:
        """Nothing is kept of the fleet."""

    def sync(self) -> None:
        """Nothing is on disk."""

    def _close(self, request: str) -> tuple[Ticket, int] | None:
        self._awaited.discard(request)
        if not self._awaited:
            self._ended.set()
        return self._tickets.pop(request, None)


def ended_sample(request: str, finish_reason: str, error: str = "", prompt: Sequence[int] = ()) -> Sample:
    """What becomes of a request that the core does not know, or no longer."""
    group, _, index = request.rpartition("/")
    now = time.time()
    return Sample(
        id=request,
        group=group,
        index=int(index),
        prompt=None,
        messages=None,
        prompt_token_ids=list(prompt),
        token_ids=[],
        text=None,
        logprobs=[],
        top_logprobs=None,
        finish_reason=finish_reason,
        stop_reason="",
        error=error,
        seed=0,
        weight_version="",
        on_policy=False,
        chunks=[],
        timings=Timings(submitted=now, first_start=now, finished=now, total=0.0, queued=0.0, generating=0.0),
        extra=None,
        run="",
    )
