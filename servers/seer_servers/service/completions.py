"""`POST /v1/completions`: prompts in, responses out, prompt by prompt.

An engine renders the request (validation, defaults, tokenising) and tells the words of logprobs; the text is ours.
"""

from __future__ import annotations

import asyncio
import time
from itertools import accumulate
from typing import TYPE_CHECKING

import msgspec
from msgspec import UNSET, UnsetType

from seer_servers.service.bodies import CompletionBody, read, usage_wanted
from seer_servers.service.intake import REQUEST_HEADERS, Rendered, adapter_named, request_id
from seer_servers.service.logprobs import CompletionLogprobs, Tokens, by_id, by_text, tokens_of
from seer_servers.service.params import refuse
from seer_servers.service.part import EVENTS, Route
from seer_servers.service.replies import (
    CompletionChoice,
    CompletionChunk,
    CompletionPiece,
    CompletionReply,
    Usage,
    json_reply,
    stop_reason,
    usage,
)
from seer_servers.service.sse import stream
from seer_servers.service.steps import Step, Telling, steps
from seer_servers.service.words import Words

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from aiohttp import web

    from seer_async.tickets import Work
    from seer_async.types import Sample
    from seer_servers.service.intake import Intake


class Completions:
    """The part."""

    def __init__(self, intake: Intake) -> None:
        self._intake = intake

    @property
    def routes(self) -> Sequence[Route]:
        """One."""
        return [
            Route(
                method="POST",
                path="/v1/completions",
                handler=self._complete,
                summary="Responses to prompts, as OpenAI and vLLM define it",
                body=CompletionBody,
                reply=CompletionReply,
                streams={EVENTS: (CompletionChunk,)},
                headers=REQUEST_HEADERS,
            )
        ]

    async def start(self) -> None:
        """Nothing runs in the background."""

    async def stop(self) -> None:
        """Nothing runs in the background."""

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await read(request, CompletionBody)
        refuse(msgspec.structs.asdict(body))
        adapter = adapter_named(body.model, self._intake.service)
        rendered = await self._intake.relay.fetch("/v1/completions/render", await request.read(), list[Rendered])
        works = [self._intake.work(each, request, adapter=adapter, stream=bool(body.stream)) for each in rendered]
        answer = _Answer(self._intake, body, works, f"cmpl-{request_id(request, body.request_id)}")
        return await stream(request, answer.events()) if body.stream else await answer.whole()


class _Answer:
    """The answer to one request."""

    def __init__(self, intake: Intake, body: CompletionBody, works: Sequence[Work], name: str) -> None:
        self._intake = intake
        self._body = body
        self._works = works
        self._name = name
        self._model = intake.model_of(works[0])
        self._created = int(time.time())
        self._words = Words(intake.relay)

    async def whole(self) -> web.Response:
        """All at once."""
        samples = [sample for group in await self._intake.samples(self._works, self._name) for sample in group]
        found = zip(samples, await self._logprobs(samples), strict=True)
        reply = CompletionReply(
            id=self._name,
            created=self._created,
            model=self._model,
            choices=[self._choice(index, sample, logprobs) for index, (sample, logprobs) in enumerate(found)],
            usage=usage((work.prompt_token_ids for work in self._works), sum(len(s.token_ids) for s in samples)),
        )
        return json_reply(reply)

    def _choice(self, index: int, sample: Sample, logprobs: CompletionLogprobs | None) -> CompletionChoice:
        asked = self._body.return_token_ids
        return CompletionChoice(
            index=index,
            text=sample.text or "",
            logprobs=logprobs,
            finish_reason=sample.finish_reason,
            stop_reason=stop_reason(sample, self._works[0].options.sampling.stop),
            token_ids=sample.token_ids if asked else None,
            prompt_token_ids=sample.prompt_token_ids if asked else None,
        )

    async def _logprobs(self, samples: Sequence[Sample]) -> Sequence[CompletionLogprobs | None]:
        if self._body.logprobs is None:
            return [None] * len(samples)
        tokens = [tokens_of(sample) for sample in samples]
        if self._body.return_tokens_as_token_ids:
            return [await _by_id(each) for each in tokens]
        return [by_text(each, *said) for each, said in zip(tokens, await self._words.of(tokens), strict=True)]

    async def events(self) -> AsyncIterator[CompletionChunk]:
        """Piece by piece."""
        firsts = [0, *accumulate(work.n for work in self._works)]
        told = [
            [_Told(self._intake, self._body, self._words, work, first + index) for index in range(work.n)]
            for work, first in zip(self._works, firsts, strict=False)
        ]
        with self._intake.submitted(self._works, self._name) as tickets:
            async for batch in steps(tickets):
                for step in batch:
                    response = told[step.prompt][step.index]
                    choice = await response.choice(step)
                    wanted = usage_wanted(self._body.stream_options, always=True)
                    prompt = self._works[step.prompt].prompt_token_ids
                    yield self._event([choice], usage([prompt], response.count) if wanted else UNSET)
        if usage_wanted(self._body.stream_options):
            generated = sum(response.count for group in told for response in group)
            yield self._event([], usage((work.prompt_token_ids for work in self._works), generated))

    def _event(self, choices: list[CompletionPiece], used: Usage | UnsetType) -> CompletionChunk:
        return CompletionChunk(id=self._name, created=self._created, model=self._model, choices=choices, usage=used)


async def _by_id(tokens: Tokens) -> CompletionLogprobs:
    """In turn with others: a trainer's request has millions of tokens."""
    await asyncio.sleep(0)
    return by_id(tokens)


class _Told:
    """One streamed response: what was told of it. `count` are its tokens."""

    def __init__(self, intake: Intake, body: CompletionBody, words: Words, work: Work, index: int) -> None:
        self._body = body
        self._words = words
        self._work = work
        self._index = index
        self._telling = Telling(intake.service.tokenizer, work.options.sampling, work.prompt_token_ids)
        self._offset = 0
        self._state: msgspec.Raw | None = None
        self.count = 0

    async def choice(self, step: Step) -> CompletionPiece:
        """What is new."""
        sample = step.sample
        ids = self._body.return_token_ids
        said = CompletionPiece(
            index=self._index,
            text=self._telling.end(sample) if sample else self._telling.push(step.ids),
            logprobs=await self._logprobs(step.tokens),
            finish_reason=sample.finish_reason if sample else None,
            stop_reason=stop_reason(sample, self._work.options.sampling.stop) if sample else None,
            prompt_token_ids=self._work.prompt_token_ids if ids and not self.count else None,
            token_ids=step.ids if ids else None,
        )
        self.count += len(step.ids)
        return said

    async def _logprobs(self, tokens: Tokens) -> CompletionLogprobs | None:
        if self._body.logprobs is None:
            return None
        if self._body.return_tokens_as_token_ids:
            found = by_id(tokens, self._offset)
        else:
            said, self._state = await self._words.following(tokens, self._state)
            found = by_text(tokens, *said, self._offset)
        self._offset += sum(map(len, found.tokens))
        return found
