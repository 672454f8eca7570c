"""The data plane's replies, in the shape and with the quirks of vLLM's.

The tokens of `top_logprobs` other than the sampled one are made up: the ids that follow it, each one nat less likely.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec

from seer_servers.mock.flight import Call, Outcome, VersionSpan
from seer_servers.mock.model import FIRST_TOKEN
from seer_servers.mock.tokenizer import byte_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable

    from seer_servers.mock.config import MockConfig
    from seer_servers.mock.wire import CompletionBody, GenerateBody


class _Scored(msgspec.Struct):
    token_id: int
    logprob: float
    rank: int


class _Content(msgspec.Struct):
    token_id: int
    logprob: float
    rank: int
    top_logprobs: list[_Scored]


class _GenerateLogprobs(msgspec.Struct):
    content: list[_Content]


class _GenerateChoice(msgspec.Struct, kw_only=True):
    index: int = 0
    finish_reason: str
    stop_reason: int | None
    token_ids: list[int]
    routed_experts: None = None
    sampling_mask: None = None
    weight_versions: list[VersionSpan]
    logprobs: _GenerateLogprobs | None


class _Usage(msgspec.Struct):
    prompt_tokens: int
    total_tokens: int
    completion_tokens: int


class _GenerateReply(msgspec.Struct, kw_only=True):
    request_id: str
    model: str
    created: int
    usage: _Usage
    prompt_logprobs: None = None
    prompt_token_ids: list[int] | None
    kv_transfer_params: None = None
    output_mode: str = "tokens"
    choices: list[_GenerateChoice]


class _CompletionLogprobs(msgspec.Struct):
    text_offset: list[int]
    token_logprobs: list[float]
    tokens: list[str]
    top_logprobs: list[dict[str, float]]


class _CompletionChoice(msgspec.Struct, kw_only=True):
    index: int = 0
    text: str
    logprobs: _CompletionLogprobs | None
    finish_reason: str
    stop_reason: int | None
    token_ids: list[int] | None
    prompt_logprobs: None = None
    prompt_token_ids: list[int] | None


class _CompletionReply(msgspec.Struct, kw_only=True):
    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[_CompletionChoice]
    usage: _Usage
    kv_transfer_params: None = None


def generate_reply(outcome: Outcome, call: Call, body: GenerateBody, config: MockConfig) -> bytes:
    """The reply of `POST /inference/v1/generate`."""
    alternatives = body.sampling_params.logprobs
    choice = _GenerateChoice(
        finish_reason=outcome.finish_reason,
        stop_reason=outcome.stop_reason,
        token_ids=outcome.token_ids,
        weight_versions=outcome.versions,
        logprobs=None if alternatives is None else _content(outcome, alternatives, config.model.vocab_size),
    )
    return msgspec.json.encode(
        _GenerateReply(
            request_id=call.id,
            model=call.adapter or config.name,
            created=int(time.time()),
            usage=_usage(outcome, call),
            prompt_token_ids=call.prefix if body.return_token_ids else None,
            choices=[choice],
        )
    )


def completion_reply(outcome: Outcome, call: Call, body: CompletionBody, config: MockConfig) -> bytes:
    """The reply of `POST /v1/completions`."""
    tokenizer = byte_tokenizer(config.model.vocab_size)
    name = (lambda token: f"token_id:{token}") if body.return_tokens_as_token_ids else tokenizer.id_to_token
    choice = _CompletionChoice(
        text=tokenizer.decode(outcome.token_ids),
        logprobs=None if body.logprobs is None else _named(outcome, body.logprobs, config.model.vocab_size, name),
        finish_reason=outcome.finish_reason,
        stop_reason=outcome.stop_reason,
        token_ids=outcome.token_ids if body.return_token_ids else None,
        prompt_token_ids=call.prefix if body.return_token_ids else None,
    )
    return msgspec.json.encode(
        _CompletionReply(
            id=call.id.removesuffix("-0"),
            created=int(time.time()),
            model=call.adapter or config.name,
            choices=[choice],
            usage=_usage(outcome, call),
        )
    )


def _usage(outcome: Outcome, call: Call) -> _Usage:
    size, length = len(call.prefix), len(outcome.token_ids)
    return _Usage(size, size + length, length)


def _content(outcome: Outcome, count: int, vocab_size: int) -> _GenerateLogprobs:
    """On this route vLLM counts the sampled token among the `count`, though 0 has it too."""
    pairs = zip(outcome.token_ids, outcome.logprobs, strict=True)
    if count <= 1:
        return _GenerateLogprobs([_Content(token, lp, 1, [_Scored(token, lp, 1)]) for token, lp in pairs])
    return _GenerateLogprobs(
        [
            _Content(
                token,
                lp,
                1,
                [_Scored(other, low, rank) for rank, (other, low) in enumerate(_top(token, lp, count, vocab_size), 1)],
            )
            for token, lp in pairs
        ]
    )


def _named(outcome: Outcome, count: int, vocab_size: int, name: Callable[[int], str | None]) -> _CompletionLogprobs:
    """On this route vLLM adds the sampled token to the `count`."""
    tokens = [name(token) or "" for token in outcome.token_ids]
    offsets, end = [], 0
    for token in tokens:
        offsets.append(end)
        end += len(token)
    if count == 0:
        tops = [{token: lp} for token, lp in zip(tokens, outcome.logprobs, strict=True)]
    else:
        pairs = zip(outcome.token_ids, outcome.logprobs, strict=True)
        tops = [
            {name(other) or "": low for other, low in _top(token, lp, count + 1, vocab_size)} for token, lp in pairs
        ]
    return _CompletionLogprobs(
        text_offset=offsets,
        token_logprobs=outcome.logprobs,
        tokens=tokens,
        top_logprobs=tops,
    )


def _top(token: int, logprob: float, count: int, vocab_size: int) -> list[tuple[int, float]]:
    """The sampled token and then `count - 1` others."""
    words = vocab_size - FIRST_TOKEN
    return [
        (token, logprob),
        *((FIRST_TOKEN + (token - FIRST_TOKEN + n) % words, logprob - n) for n in range(1, count)),
    ]
