"""The two ways a vLLM server takes token ids in and gives token ids out, and the check of what comes back.

Invariant: a `ChunkReply` that leaves this module answers exactly the call it was decoded for: its tokens are in the
vocabulary, no more than asked for, with one finite logprob each, from the right model and under the right request id.
Anything else is an `EngineError` of kind BAD_REPLY, and none of its tokens are used.

"generate" is vLLM's /inference/v1/generate (it also says which weights sampled which token); "completions" is the
OpenAI-style /v1/completions that every server has.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from seer_async.errors import EngineError, FailureKind
from seer_async.types import ChunkReply, TopLogprob, VersionSpan

if TYPE_CHECKING:
    from seer_async.types import EngineInfo

_LOGPROB_FLOOR = -9999.0  # what vLLM writes for minus infinity and NaN
_LOGPROB_SLACK = 1e-3  # a log-softmax in low precision may round above 0
_TOKEN_ID_END = 2**31
_FINISH_REASONS = frozenset({"stop", "length", "abort"})


class CallSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One call as the wire needs it. `vocab_size` None means unknown, and is not checked.

    `load` False asks the engine not to look for the prefix in its KV pool, `save` False not to put this call's KV
    there, because nobody will continue from it. Both are for the shared-memory pool; others ignore them.
    """

    request_id: str
    model: str
    prefix: list[int]
    params: dict[str, Any]
    cache_salt: str
    max_tokens: int
    vocab_size: int | None = None
    load: bool = True
    save: bool = True

    @property
    def transfer(self) -> dict[str, Any]:
        """What the body says about the KV pool; nothing unless the pool should do something else than usual."""
        asked = {} if self.load else {"seer_load": False}
        asked |= {} if self.save else {"seer_save": False}
        return {"kv_transfer_params": asked} if asked else {}


class Dialect(Protocol):
    """One way to talk to an engine."""

    name: str
    path: str
    abort_path: str

    def encode(self, spec: CallSpec) -> bytes:
        """The body of the call."""

    def decode(self, body: bytes, spec: CallSpec) -> ChunkReply:
        """The checked reply; raises EngineError (BAD_REPLY)."""


class _Transfer(msgspec.Struct):
    """What an engine with our KV pool says about a call's prefix, in tokens."""

    seer_local_tokens: int = 0
    seer_pool_tokens: int = 0


class _Raw(msgspec.Struct):
    """A reply before it is checked."""

    id: str
    model: str
    prompt_tokens: int
    token_ids: list[int]
    logprobs: list[float]
    tops: list[list[TopLogprob]]
    finish_reason: str | None
    stop_reason: int | str | None
    versions: tuple[VersionSpan, ...] = ()
    transfer: _Transfer | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int


# /inference/v1/generate


class _Position(msgspec.Struct):
    token_id: int
    logprob: float
    top_logprobs: list[TopLogprob] = []


class _Positions(msgspec.Struct):
    content: list[_Position]


class _GenerateChoice(msgspec.Struct):
    token_ids: list[int]
    logprobs: _Positions
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    weight_versions: list[VersionSpan] | None = None


class _GenerateReply(msgspec.Struct):
    request_id: str
    usage: _Usage
    choices: list[_GenerateChoice]
    model: str | None = None
    kv_transfer_params: _Transfer | None = None


class Generate:
    """vLLM's token-in, token-out endpoint."""

    name = "generate"
    path = "/inference/v1/generate"
    abort_path = "/inference/v1/abort_requests"

    def __init__(self) -> None:
        self._encoder = msgspec.json.Encoder()
        self._decoder = msgspec.json.Decoder(_GenerateReply)

    def encode(self, spec: CallSpec) -> bytes:
        """The body of the call.

        This endpoint counts the sampled token among the alternatives, so it is asked for one more.
        """
        tops = spec.params["logprobs"]
        return self._encoder.encode(
            {
                "request_id": spec.request_id,
                "model": spec.model,
                "token_ids": spec.prefix,
                "sampling_params": spec.params | {"logprobs": tops + (tops > 0)},
                "cache_salt": spec.cache_salt,
                **spec.transfer,
            }
        )

    def decode(self, body: bytes, spec: CallSpec) -> ChunkReply:
        """The checked reply."""
        reply = _decode(self._decoder, body)
        choice = _only(reply.choices)
        positions = choice.logprobs.content
        if [p.token_id for p in positions] != choice.token_ids:
            raise _bad("its logprobs are for other tokens than its token_ids")
        raw = _Raw(
            reply.request_id,
            spec.model if reply.model is None else reply.model,
            reply.usage.prompt_tokens,
            choice.token_ids,
            [p.logprob for p in positions],
            [p.top_logprobs for p in positions],
            choice.finish_reason,
            choice.stop_reason,
            tuple(choice.weight_versions or ()),
            reply.kv_transfer_params,
        )
        return _checked(raw, spec)


# /v1/completions


class _Logprobs(msgspec.Struct):
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] = []


class _Choice(msgspec.Struct):
    token_ids: list[int]
    logprobs: _Logprobs
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class _CompletionReply(msgspec.Struct):
    id: str
    model: str
    usage: _Usage
    choices: list[_Choice]
    kv_transfer_params: _Transfer | None = None


