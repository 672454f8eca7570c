"""The mock's rendering: OpenAI's bodies to token ids and resolved sampling parameters, as vLLM's routes do it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from seer_servers.mock.tokenizer import byte_tokenizer, render_chat
from seer_servers.mock.wire import COMPLETION_TOKENS, MAX_LOGPROBS, ChatMessage, bad_request, check_model

if TYPE_CHECKING:
    from seer_servers.mock.engine import MockEngine

_DEFAULTS = {
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_p": 1.0,
    "min_p": 0.0,
}
_SHAPES = ("top_p", "top_k", "min_p")  # back at their defaults where the temperature is 0
_LISTS = ("stop_token_ids", "bad_words")
_PLAIN = ("seed", "ignore_eos", "min_tokens", "logit_bias", "allowed_token_ids", "top_k")
_SHOWN = ("include_stop_str_in_output", "skip_special_tokens", "spaces_between_special_tokens", "structured_outputs")

_Logprobs = Annotated[int, msgspec.Meta(ge=0, le=MAX_LOGPROBS)]


class _Body(msgspec.Struct, kw_only=True):
    model: str | None = None
    request_id: str | None = None
    n: Annotated[int, msgspec.Meta(ge=1)] = 1
    max_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    min_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    min_tokens: int = 0
    bad_words: list[str] = []
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    structured_outputs: dict[str, Any] | None = None
    cache_salt: str | None = None
    stream: bool | None = False


class RenderCompletionBody(_Body, kw_only=True):
    """`POST /v1/completions/render`."""

    prompt: str | list[int | str | list[int]]
    logprobs: _Logprobs | None = None


class RenderChatBody(_Body, kw_only=True):
    """`POST /v1/chat/completions/render`."""

    messages: Annotated[list[ChatMessage], msgspec.Meta(min_length=1)]
    add_generation_prompt: bool = True
    max_completion_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    logprobs: bool | None = False
    top_logprobs: _Logprobs | None = 0


def rendered_completions(body: RenderCompletionBody, id_: str, engine: MockEngine) -> list[dict[str, Any]]:
    """One generate request for each prompt."""
    check_model(body.model, engine)
    prompts = _prompts(body.prompt)
    names = [id_] if len(prompts) == 1 else [f"{id_}-{number}" for number in range(len(prompts))]
    limit = body.max_tokens or COMPLETION_TOKENS
    return [
        _rendered(body, name, _ids(prompt, engine), engine, limit=limit, logprobs=body.logprobs)
        for name, prompt in zip(names, prompts, strict=True)
    ]


def rendered_chat(body: RenderChatBody, id_: str, engine: MockEngine) -> dict[str, Any]:
    """The generate request for a conversation."""
    check_model(body.model, engine)
    text = render_chat(body.messages, add_generation_prompt=body.add_generation_prompt)
    limit = body.max_completion_tokens or body.max_tokens
    logprobs = body.top_logprobs if body.logprobs else None
    return _rendered(body, id_, _ids(text, engine), engine, limit=limit, logprobs=logprobs)


def _prompts(prompt: str | list[int | str | list[int]]) -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise bad_request("Either prompt or prompt_embeds must be provided and non-empty.", "prompt")
    tokens = [token for token in prompt if isinstance(token, int)]
    if len(tokens) == len(prompt):
        return [tokens]
    return [each for each in prompt if not isinstance(each, int)]


def _ids(prompt: str | list[int], engine: MockEngine) -> list[int]:
    size = engine.config.model.vocab_size
    ids = byte_tokenizer(size).encode(prompt).ids if isinstance(prompt, str) else prompt
    if not ids:
        raise bad_request("The decoder prompt cannot be empty", "prompt")
    if not 0 <= min(ids) <= max(ids) < size:
        raise bad_request(f"Token id {max(ids)} is out of vocabulary", "prompt")
    return ids


def _rendered(
    body: _Body, id_: str, ids: list[int], engine: MockEngine, *, limit: int | None, logprobs: int | None
) -> dict[str, Any]:
    room = engine.config.max_model_len - len(ids)
    if room < (limit or 1):
        raise bad_request(
            f"This model's maximum context length is {engine.config.max_model_len} tokens. However, you requested "
            f"{limit or 1} output tokens and your prompt contains {len(ids)} input tokens.",
            "max_tokens",
        )
    return {
        "request_id": id_,
        "token_ids": ids,
        "token_offsets": None,
        "features": None,
        "sampling_params": _params(body, limit or room, logprobs),
        "model": body.model,
        "stream": bool(body.stream),
        "cache_salt": body.cache_salt,
        "priority": 0,
    }


def _params(body: _Body, max_tokens: int, logprobs: int | None) -> dict[str, Any]:
    """Like vLLM's: what is at its default is mostly left out."""
    given = {name: value for name in _DEFAULTS if (value := getattr(body, name)) is not None}
    lists = {name: getattr(body, name) or [] for name in _LISTS}
    blank = _Body()
    changed = {name: value for name in (*_PLAIN, *_SHOWN) if (value := getattr(body, name)) != getattr(blank, name)}
    params = _DEFAULTS | given | lists | changed | {"output_kind": 2, "skip_clone": True}
    if max_tokens != COMPLETION_TOKENS:
        params["max_tokens"] = max_tokens
    if params["temperature"] == 0:
        params = {name: value for name, value in params.items() if name not in _SHAPES}
    params["stop"] = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if body.n > 1:
        params["n"] = body.n
    if logprobs is not None:
        params["logprobs"] = logprobs
    return params
