"""`POST /inference/v1/generate`: token ids in, token ids out, so engines are asked for nothing but tokens."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec
from msgspec import UNSET

from seer_servers.service.bodies import GenerateBody, read, usage_wanted
from seer_servers.service.errors import bad_request
from seer_servers.service.intake import REQUEST_HEADERS, Rendered, adapter_named, request_id
from seer_servers.service.logprobs import Positions, Tokens, positions, tokens_of
from seer_servers.service.params import refuse
from seer_servers.service.part import EVENTS, Route
from seer_servers.service.replies import (
    GenerateChoice,
    GenerateChunk,
    GenerateReply,
    json_reply,
    stop_reason,
    usage,
    version_spans,
)
from seer_servers.service.sse import stream
from seer_servers.service.steps import steps

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from aiohttp import web

    from seer_async.tickets import Work
    from seer_async.types import Sample
    from seer_servers.service.intake import Intake


class Generate:
    """The part."""

    def __init__(self, intake: Intake) -> None:
        self._intake = intake

    @property
    def routes(self) -> Sequence[Route]:
        """One."""
        return [
            Route(
                method="POST",
                path="/inference/v1/generate",
                handler=self._generate,
                summary="Responses to a tokenised prompt, as token ids, with the weights that sampled them",
                body=GenerateBody,
                reply=GenerateReply,
                streams={EVENTS: (GenerateChunk,)},
                headers=REQUEST_HEADERS,
            )
        ]

    async def start(self) -> None:
        """Nothing runs in the background."""

    async def stop(self) -> None:
        """Nothing runs in the background."""

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await read(request, GenerateBody)
        refuse(msgspec.structs.asdict(body))
        if body.output_mode != "tokens":
            raise bad_request("output_mode must be 'tokens' here; ask /v1/completions for text.", "output_mode")
        adapter = adapter_named(body.model, self._intake.service)
        prompt = Rendered(body.token_ids, {"max_tokens": None} | body.sampling_params, body.cache_salt)
        work = self._intake.work(prompt, request, adapter=adapter, stream=bool(body.stream))
        answer = _Answer(self._intake, body, work, f"generate-tokens-{request_id(request, body.request_id)}")
        return await stream(request, answer.events()) if body.stream else await answer.whole()


class _Answer:
    """The answer to one request."""

    def __init__(self, intake: Intake, body: GenerateBody, work: Work, name: str) -> None:
        self._intake = intake
        self._body = body
        self._work = work
        self._name = name
        self._alternatives: int | None = body.sampling_params.get("logprobs")

    async def whole(self) -> web.Response:
        """All at once."""
        (samples,) = await self._intake.samples([self._work], self._name)
        reply = GenerateReply(
            request_id=self._name,
            model=self._intake.model_of(self._work),
            created=int(time.time()),
            usage=usage([self._body.token_ids], sum(len(sample.token_ids) for sample in samples)),
            prompt_token_ids=self._body.token_ids if self._body.return_token_ids else None,
            choices=[self._choice(index, tokens_of(sample), sample) for index, sample in enumerate(samples)],
        )
        return json_reply(reply)

    def _choice(self, index: int, tokens: Tokens, sample: Sample | None) -> GenerateChoice:
        return GenerateChoice(
            index=index,
            finish_reason=sample.finish_reason if sample else None,
            stop_reason=stop_reason(sample, self._work.options.sampling.stop) if sample else None,
            token_ids=tokens.ids,
            weight_versions=version_spans(sample.chunks) if sample else None,
            logprobs=self._logprobs(tokens),
        )

    def _logprobs(self, tokens: Tokens) -> Positions | None:
        return None if self._alternatives is None else positions(tokens, max(self._alternatives, 1), named=True)

    async def events(self) -> AsyncIterator[GenerateChunk]:
        """Piece by piece."""
        counts = [0] * self._work.n
        always = usage_wanted(self._body.stream_options, always=True)
        prompt = self._body.token_ids
        told = prompt if self._body.return_token_ids else UNSET  # with the first event
        with self._intake.submitted([self._work], self._name) as tickets:
            async for batch in steps(tickets):
                for step in batch:
                    counts[step.index] += len(step.ids)
                    yield GenerateChunk(
                        request_id=self._name,
                        choices=[self._choice(step.index, step.tokens, step.sample)],
                        usage=usage([prompt], counts[step.index]) if always else None,
                        prompt_token_ids=told,
                    )
                    told = UNSET
        if usage_wanted(self._body.stream_options):
            yield GenerateChunk(request_id=self._name, choices=[], usage=usage([prompt], sum(counts)))
