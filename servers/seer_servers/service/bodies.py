"""Request bodies of the data plane: the fields that are looked at here.

All other fields are vLLM's business: they are allowed, and go to an engine as they came. `Any` marks a field that is
refused or left to the engine, whatever its type.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import msgspec

from seer_servers.service.errors import bad_request

if TYPE_CHECKING:
    from aiohttp import web

_SALT = r"^[^@/\\\x00]*$"  # as vLLM wants it
_Count = Annotated[int, msgspec.Meta(ge=0)]
_Body = TypeVar("_Body")


class StreamOptions(msgspec.Struct):
    """What a stream says beside its tokens."""

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


def usage_wanted(options: StreamOptions | None, *, always: bool = False) -> bool:
    """Whether a stream tells its usage at its end, or (`always`) with each event."""
    return bool(options and options.include_usage and (options.continuous_usage_stats or not always))


class OpenAiBody(msgspec.Struct, kw_only=True):
    """What completions and chat completions have in common."""

    model: str | None = None
    request_id: str | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    echo: Any = None
    use_beam_search: Any = None
    best_of: Any = None
    truncate_prompt_tokens: Any = None
    watermarking: Any = None
    prompt_logprobs: Any = None
    logprob_token_ids: Any = None
    repetition_detection: Any = None
    kv_transfer_params: Any = None
    ec_transfer_params: Any = None


class CompletionBody(OpenAiBody, kw_only=True):
    """`POST /v1/completions`; `logprobs` is the number of alternatives beside each sampled token."""

    prompt: str | list[int | str | list[int]] | None = None
    logprobs: int | None = None
    prompt_embeds: Any = None


class ChatBody(OpenAiBody, kw_only=True):
    """`POST /v1/chat/completions`."""

    messages: list[dict[str, Any]]
    logprobs: bool | None = False
    top_logprobs: int | None = 0
    tool_choice: Any = None
    parallel_tool_calls: bool | None = True
    include_reasoning: bool = True
    return_prompt_text: Any = None


class GenerateBody(msgspec.Struct, kw_only=True):
    """`POST /inference/v1/generate`; `sampling_params` are vLLM's."""

    token_ids: Annotated[list[_Count], msgspec.Meta(min_length=1)]
    sampling_params: dict[str, Any]
    model: str | None = None
    request_id: str | None = None
    cache_salt: Annotated[str, msgspec.Meta(min_length=1, max_length=128, pattern=_SALT)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    output_mode: str = "tokens"
    features: Any = None
    content_parts: Any = None
    kv_transfer_params: Any = None
    ec_transfer_params: Any = None


def decode(body: bytes, kind: type[_Body]) -> _Body:
    """One JSON body; raises ApiError (400) for anything that is not a `kind`."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$")
        raise bad_request(f"1 validation error: {message}", path.strip(".`") or None) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise bad_request(f"JSON decode error: {error}") from None


async def read(request: web.Request, kind: type[_Body]) -> _Body:
    """The request's JSON body. Its raw bytes stay at hand: `await request.read()`."""
    if request.content_type != "application/json":
        raise bad_request("Unsupported Media Type: Only 'application/json' is allowed")
    return decode(await request.read(), kind)
