"""From our tokens to chat messages, by an engine: whole, or step by step with a state that is carried between calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from seer_servers.service.logprobs import Tokens, chat_by_id, positions, tokens_of
from seer_servers.service.replies import stop_reason
from seer_servers.service.steps import Telling

if TYPE_CHECKING:
    from collections.abc import Sequence

    from seer_async.tickets import Work
    from seer_async.types import Sample
    from seer_servers.service.bodies import ChatBody
    from seer_servers.service.intake import Intake
    from seer_servers.service.steps import Step

_PATH = "/v1/chat/completions/derender"


class _StreamReply(msgspec.Struct):
    chunk: dict[str, Any]
    stream_state: msgspec.Raw


class Messages:
    """Makes the messages of the responses to one request; `raw` is its body, which the engine's parsers need."""

    def __init__(self, intake: Intake, body: ChatBody, raw: bytes, work: Work, name: str) -> None:
        self._intake = intake
        self.body = body
        self.work = work
        self._raw = msgspec.Raw(raw)
        self._name = name

    @property
    def stop(self) -> list[str]:
        """The stop strings."""
        return self.work.options.sampling.stop

    async def reply(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """The whole answer."""
        generated = [(index, sample) for index, sample in enumerate(samples) if sample.token_ids]
        prompt = self.work.prompt_token_ids
        response = {
            "request_id": self._name,
            "choices": [self.choice(index, tokens_of(sample), sample) for index, sample in generated],
            "prompt_token_ids": prompt,
        }
        asked = {"generate_response": response, "prompt_tokens": len(prompt), "chat_request": self._raw}
        reply = await self._intake.relay.fetch(_PATH, msgspec.json.encode(asked), dict[str, Any])
        made = {choice["index"]: choice for choice in reply["choices"]}
        reply["choices"] = [
            self._finished(made.get(index) or _empty(index, sample), sample) for index, sample in enumerate(samples)
        ]
        reply["model"] = self._intake.model_of(self.work)
        if self.body.return_token_ids:
            reply["prompt_token_ids"] = prompt
        return reply

    def choice(self, index: int, tokens: Tokens, sample: Sample | None) -> dict[str, Any]:
        """Some tokens of a response, as an engine would have generated them."""
        named = self.body.logprobs and not self.body.return_tokens_as_token_ids
        return {
            "index": index,
            "token_ids": tokens.ids,
            "logprobs": positions(tokens, self.body.top_logprobs or 0) if named else None,
            "finish_reason": sample.finish_reason if sample else None,
            "stop_reason": stop_reason(sample, self.stop) if sample else None,
        }

    def logprobs(self, made: dict[str, Any] | None, tokens: Tokens) -> dict[str, Any] | None:
        """The logprobs as they were asked for; hidden reasoning would show in those of a parser's."""
        if not self.body.logprobs or not self.body.include_reasoning:
            return None
        if self.body.return_tokens_as_token_ids:
            return chat_by_id(tokens, self.body.top_logprobs or 0, self._intake.service.tokenizer)
        return made

    async def following(self, chunk: dict[str, Any], state: msgspec.Raw | None) -> _StreamReply:
        """What the next tokens add; `state` is that of the reply before, None at first."""
        asked = {
            "stream": True,
            "generate_chunk": {"request_id": self._name, "choices": [chunk]},
            "stream_state": state,
            "prompt_token_ids": self.work.prompt_token_ids,
            "chat_request": self._raw,
        }
        return await self._intake.relay.fetch(_PATH, msgspec.json.encode(asked), _StreamReply)

    def telling(self) -> Telling:
        """For the text of a response."""
        return Telling(self._intake.service.tokenizer, self.work.options.sampling, self.work.prompt_token_ids)

    def _finished(self, choice: dict[str, Any], sample: Sample) -> dict[str, Any]:
        """A choice with what the engine cannot know or leaves out."""
        message = choice["message"]
        if message.get("content"):
            telling = self.telling()
            telling.push(sample.token_ids)
            message["content"] = message["content"].removesuffix(telling.beyond(sample))
        if self.body.parallel_tool_calls is False and message.get("tool_calls"):
            message["tool_calls"] = message["tool_calls"][:1]
        choice["logprobs"] = self.logprobs(choice.get("logprobs"), tokens_of(sample))
        choice["finish_reason"] = self.finish_reason(sample.finish_reason, calls=bool(message.get("tool_calls")))
        return choice

    def finish_reason(self, reason: str, *, calls: bool) -> str:
        """Calls of tools that the model chose to make are why it stopped."""
        named = isinstance(self.body.tool_choice, dict)
        return "tool_calls" if calls and not named and reason == "stop" else reason


class MessageStream:
    """One response on its way, as the choices of events. `count` are its tokens."""

    def __init__(self, messages: Messages, index: int) -> None:
        self._messages = messages
        self._index = index
        self._telling = messages.telling()
        self._held = Tokens([], [])  # of which nothing was told yet
        self._state: msgspec.Raw | None = None
        self._called = False
        self.count = 0

    async def choice(self, step: Step) -> dict[str, Any] | None:
        """What is new; None if nothing can be told yet."""
        self.count += len(step.ids)
        self._held += step.tokens
        self._telling.push(step.ids)
        if step.sample is None and self._telling.holds:
            return None
        tokens, self._held = self._held, Tokens([], [])
        return await self._told(tokens, step.sample)

    async def _told(self, tokens: Tokens, sample: Sample | None) -> dict[str, Any] | None:
        messages = self._messages
        chunk = messages.choice(self._index, tokens, sample)
        reply = await messages.following(chunk, self._state)
        self._state = reply.stream_state
        (made,) = reply.chunk["choices"]
        delta = {name: value for name, value in made["delta"].items() if value is not None and name != "role"}
        self._called = self._called or bool(delta.get("tool_calls"))
        if sample and delta.get("content"):
            delta["content"] = delta["content"].removesuffix(self._telling.beyond(sample))
        said = {
            "index": self._index,
            "delta": delta,
            "logprobs": messages.logprobs(made.get("logprobs"), tokens),
            "finish_reason": messages.finish_reason(sample.finish_reason, calls=self._called) if sample else None,
            "stop_reason": chunk["stop_reason"],
            "token_ids": made.get("token_ids"),
        }
        return said if delta or sample or said["logprobs"] or said["token_ids"] else None


def _empty(index: int, sample: Sample) -> dict[str, Any]:
    """A response that was aborted before its first token; engines make no message of nothing."""
    return {
        "index": index,
        "message": {"role": "assistant", "content": sample.text or ""},
        "logprobs": None,
        "finish_reason": sample.finish_reason,
        "stop_reason": None,
        "token_ids": [],
    }
