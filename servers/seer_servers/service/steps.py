"""What a stream tells: steps of many responses, as they come, and the text that may be told of them already.

Invariants: the steps of a response, concatenated, are its sample; the last one, and no other, brings the sample. No
text leaves that could belong to a stop string.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import msgspec

from seer_async.text import TextStream
from seer_async.types import Sample, TopLogprob
from seer_servers.service.intake import whole
from seer_servers.service.logprobs import Tokens

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from tokenizers import Tokenizer

    from seer_async.sampling import Sampling
    from seer_async.tickets import Piece, Ticket


class Step(msgspec.Struct):
    """New tokens of response `index` to prompt number `prompt`; the sample, if that ended it."""

    prompt: int
    index: int
    ids: list[int] = []
    logprobs: list[float] = []
    tops: list[list[TopLogprob]] | None = None
    sample: Sample | None = None

    @property
    def tokens(self) -> Tokens:
        """The new tokens with their logprobs."""
        return Tokens(self.ids, self.logprobs, self.tops)

    def take(self, piece: Piece) -> None:
        """Take in what happened next."""
        if piece.restarted:  # only a response of which nothing was told yet begins again
            self.ids, self.logprobs, self.tops = [], [], None
        self.ids = self.ids + piece.token_ids
        self.logprobs = self.logprobs + piece.logprobs
        if piece.top_logprobs is not None:
            self.tops = (self.tops or []) + piece.top_logprobs
        if piece.sample is not None:
            self.sample = whole(piece.sample)


async def steps(tickets: Sequence[Ticket]) -> AsyncIterator[list[Step]]:
    """Yield what has happened since the last time, at most one step a response, until all have ended.

    Raises:
        ApiError: A response failed.
    """
    queue: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()

    async def feed(number: int, ticket: Ticket) -> None:
        async for piece in ticket.pieces():
            queue.put_nowait((number, piece))

    feeds = [asyncio.create_task(feed(number, ticket)) for number, ticket in enumerate(tickets)]
    left = sum(len(ticket.requests) for ticket in tickets)
    try:
        while left:
            batch = _gathered([await queue.get(), *_at_hand(queue)])
            left -= sum(step.sample is not None for step in batch)
            yield batch
    finally:
        for task in feeds:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


def _at_hand(queue: asyncio.Queue[tuple[int, Piece]]) -> list[tuple[int, Piece]]:
    return [queue.get_nowait() for _ in range(queue.qsize())]


def _gathered(pieces: Sequence[tuple[int, Piece]]) -> list[Step]:
    found: dict[tuple[int, int], Step] = {}
    for prompt, piece in pieces:
        found.setdefault((prompt, piece.index), Step(prompt, piece.index)).take(piece)
    return list(found.values())


class Telling:
    """The text of one streamed response: what may be told, and what is held back."""

    def __init__(self, tokenizer: Tokenizer, sampling: Sampling, prompt: Sequence[int]) -> None:
        self._stops = sampling.stop
        self._stream = TextStream(tokenizer, msgspec.structs.replace(sampling, stop=[]), prompt)
        self._told = 0

    def push(self, ids: Sequence[int]) -> str:
        """Take in tokens; return what may be told now."""
        self._stream.push(ids)
        text = self._stream.text
        start, self._told = self._told, max(self._told, len(text) - self._begun(text))
        return text[start : self._told]

    @property
    def holds(self) -> bool:
        """Whether some text is held back."""
        return self._told < len(self._stream.text)

    def end(self, sample: Sample) -> str:
        """The rest, after the last tokens."""
        return (sample.text or "")[self._told :]

    def beyond(self, sample: Sample) -> str:
        """What the tokens say behind the end of the sample's text: a stop string, and what shared its last token."""
        return self._stream.text[len(sample.text or "") :]

    def _begun(self, text: str) -> int:
        """How much of the end of `text` may be the beginning of a stop string."""
        sizes = (size for stop in self._stops for size in range(min(len(stop), len(text)), 0, -1))
        return max((size for size in sizes if any(stop.startswith(text[-size:]) for stop in self._stops)), default=0)
