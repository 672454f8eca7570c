"""`POST /v1/chat/completions`: an engine renders the messages, and turns our tokens into messages.

Its templates and its parsers of reasoning and tool calls are then the model's own. What it cannot know is put right
here: where a stop string ends the text, and how the tokens of logprobs are to be named.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import UNSET, UnsetType

from seer_servers.service.bodies import ChatBody, read, usage_wanted
from seer_servers.service.chatmessage import Messages, MessageStream
from seer_servers.service.intake import REQUEST_HEADERS, Rendered, adapter_named, request_id
from seer_servers.service.params import refuse
from seer_servers.service.part import EVENTS, Route
from seer_servers.service.replies import ChatChunk, ChatReply, Usage, json_reply, usage
from seer_servers.service.sse import stream
from seer_servers.service.steps import steps

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    from aiohttp import web

    from seer_async.tickets import Work
    from seer_servers.service.intake import Intake


class Chat:
    """The part."""

    def __init__(self, intake: Intake) -> None:
        self._intake = intake

    @property
    def routes(self) -> Sequence[Route]:
        """One."""
        return [
            Route(
                method="POST",
                path="/v1/chat/completions",
                handler=self._complete,
                summary="Responses to a conversation, as OpenAI and vLLM define it",
                body=ChatBody,
                reply=ChatReply,
                streams={EVENTS: (ChatChunk,)},
                headers=REQUEST_HEADERS,
            )
        ]

    async def start(self) -> None:
        """Nothing runs in the background."""

    async def stop(self) -> None:
        """Nothing runs in the background."""

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await read(request, ChatBody)
        refuse(msgspec.structs.asdict(body))
        adapter = adapter_named(body.model, self._intake.service)
        raw = await request.read()
        rendered = await self._intake.relay.fetch("/v1/chat/completions/render", raw, Rendered)
        work = self._intake.work(rendered, request, adapter=adapter, stream=bool(body.stream))
        answer = _Answer(self._intake, body, raw, work, f"chatcmpl-{request_id(request, body.request_id)}")
        return await stream(request, answer.events()) if body.stream else await answer.whole()


class _Answer:
    """The answer to one request."""

    def __init__(self, intake: Intake, body: ChatBody, raw: bytes, work: Work, name: str) -> None:
        self._intake = intake
        self._body = body
        self._work = work
        self._name = name
        self._created = int(time.time())
        self._messages = Messages(intake, body, raw, work, name)

    async def whole(self) -> web.Response:
        """All at once."""
        (samples,) = await self._intake.samples([self._work], self._name)
        return json_reply(await self._messages.reply(samples))

    async def events(self) -> AsyncIterator[ChatChunk]:
        """Piece by piece: first a role for each response, then what they say."""
        responses = [MessageStream(self._messages, index) for index in range(self._work.n)]
        begun = False
        with self._intake.submitted([self._work], self._name) as tickets:
            async for batch in steps(tickets):
                if not begun:
                    for event in self._roles():
                        yield event
                    begun = True
                for choice in await asyncio.gather(*(responses[step.index].choice(step) for step in batch)):
                    if choice:
                        yield self._event(choice, responses[choice["index"]].count)
        if usage_wanted(self._body.stream_options):
            generated = sum(response.count for response in responses)
            yield self._about([], usage([self._work.prompt_token_ids], generated))

    def _roles(self) -> Iterator[ChatChunk]:
        prompt = self._work.prompt_token_ids if self._body.return_token_ids else UNSET
        delta = {"role": "assistant", "content": ""}
        for index in range(self._work.n):
            yield self._event({"index": index, "delta": delta, "logprobs": None, "finish_reason": None}, 0, prompt)

    def _event(self, choice: dict[str, Any], count: int, prompt: list[int] | UnsetType = UNSET) -> ChatChunk:
        wanted = usage_wanted(self._body.stream_options, always=True)
        return self._about([choice], usage([self._work.prompt_token_ids], count) if wanted else UNSET, prompt)

    def _about(
        self, choices: list[dict[str, Any]], used: Usage | UnsetType, prompt: list[int] | UnsetType = UNSET
    ) -> ChatChunk:
        return ChatChunk(
            id=self._name,
            created=self._created,
            model=self._intake.model_of(self._work),
            choices=choices,
            usage=used,
            prompt_token_ids=prompt,
        )