class Completions:
    """The OpenAI-style endpoint, with vLLM's extensions for token ids."""

    name = "completions"
    path = "/v1/completions"
    abort_path = "/abort_requests"  # of a server in development mode

    def __init__(self) -> None:
        self._encoder = msgspec.json.Encoder()
        self._decoder = msgspec.json.Decoder(_CompletionReply)

    def encode(self, spec: CallSpec) -> bytes:
        """The body of the call."""
        params = dict(spec.params)
        xargs = params.pop("extra_args")
        if bias := params.pop("logit_bias", None):
            params["logit_bias"] = {str(token_id): value for token_id, value in bias.items()}
        return self._encoder.encode(
            {
                **params,
                "model": spec.model,
                "prompt": spec.prefix,
                "request_id": spec.request_id,
                "vllm_xargs": xargs,
                "return_token_ids": True,
                "return_tokens_as_token_ids": True,
                "cache_salt": spec.cache_salt,
                **spec.transfer,
            }
        )

    def decode(self, body: bytes, spec: CallSpec) -> ChunkReply:
        """The checked reply."""
        reply = _decode(self._decoder, body)
        choice = _only(reply.choices)
        raw = _Raw(
            reply.id,
            reply.model,
            reply.usage.prompt_tokens,
            choice.token_ids,
            choice.logprobs.token_logprobs,
            [_tops(top) for top in choice.logprobs.top_logprobs],
            choice.finish_reason,
            choice.stop_reason,
            transfer=reply.kv_transfer_params,
        )
        return _checked(raw, spec)


def _tops(top: dict[str, float]) -> list[TopLogprob]:
    try:
        return [TopLogprob(int(key.removeprefix("token_id:")), value) for key, value in top.items()]
    except ValueError:
        raise _bad("its top_logprobs are not keyed by token id") from None


DIALECTS: dict[str, Dialect] = {d.name: d for d in (Generate(), Completions())}


def dialect_for(spec: CallSpec, info: EngineInfo) -> Dialect:
    """How a call is put to an engine: as it was attached, but as completions where only those give all alternatives.

    /inference/v1/generate leaves out the last one where the sampled token is not among them, and it is asked for one
    more because of that; an engine refuses that one more at its limit.
    """
    at_the_limit = 0 < spec.params["logprobs"] >= info.max_logprobs
    return DIALECTS["completions" if at_the_limit else info.dialect]


def engine_names(request_id: str) -> tuple[str, str]:
    """What an engine may call a request, by the endpoint at which it came; names that it does not know do no harm."""
    return f"generate-tokens-{request_id}", f"cmpl-{request_id}-0"


def _decode(decoder: msgspec.json.Decoder[Any], body: bytes) -> Any:
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _bad(f"it is not what was asked for: {error}") from error


def _only(choices: list[Any]) -> Any:
    if len(choices) != 1:
        raise _bad(f"it holds {len(choices)} choices instead of one")
    return choices[0]


def _checked(raw: _Raw, spec: CallSpec) -> ChunkReply:  # noqa: C901 - a list of checks, read from top to bottom
    count = len(raw.token_ids)
    if not raw.id.endswith(f"-{spec.request_id}") or raw.prompt_tokens != len(spec.prefix):
        raise _bad("it belongs to another request")
    if raw.model != spec.model:
        raise _bad(f"it comes from model {raw.model[:80]!r}")
    if raw.finish_reason not in _FINISH_REASONS:
        raise _bad(f"its finish_reason is {str(raw.finish_reason)[:80]!r}")
    if count > spec.max_tokens:
        raise _bad(f"it holds {count} tokens where at most {spec.max_tokens} were asked for")
    if count == 0 and raw.finish_reason != "abort":
        raise _bad("it holds no token")
    if len(raw.logprobs) != count:
        raise _bad(f"it holds {len(raw.logprobs)} logprobs for {count} tokens")
    if any(not math.isfinite(p) or p > _LOGPROB_SLACK for p in raw.logprobs):
        raise _bad("a logprob is not a number at or below 0")
    if raw.token_ids and not 0 <= min(raw.token_ids) <= max(raw.token_ids) < (spec.vocab_size or _TOKEN_ID_END):
        raise _bad("a token id is outside the vocabulary")
    if raw.finish_reason == "length" and count < spec.max_tokens:
        raise _bad(f"it stops for length after {count} of {spec.max_tokens} tokens")
    if any(span.start < 0 or span.end > count or span.start > span.end for span in raw.versions):
        raise _bad("its weight_versions do not fit its tokens")
    return ChunkReply(
        token_ids=raw.token_ids,
        logprobs=[max(p, _LOGPROB_FLOOR) for p in raw.logprobs],
        top_logprobs=_alternatives(raw, spec),
        finish_reason=raw.finish_reason or "",
        stop_reason=raw.stop_reason,
        versions=raw.versions,
        cached=raw.transfer.seer_local_tokens if raw.transfer else 0,
        pooled=raw.transfer.seer_pool_tokens if raw.transfer else 0,
    )


def _alternatives(raw: _Raw, spec: CallSpec) -> list[list[TopLogprob]] | None:
    """The asked-for alternatives of each position; the sampled token itself is listed only if it is among them."""
    asked = spec.params.get("logprobs", 0)
    if not asked:
        return None
    if len(raw.tops) != len(raw.token_ids):
        raise _bad("it lacks top_logprobs")
    return [sorted(top, key=lambda alternative: -alternative.logprob)[:asked] for top in raw.tops]


def _bad(what: str) -> EngineError:
    return EngineError(FailureKind.BAD_REPLY, f"the reply is unusable: {what}")
