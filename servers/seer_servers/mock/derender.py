"""The mock's derendering: generated tokens to OpenAI's answers, whole or chunk by chunk, as vLLM's routes do it.

The state that a client carries between the chunks of a response is all its tokens so far; clients must not look inside.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import msgspec

from seer_servers.mock.tokenizer import byte_tokenizer
from seer_servers.mock.wire import bad_request

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from seer_servers.mock.engine import MockEngine

_MAX_TOPS = 20  # vLLM's default max_logprobs


class _Scored(msgspec.Struct):
    token_id: int
    logprob: float


class _Position(_Scored):
    top_logprobs: list[_Scored] = []


class _Positions(msgspec.Struct):
    content: list[_Position]


class _Choice(msgspec.Struct):
    index: int
    token_ids: list[int]
    logprobs: _Positions | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class _Response(msgspec.Struct):
    choices: list[_Choice]
    request_id: str = "mock"
    prompt_token_ids: list[int] | None = None


class _State(msgspec.Struct):
    output_token_ids: list[int] = []
    role_sent: bool = False


class _Request(msgspec.Struct, frozen=True):
    skip_special_tokens: bool = True
    return_token_ids: bool | None = None


class DerenderBody(msgspec.Struct, kw_only=True):
    """Either kind: `generate_response(s)` for whole answers, `generate_chunk` and `stream_state` with `stream`."""

    stream: bool = False
    model: str | None = None
    generate_response: _Response | None = None
    generate_responses: list[_Response] = []
    generate_chunk: _Response | None = None
    stream_state: _State | None = None
    prompt_tokens: int | list[int] | None = None
    chat_request: _Request = _Request()
    completion_request: _Request = _Request()


def derendered_chat(body: DerenderBody, engine: MockEngine) -> dict[str, Any]:
    """The answer of /v1/chat/completions/derender."""
    tokenizer = byte_tokenizer(engine.config.model.vocab_size)
    if body.stream:
        return _streamed(body, tokenizer, engine, _chat_delta, "chat.completion.chunk")
    if body.generate_response is None:
        raise bad_request("generate_response is missing.", "generate_response")
    response = body.generate_response
    _check(response)
    choices = [
        {
            "index": choice.index,
            "message": _message(_text(choice.token_ids, tokenizer, body.chat_request)),
            "logprobs": _chat_logprobs(choice.logprobs, tokenizer),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
            "token_ids": choice.token_ids if body.chat_request.return_token_ids else None,
            "routed_experts": None,
        }
        for choice in response.choices
    ]
    prompt = body.prompt_tokens if isinstance(body.prompt_tokens, int) else 0
    generated = sum(len(choice.token_ids) for choice in response.choices)
    return {
        "id": response.request_id,
        "object": "chat.completion",
        "created": int(time.time()),
        "model": engine.config.name,
        "choices": choices,
        "service_tier": None,
        "system_fingerprint": None,
        "usage": {"prompt_tokens": prompt, "total_tokens": prompt + generated, "completion_tokens": generated},
        "prompt_logprobs": None,
        "prompt_token_ids": None,
        "kv_transfer_params": None,
    }


def derendered_completions(body: DerenderBody, engine: MockEngine) -> dict[str, Any]:
    """The answer of /v1/completions/derender."""
    tokenizer = byte_tokenizer(engine.config.model.vocab_size)
    if body.stream:
        return _streamed(body, tokenizer, engine, _completion_delta, "text_completion")
    if not body.generate_responses:
        raise bad_request("generate_responses must not be empty")
    for response in body.generate_responses:
        _check(response)
    found = [choice for response in body.generate_responses for choice in response.choices]
    choices = [
        {
            "index": index,
            "text": _text(choice.token_ids, tokenizer, body.completion_request),
            "logprobs": _completion_logprobs(choice.logprobs, tokenizer),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        for index, choice in enumerate(found)
    ]
    generated = sum(len(choice.token_ids) for choice in found)
    return {
        "id": body.generate_responses[0].request_id,
        "object": "text_completion",
        "created": int(time.time()),
        "model": engine.config.name,
        "choices": choices,
        "usage": {"prompt_tokens": 0, "total_tokens": generated, "completion_tokens": generated},
    }


def _streamed(body: DerenderBody, tokenizer: Tokenizer, engine: MockEngine, delta: Any, kind: str) -> dict[str, Any]:
    if body.generate_chunk is None or len(body.generate_chunk.choices) != 1:
        raise bad_request("derender expects exactly one choice per chunk.", "generate_chunk")
    state, (choice,) = body.stream_state or _State(), body.generate_chunk.choices
    before = _text(state.output_token_ids, tokenizer, body.chat_request)
    ids = state.output_token_ids + choice.token_ids
    new = _text(ids, tokenizer, body.chat_request)[len(before) :]
    said = delta(choice, new, state, tokenizer) | {
        "index": choice.index,
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.stop_reason,
        "token_ids": choice.token_ids if body.chat_request.return_token_ids else None,
    }
    chunk = {
        "id": body.generate_chunk.request_id,
        "object": kind,
        "created": int(time.time()),
        "model": engine.config.name,
        "choices": [said],
        "usage": None,
    }
    return {"chunk": chunk, "stream_state": {"output_token_ids": ids, "role_sent": True}}


def _chat_delta(choice: _Choice, text: str, state: _State, tokenizer: Tokenizer) -> dict[str, Any]:
    delta = {"role": None if state.role_sent else "assistant", "content": text or None, "reasoning": None}
    return {"delta": delta, "logprobs": _chat_logprobs(choice.logprobs, tokenizer)}


def _completion_delta(choice: _Choice, text: str, state: _State, tokenizer: Tokenizer) -> dict[str, Any]:
    del state
    return {"text": text, "logprobs": _completion_logprobs(choice.logprobs, tokenizer)}


def _check(response: _Response) -> None:
    for choice in response.choices:
        if not choice.token_ids:
            raise bad_request(f"choice {choice.index} has empty or null token_ids")
        for position in choice.logprobs.content if choice.logprobs else ():
            if len(position.top_logprobs) > _MAX_TOPS:
                raise bad_request(f"top_logprobs count ({len(position.top_logprobs)}) exceeds max_logprobs (20).")


def _text(ids: list[int], tokenizer: Tokenizer, request: _Request) -> str:
    """An unfinished character is left for the next chunk."""
    return tokenizer.decode(ids, skip_special_tokens=request.skip_special_tokens).rstrip("\ufffd")


def _message(text: str) -> dict[str, Any]:
    nothing = dict.fromkeys(("refusal", "annotations", "audio", "function_call", "reasoning"))
    return {"role": "assistant", "content": text} | nothing


def _word(token_id: int, tokenizer: Tokenizer) -> str:
    return tokenizer.decode([token_id], skip_special_tokens=False)


def _chat_logprobs(logprobs: _Positions | None, tokenizer: Tokenizer) -> dict[str, Any] | None:
    def scored(one: _Scored) -> dict[str, Any]:
        word = _word(one.token_id, tokenizer)
        return {"token": word, "logprob": one.logprob, "bytes": list(word.encode())}

    if logprobs is None:
        return None
    return {
        "content": [
            scored(position) | {"top_logprobs": [scored(top) for top in position.top_logprobs]}
            for position in logprobs.content
        ]
    }


def _completion_logprobs(logprobs: _Positions | None, tokenizer: Tokenizer) -> dict[str, Any] | None:
    if logprobs is None:
        return None
    words = [_word(position.token_id, tokenizer) for position in logprobs.content]
    tops = [
        {_word(top.token_id, tokenizer): top.logprob for top in position.top_logprobs} or None
        for position in logprobs.content
    ]
    return {
        "text_offset": [sum(map(len, words[:number])) for number in range(len(words))],
        "token_logprobs": [position.logprob for position in logprobs.content],
        "tokens": words,
        "top_logprobs": tops,
    }
