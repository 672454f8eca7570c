"""The data plane's request bodies, in vLLM's fields.

Invariant: a body is decoded once, into a `Call` that the engine can run or an `ApiError` in vLLM's shape. `stop`
strings are accepted and ignored (the orchestrator decides them on the joined text), like all fields not named here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, TypeVar

import msgspec

from seer_servers.mock.flight import Call
from seer_servers.mock.model import Sampling
from seer_servers.mock.tokenizer import byte_tokenizer

if TYPE_CHECKING:
    from seer_servers.mock.engine import MockEngine

_SALT_END, _SALT_FORBIDDEN = 128, frozenset("@/\\\0")  # as vLLM has it
MAX_LOGPROBS = 20  # vLLM's default limit
COMPLETION_TOKENS = 16  # what /v1/completions generates where max_tokens is not given

_Count = Annotated[int, msgspec.Meta(ge=0)]
_Positive = Annotated[int, msgspec.Meta(ge=1)]
_Tokens = Annotated[list[int], msgspec.Meta(min_length=1)]


class ApiError(Exception):
    """A request that is refused; `param` names the field at fault."""

    def __init__(self, status: int, kind: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = msgspec.json.encode(
            {"error": {"message": message, "type": kind, "param": param, "code": status}},
        )


def bad_request(message: str, param: str | None = None) -> ApiError:
    """A 400."""
    return ApiError(400, "BadRequestError", message, param)


class Params(msgspec.Struct, kw_only=True):
    """The sampling parameters that matter here; the others would shape a distribution, and the mock has none."""

    max_tokens: _Positive | None = None
    min_tokens: _Count = 0
    temperature: Annotated[float, msgspec.Meta(ge=0)] | None = None
    seed: Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    ignore_eos: bool = False
    stop_token_ids: list[int] | None = None
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    n: int = 1


class _SeerArgs(msgspec.Struct):
    """Seer's own arguments, in the place vLLM has for plug-ins."""

    seer_prompt_len: _Positive | None = None
    seer_group: str = ""


class _GenerateParams(Params, kw_only=True):
    extra_args: _SeerArgs | None = None


class GenerateBody(msgspec.Struct, kw_only=True):
    """`POST /inference/v1/generate`."""

    request_id: str | None = None
    model: str | None = None
    token_ids: _Tokens
    sampling_params: _GenerateParams
    cache_salt: str | None = None
    return_token_ids: bool | None = None
    stream: bool | None = None


class CompletionBody(Params, kw_only=True):
    """`POST /v1/completions`."""

    request_id: str | None = None
    model: str | None = None
    prompt: _Tokens | str
    cache_salt: str | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    vllm_xargs: _SeerArgs | None = None
    stream: bool | None = None


_Body = TypeVar("_Body")


def decode(body: bytes, kind: type[_Body]) -> _Body:
    """Decode one JSON body; raises ApiError for anything that is not a `kind`."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$")
        raise bad_request(f"1 validation error: {message}", path.strip(".`") or None) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise bad_request(f"JSON decode error: {error}") from None


def check_model(name: str | None, engine: MockEngine) -> None:
    """Refuse a name that is not served."""
    if name and name != engine.config.name and name not in engine.adapters:
        raise ApiError(404, "NotFoundError", f"The model `{name}` does not exist.", "model")


def generate_call(body: GenerateBody, id_: str, engine: MockEngine) -> Call:
    """The call a generate body asks for."""
    check_model(body.model, engine)
    params = body.sampling_params
    return _call(body, prefix=body.token_ids, params=params, seer=params.extra_args, id_=id_, engine=engine)


def completion_call(body: CompletionBody, id_: str, engine: MockEngine) -> Call:
    """The call a completions body asks for; vLLM numbers the choices of a request, so its id gets a suffix."""
    check_model(body.model, engine)
    prompt = body.prompt
    if isinstance(prompt, str):
        prompt = byte_tokenizer(engine.config.model.vocab_size).encode(prompt).ids
    if body.max_tokens is None:
        body.max_tokens = COMPLETION_TOKENS
    return _call(body, prefix=prompt, params=body, seer=body.vllm_xargs, id_=f"{id_}-0", engine=engine)


def _call(
    body: GenerateBody | CompletionBody,
    *,
    prefix: list[int],
    params: Params,
    seer: _SeerArgs | None,
    id_: str,
    engine: MockEngine,
) -> Call:
    if body.stream:
        raise bad_request("The mock engine does not stream.", "stream")
    if len(body.cache_salt or "") > _SALT_END or not _SALT_FORBIDDEN.isdisjoint(body.cache_salt or ""):
        raise bad_request(
            "Parameter 'cache_salt' must be at most 128 characters and must not contain '@', '/', '\\', or NUL.",
            "cache_salt",
        )
    if params.n != 1:
        raise bad_request("The mock engine takes one response per request: send n requests.", "n")
    room = engine.config.max_model_len - len(prefix)
    _check_prefix(prefix, room, engine)
    max_tokens = min(params.max_tokens or room, room)
    if params.max_tokens and params.min_tokens > params.max_tokens:
        raise bad_request(
            f"min_tokens must be less than or equal to max_tokens={params.max_tokens}, got {params.min_tokens}.",
            "min_tokens",
        )
    prompt_len = seer.seer_prompt_len if seer and seer.seer_prompt_len else len(prefix)
    if prompt_len > len(prefix):
        raise bad_request(
            f"seer_prompt_len is {prompt_len}, but only {len(prefix)} tokens were sent.", "seer_prompt_len"
        )
    return Call(
        id=id_,
        prefix=prefix,
        prompt_len=prompt_len,
        cache_salt=body.cache_salt,
        adapter=body.model if body.model in engine.adapters else "",
        group=seer.seer_group if seer else "",
        sampling=Sampling(
            seed=_seed(params, engine),
            max_tokens=max_tokens,
            min_tokens=params.min_tokens,
            ignore_eos=params.ignore_eos,
            stop_token_ids=frozenset(params.stop_token_ids or ()),
        ),
    )


def _check_prefix(prefix: list[int], room: int, engine: MockEngine) -> None:
    if not prefix:
        raise bad_request("The decoder prompt cannot be empty")
    if room < 1:
        raise bad_request(
            f"The decoder prompt (length {len(prefix)}) plus at least 1 output token is longer than the maximum model "
            f"length of {engine.config.max_model_len}."
        )
    for token in (min(prefix), max(prefix)):
        if not 0 <= token < engine.config.model.vocab_size:
            raise bad_request(f"Token id {token} is out of vocabulary")


def _seed(params: Params, engine: MockEngine) -> int:
    if params.temperature == 0:
        return 0
    return engine.fresh_seed() if params.seed is None else params.seed


class ChatMessage(msgspec.Struct):
    """One chat message; text only."""

    role: str
    content: str


class TokenizeBody(msgspec.Struct, kw_only=True):
    """`POST /tokenize`: a prompt, or messages of a role and a content each."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_generation_prompt: bool = True
    return_token_strs: bool | None = None


class DetokenizeBody(msgspec.Struct, kw_only=True):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: list[Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]]


class VersionBody(msgspec.Struct):
    """`POST /update_weight_version`."""

    new_version: str


class AbortBody(msgspec.Struct):
    """`POST /abort_requests`; no ids mean all requests."""

    request_ids: list[str] | None = None


class FaultsBody(msgspec.Struct):
    """`POST /mock/faults`: the faults that are on from now, with their probabilities."""

    active: dict[str, float]
