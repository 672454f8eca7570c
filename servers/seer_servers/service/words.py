"""The words of logprobs: how an engine's tokenizer writes single tokens, and characters of several tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from seer_servers.service.logprobs import others

if TYPE_CHECKING:
    from collections.abc import Sequence

    from seer_servers.service.logprobs import Tokens
    from seer_servers.service.relay import Relay

_PATH = "/v1/completions/derender"
_AT_ONCE = 64  # responses in one call


class _Logprobs(msgspec.Struct):
    tokens: list[str] = []
    top_logprobs: list[dict[str, float] | None] = []


class _Choice(msgspec.Struct):
    logprobs: _Logprobs


class _Reply(msgspec.Struct):
    choices: list[_Choice]


class _StreamReply(msgspec.Struct):
    chunk: _Reply
    stream_state: msgspec.Raw


Said = tuple[list[str], list[dict[str, float] | None]]
"""The words of the sampled tokens, and those of the others at each position with their logprobs."""


class Words:
    """Asks the engines behind `relay`."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay

    async def of(self, responses: Sequence[Tokens]) -> list[Said]:
        """The words of whole responses."""
        choices = [_choice(index, tokens) for index, tokens in enumerate(responses) if tokens.ids]
        found: list[_Choice] = []
        for start in range(0, len(choices), _AT_ONCE):
            body = msgspec.json.encode({"generate_responses": [{"choices": choices[start : start + _AT_ONCE]}]})
            found += (await self._relay.fetch(_PATH, body, _Reply)).choices
        said = iter(found)
        return [_said(next(said)) if tokens.ids else ([], []) for tokens in responses]

    async def following(self, tokens: Tokens, state: msgspec.Raw | None) -> tuple[Said, msgspec.Raw | None]:
        """The words of a response's next tokens; `state` is what the call before returned, None at first."""
        if not tokens.ids:
            return ([], []), state
        chunk = {"choices": [_choice(0, tokens)]}
        body = msgspec.json.encode({"stream": True, "generate_chunk": chunk, "stream_state": state})
        reply = await self._relay.fetch(_PATH, body, _StreamReply)
        return _said(reply.chunk.choices[0]), reply.stream_state


def _choice(index: int, tokens: Tokens) -> dict[str, Any]:
    return {"index": index, "token_ids": tokens.ids, "logprobs": others(tokens)}


def _said(choice: _Choice) -> Said:
    return choice.logprobs.tokens, choice.logprobs.top_logprobs
