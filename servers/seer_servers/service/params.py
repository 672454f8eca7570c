"""From vLLM's sampling parameters to a group's options.

Invariant: an option either means exactly what it means in one call to vLLM, or is refused with the reason. Options with
a hidden state that does not survive a chunk border make a response indivisible; those that are not known here are
passed on as they are, for the engine to judge.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import msgspec

from seer_async.errors import ConfigError
from seer_async.options import GroupOptions
from seer_async.sampling import Sampling
from seer_servers.service.errors import bad_request

if TYPE_CHECKING:
    from collections.abc import Mapping

    from seer_async.config import Config

REFUSED = {
    "best_of": "choosing among responses is not sampling from the policy",
    "use_beam_search": "beam search is not sampling from the policy",
    "echo": "the response holds what was generated; the prompt is yours already",
    "prompt_logprobs": "they belong to the prompt, not to a chunk; ask an engine itself",
    "prompt_logprob_token_ids": "they belong to the prompt, not to a chunk; ask an engine itself",
    "logprob_token_ids": "only the most likely alternatives are recorded; set logprobs instead",
    "repetition_detection": "the detector's state does not survive a chunk border",
    "logits_processors": "their state does not survive a chunk border",
    "watermarking": "a watermarked sample is not the policy's",
    "truncate_prompt_tokens": "a shortened prompt is another prompt",
    "prompt_embeds": "a prompt goes from engine to engine as token ids",
    "features": "multimodal prompts cannot move between engines",
    "content_parts": "multimodal prompts cannot move between engines",
    "kv_transfer_params": "where KV goes is decided for each chunk",
    "ec_transfer_params": "where KV goes is decided for each chunk",
    "return_prompt_text": "prompts are kept as token ids; ask /detokenize",
}

_INDIVISIBLE = ("structured_outputs", "thinking_token_budget")
_OUR_OWN = frozenset(
    {"n", "seed", "output_kind", "stream_interval", "skip_clone", "detokenize", "output_text_buffer_length"}
    | {"flat_logprobs", "routed_experts_prompt_start", "prompt_logprob_start"}
)  # how an answer is delivered, which is decided here
_KNOWN = frozenset(field.name for field in msgspec.structs.fields(Sampling)) - {"seed"}
_UNSET: tuple[Any, ...] = (None, [], {})
_GREEDY = 1e-5  # below, vLLM takes a temperature for 0
_SEED_END = 2**63

_Kind = TypeVar("_Kind")


class Shared(msgspec.Struct):
    """The parameters that are about a whole group."""

    n: Annotated[int, msgspec.Meta(ge=1)] = 1
    seed: int | None = None


class Asked(msgspec.Struct, frozen=True):
    """What was asked for: `n` responses, with `seeds` if they are to be repeatable."""

    options: GroupOptions
    n: int
    seeds: tuple[int, ...] | None


def refuse(fields: Mapping[str, Any]) -> None:
    """Raise ApiError (400) for the first field that is set and can never be right."""
    for name, reason in REFUSED.items():
        value = fields.get(name)
        if value is not False and value not in _UNSET:
            raise bad_request(f"{name} is not supported: {reason}.", name)


def asked(
    params: Mapping[str, Any],
    config: Config,
    *,
    room: int,
    model: str,
    salt: str,
    stream: bool,
    capabilities: frozenset[str],
) -> Asked:
    """What `params` ask of a `model`, with `room` tokens left in the context on engines with these `capabilities`.

    Raises:
        ApiError: 400, as vLLM says it.
    """
    refuse(params)
    params = {name: value for name, value in params.items() if value is not None and not name.startswith("_")}
    if not isinstance(extra := params.get("extra_args", {}), dict):
        raise bad_request("extra_args must be an object.", "extra_args")
    refuse(extra)
    shared = _convert({name: params[name] for name in ("n", "seed") if name in params}, Shared)
    if shared.n > config.serve.max_requests:
        raise bad_request(f"n must be at most {config.serve.max_requests} (serve.max_requests).", "n")
    sampling = _sampling(params, room)
    if sampling.temperature < _GREEDY and shared.n > 1:
        raise bad_request(f"n must be 1 when using greedy sampling, got {shared.n}.", "n")
    passed = {name: value for name, value in params.items() if name not in _KNOWN | _OUR_OWN}
    if passed.get("thinking_token_budget") == -1:  # vLLM's word for none
        del passed["thinking_token_budget"]
    options = GroupOptions(
        sampling=sampling,
        chunk_size=config.serve.stream_chunk_size if stream else config.rollout.chunk_size,
        mixed_versions="mark" if stream else config.rollout.mixed_versions,  # what was sent cannot be taken back
        passed=passed,
        salt=salt,
        model=model,
        indivisible=any(name in passed for name in _INDIVISIBLE) or not sampling.required_capabilities <= capabilities,
    )
    return Asked(options, shared.n, _seeds(shared))


def _sampling(params: Mapping[str, Any], room: int) -> Sampling:
    known = {name: value for name, value in params.items() if name in _KNOWN}
    known.setdefault("max_tokens", max(room, 1))
    if isinstance(known.get("stop"), str):
        known["stop"] = [known["stop"]]
    if known.get("logprobs") == -1:
        raise bad_request("logprobs=-1 (the whole vocabulary) is not supported: set a number.", "logprobs")
    return _convert(known, Sampling)


def _seeds(shared: Shared) -> tuple[int, ...] | None:
    """As vLLM: the first response gets the seed itself, each further one the next; -1 is none."""
    if shared.seed is None or shared.seed == -1:
        return None
    if not -_SEED_END <= shared.seed < _SEED_END:
        raise bad_request("seed must be a signed 64-bit integer.", "seed")
    return tuple((shared.seed + index + _SEED_END) % (2 * _SEED_END) - _SEED_END for index in range(shared.n))


def _convert(tree: Mapping[str, Any], kind: type[_Kind]) -> _Kind:
    try:
        return msgspec.convert(tree, kind, str_keys=True)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$")
        raise bad_request(f"1 validation error: {message}", path.strip(".`") or None) from None
    except ConfigError as error:
        message = str(error).removeprefix("sampling.")
        raise bad_request(message, message.partition(" ")[0]) from None
