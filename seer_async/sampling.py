"""Sampling options, and how one request's options become those of one chunk.

Invariant: the chunks of a response, concatenated, are distributed exactly as one undivided call with the same
options, and for a given seed they are that call's tokens wherever the engine has the `position_seeds` capability.
An option that cannot be kept exact over a chunk border is refused, never approximated.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import msgspec

from seer_async.errors import ConfigError

POSITION_SEEDS = "position_seeds"
CONTINUATION = "continuation"
DRAFTS = "drafts"

_SEED_BITS = 63  # vLLM takes a signed 64-bit seed

REFUSED: dict[str, str] = {
    "n": "the number of responses is set for the run (-n), one request per response",
    "best_of": "choosing among responses is not on-policy sampling",
    "use_beam_search": "beam search is not sampling from the policy",
    "echo": "samples.jsonl already holds the prompt and its token ids",
    "prompt_logprobs": "they belong to the prompt, not to a chunk; ask the engine once, without sampling",
    "structured_outputs": "the grammar's state does not survive a chunk border",
    "response_format": "the grammar's state does not survive a chunk border",
    "thinking_token_budget": "the budget's state does not survive a chunk border",
    "repetition_detection": "the detector's state does not survive a chunk border",
    "logits_processors": "their state does not survive a chunk border",
    "watermarking": "a watermarked sample is not the policy's",
    "truncate_prompt_tokens": "a shortened prompt is another prompt; shorten it in the dataset",
}


class Sampling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of every request of a run, named as vLLM names them.

    `max_tokens` and `min_tokens` count over all chunks of a response. `logprobs` is the number of alternatives
    recorded beside each sampled token. `seed` seeds the whole run; each sample's own seed derives from it.
    """

    max_tokens: int = 512
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: list[str] = []
    stop_token_ids: list[int] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int = 0
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] = []
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True

    def __post_init__(self) -> None:
        """Refuse values no engine would take, before anything is started."""
        _check(self.max_tokens >= 1, "max_tokens", "must be at least 1")
        _check(0 <= self.min_tokens <= self.max_tokens, "min_tokens", "must be from 0 to max_tokens")
        _check(math.isfinite(self.temperature) and self.temperature >= 0, "temperature", "must be 0 or more")
        _check(0 < self.top_p <= 1, "top_p", "must be above 0 and at most 1")
        _check(self.top_k >= -1, "top_k", "must be -1 or 0 (off), or the number of tokens to keep")
        _check(0 <= self.min_p <= 1, "min_p", "must be from 0 to 1")
        _check(-2 <= self.presence_penalty <= 2, "presence_penalty", "must be from -2 to 2")  # noqa: PLR2004 - vLLM's bounds
        _check(-2 <= self.frequency_penalty <= 2, "frequency_penalty", "must be from -2 to 2")  # noqa: PLR2004 - vLLM's bounds
        _check(self.repetition_penalty > 0, "repetition_penalty", "must be above 0 (1 is off)")
        _check(self.seed is None or 0 <= self.seed < 2**_SEED_BITS, "seed", "must be from 0 to 2**63 - 1")
        _check(all(self.stop), "stop", "must not hold an empty string")
        _check(all(self.bad_words), "bad_words", "must not hold an empty string")
        _check(self.logprobs >= 0, "logprobs", "must be 0 or more")
        _check(self.allowed_token_ids != [], "allowed_token_ids", "must not be empty; leave it out to allow all")

    @property
    def required_capabilities(self) -> frozenset[str]:
        """What an engine must have so that these options stay exact over a chunk border."""
        looks_back = self.presence_penalty or self.frequency_penalty or self.bad_words
        return frozenset({CONTINUATION}) if looks_back else frozenset()


def _check(ok: bool, field: str, rule: str) -> None:  # noqa: FBT001 - a condition is what it takes
    if not ok:
        raise ConfigError(f"sampling.{field} {rule}")


def mix_seed(*parts: int) -> int:
    """Fold integers into one well-mixed seed in [0, 2**63): SplitMix64's finaliser over a running sum."""
    state = 0
    for part in parts:
        state = (state + (part & 0xFFFFFFFFFFFFFFFF) + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


def response_seed(seed: int, group: str, index: int) -> int:
    """The seed of response `index` of a group, in a run of this seed."""
    digest = int.from_bytes(hashlib.blake2b(group.encode(), digest_size=8).digest())
    return mix_seed(seed, digest, index)


def chunk_seed(seed: int, generated: int, *, position_seeds: bool) -> int:
    """The seed of the call that continues after `generated` tokens.

    An engine with `position_seeds` draws each token's noise from (seed, position), so the sample's own seed is
    right in every chunk. Another engine starts its noise stream anew with each call; sending it the same seed
    again would repeat the noise of the previous chunk, so each chunk gets an independent one.
    """
    return seed if position_seeds or generated == 0 else mix_seed(seed, generated)


def call_params(
    sampling: Sampling,
    *,
    seed: int,
    prompt_len: int,
    generated: int,
    max_tokens: int,
    position_seeds: bool,
    ignore_eos: bool = False,
    kinship: dict[str, str] | None = None,
    passed: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """VLLM sampling parameters of one call that continues after `generated` tokens, for at most `max_tokens` more.

    Options at their default are left out, so that the body stays small. `kinship` tells an engine that drafts which
    requests are siblings. `passed` are parameters that we do not touch.
    """
    own = {"seer_prompt_len": prompt_len} | (kinship or {})
    params: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": max(sampling.top_k, 0),
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "seed": chunk_seed(seed, generated, position_seeds=position_seeds),
        "logprobs": sampling.logprobs,
    }
    if sampling.min_tokens > generated:
        params["min_tokens"] = min(sampling.min_tokens - generated, max_tokens)
    if sampling.ignore_eos or ignore_eos:
        params["ignore_eos"] = True
    for name in _SENT_WHEN_SET:
        if value := getattr(sampling, name):
            params[name] = value
    passed = passed or {}
    return passed | params | {"extra_args": passed.get("extra_args", {}) | own}


# The engine's own stop strings only save work: the core decides about them on the joined text (see text.py).
_SENT_WHEN_SET = (
    "presence_penalty",
    "frequency_penalty",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
)
