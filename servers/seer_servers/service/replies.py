"""Answers of the data plane, in vLLM's fields and order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
from aiohttp import web

from seer_async.types import VersionSpan
from seer_servers.service.logprobs import CompletionLogprobs, Positions

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from seer_async.types import Chunk, Sample


class Usage(msgspec.Struct, frozen=True):
    """Tokens in and out; a prompt counts once, however many responses it has."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int
    prompt_tokens_details: None = None
    completion_tokens_details: None = None


class CompletionChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One response to one prompt."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None
    token_ids: list[int] | None
    prompt_logprobs: None = None
    prompt_token_ids: list[int] | None
    routed_experts: None = None


class CompletionReply(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of /v1/completions."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    service_tier: None = None
    system_fingerprint: None = None
    usage: Usage
    kv_transfer_params: None = None
    ec_transfer_params: None = None
    metrics: None = None


class CompletionPiece(msgspec.Struct, frozen=True, kw_only=True):
    """What is new of one response."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None
    prompt_token_ids: list[int] | None
    token_ids: list[int] | None


class CompletionChunk(msgspec.Struct, frozen=True, kw_only=True):
    """An event of a stream of /v1/completions."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[CompletionPiece]
    usage: Usage | msgspec.UnsetType = msgspec.UNSET


class GenerateChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One response, or the next tokens of one."""

    index: int
    finish_reason: str | None
    stop_reason: int | str | None
    token_ids: list[int]
    routed_experts: None = None
    sampling_mask: None = None
    weight_versions: list[VersionSpan] | None
    logprobs: Positions | None


class GenerateReply(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of /inference/v1/generate."""

    request_id: str
    model: str
    created: int
    usage: Usage
    prompt_logprobs: None = None
    prompt_token_id_logprobs: None = None
    prompt_token_ids: list[int] | None
    mm_placeholders: None = None
    metrics: None = None
    kv_transfer_params: None = None
    ec_transfer_params: None = None
    output_mode: str = "tokens"
    choices: list[GenerateChoice]


class GenerateChunk(msgspec.Struct, frozen=True, kw_only=True):
    """An event of a stream of /inference/v1/generate."""

    request_id: str
    output_mode: str = "tokens"
    choices: list[GenerateChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class ChatChunk(msgspec.Struct, frozen=True, kw_only=True):
    """An event of a stream of /v1/chat/completions."""

    id: str
    object: str = "chat.completion.chunk"
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: Usage | msgspec.UnsetType = msgspec.UNSET
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class ChatReply(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of /v1/chat/completions; an engine makes the choices' messages."""

    id: str
    object: str
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: Usage
    prompt_token_ids: list[int] | None = None


def json_reply(reply: Any) -> web.Response:
    """A JSON answer."""
    return web.Response(body=msgspec.json.encode(reply), content_type="application/json")


def usage(prompts: Iterable[Sequence[int]], generated: int) -> Usage:
    """The usage of these prompts, with so many tokens generated in all."""
    size = sum(map(len, prompts))
    return Usage(size, size + generated, generated)


def stop_reason(sample: Sample, stop: Sequence[str]) -> int | str | None:
    """The stop string or stop token id that ended a response; None where it ended otherwise."""
    said = sample.stop_reason
    return int(said) if said.isdigit() and said not in stop else said or None


def version_spans(chunks: Sequence[Chunk]) -> list[VersionSpan]:
    """Which weights sampled which tokens of a response."""
    spans: list[VersionSpan] = []
    end = 0
    for chunk in chunks:
        start, end = end, end + chunk.tokens
        if spans and spans[-1].version == chunk.weight_version:
            start = spans.pop().start
        spans.append(VersionSpan(chunk.weight_version, start, end))
    return spans
