"""The mock's language model: a pure function in place of a network.

Invariants:
- The token after a prefix is a function of (prefix, seed) for a given model and weight version. A response cut into any
  chunks is therefore the undivided response, on any engine that was started with the same model options.
- A token's logprob is a function of (prefix, token): like a policy's, it does not depend on the seed.
- The cost is one multiplication per prefix token in C, and less than a microsecond per generated token.

The prefix enters through a polynomial hash modulo 2**64, which takes in one more token in O(1). That hash, mixed with
the seed, gives 64 bits: some decide whether the response ends here, others which token comes next.

Lengths are heavy-tailed over prompts and correlated within a group. A response ends at each position with probability
1 / mean, and the mean is drawn from a log-normal distribution by a hash of the first 16 prompt tokens (fewer where the
prompt is shorter), so the responses to one prompt share it. `seer_prompt_len` tells a short prompt from its response.
"""

from __future__ import annotations

import math
from functools import cache, lru_cache
from hashlib import blake2b
from statistics import NormalDist
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

EOS = 2
FIRST_TOKEN = 3  # 0 to 2 are special and never sampled, but for EOS
ANCHOR_TOKENS = 16
"""How many prompt tokens, from the first, decide a response's expected length."""

_MASK = 2**64 - 1
_BASE = 0x9E3779B97F4A7C15  # odd, so a differing token stays visible in the hash however far back it is
_MIX = 0xBF58476D1CE4E5B9
_LOW_BITS = 2**24 - 1
_EOS_SCALE = 2**24
_LOGPROBS = tuple(-(6 * n + 3) / 8192 for n in range(4096))  # evenly over (-3, 0)


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """What the model honours of a call's sampling parameters; `max_tokens` and `min_tokens` count this call only."""

    seed: int
    max_tokens: int
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: frozenset[int] = frozenset()


class Response(msgspec.Struct):
    """Tokens with one logprob each, and the hashes of the prefix without (`before`) and with them (`after`)."""

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    stop_reason: int | None
    before: int
    after: int


class LanguageModel(msgspec.Struct, frozen=True, kw_only=True):
    """A family of functions from prefixes to tokens; `seed` and `version` stand for the weights.

    `mean_length` tokens is the mean over all prompts and `sigma` the spread of its logarithm between prompts; 0 gives
    every prompt the same mean. `temperature` has no part in it: a greedy call is one with seed 0.
    """

    seed: int = 0
    mean_length: float = 400.0
    sigma: float = 1.0
    vocab_size: int = 32_000
    version: str = "default"

    def adapted(self, adapter: str) -> LanguageModel:
        """The model with a LoRA adapter, which is known by its path; itself without one."""
        return msgspec.structs.replace(self, version=f"{self.version}+{adapter}") if adapter else self

    def absorb(self, prefix: Sequence[int]) -> int:
        """Hash of a non-empty prefix."""
        tokens = np.array(prefix, np.uint64) + np.uint64(1)
        return int(tokens @ _powers(tokens.size))

    def respond(self, prefix: Sequence[int], prompt_len: int, sampling: Sampling) -> Response:
        """Continue `prefix`, whose first `prompt_len` tokens are the prompt, until a stop or `max_tokens`."""
        state = before = self.absorb(prefix)
        salt = _number("weights", self.seed, self.version)
        noise = _number("noise", sampling.seed) ^ salt
        threshold = 0 if sampling.ignore_eos else self._threshold(prefix[: min(ANCHOR_TOKENS, prompt_len)])
        stops, min_tokens, words = sampling.stop_token_ids, sampling.min_tokens, self.vocab_size - FIRST_TOKEN
        token_ids: list[int] = []
        logprobs: list[float] = []
        finish_reason, stop_reason = "length", None
        for n in range(sampling.max_tokens):
            draw = ((state ^ noise) * _MIX) & _MASK
            draw ^= draw >> 32
            if draw & _LOW_BITS < threshold and n >= min_tokens:
                token = EOS
            else:
                token = FIRST_TOKEN + ((draw >> 40) * words >> 24)
                if n < min_tokens and token in stops:
                    token = self._successor(token, stops)
            state = (state + token + 1) * _BASE & _MASK
            token_ids.append(token)
            logprobs.append(_LOGPROBS[(state ^ salt) >> 52])
            if token == EOS or token in stops:
                finish_reason, stop_reason = "stop", None if token == EOS else token
                break
        return Response(token_ids, logprobs, finish_reason, stop_reason, before, state)

    def expected_length(self, prompt_ids: Sequence[int]) -> float:
        """Mean length, in tokens, of this prompt's responses."""
        return _EOS_SCALE / self._threshold(prompt_ids[:ANCHOR_TOKENS])

    def _threshold(self, anchor: Sequence[int]) -> int:
        """Of 2**24 draws, those that end a response whose prompt begins with `anchor`."""
        return _eos_threshold(tuple(anchor), self.seed, self.mean_length, self.sigma)

    def _successor(self, token: int, stops: Collection[int]) -> int:
        """The nearest token above, cyclically, that does not stop; `token` itself if all of them do."""
        words = self.vocab_size - FIRST_TOKEN
        others = (FIRST_TOKEN + (token - FIRST_TOKEN + step) % words for step in range(1, words))
        return next((other for other in others if other not in stops), token)


def reference_response(
    prompt_ids: Sequence[int],
    seed: int,
    max_tokens: int,
    *,
    model: LanguageModel | None = None,
    min_tokens: int = 0,
    temperature: float = 1.0,
    ignore_eos: bool = False,
    stop_token_ids: Collection[int] = (),
) -> tuple[list[int], list[float], str]:
    """Tokens, logprobs and finish reason of an undivided call, to compare a chunked run with.

    `model` is by default that of a mock engine started without options. A context limit is the caller's to apply:
    an engine stops at `max_model_len - len(prompt_ids)` tokens.
    """
    sampling = Sampling(
        seed=seed if temperature else 0,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        ignore_eos=ignore_eos,
        stop_token_ids=frozenset(stop_token_ids),
    )
    response = (model or LanguageModel()).respond(prompt_ids, len(prompt_ids), sampling)
    return response.token_ids, response.logprobs, response.finish_reason


@lru_cache(maxsize=65_536)
def _number(*parts: str | int) -> int:
    """64 bits from a purpose and its parts, the same in every process."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


@lru_cache(maxsize=65_536)
def _eos_threshold(anchor: tuple[int, ...], seed: int, mean_length: float, sigma: float) -> int:
    uniform = (_number("length", seed, *anchor) + 0.5) / 2**64
    normal = NormalDist().inv_cdf(min(max(uniform, 1e-12), 1 - 1e-12))
    mean = max(1.0, mean_length * math.exp(sigma * normal - sigma**2 / 2))
    return max(1, round(_EOS_SCALE / mean))


def _powers(count: int) -> npt.NDArray[np.uint64]:
    """_BASE to the powers count down to 1."""
    size = 1 << count.bit_length()
    return _descending_powers(size)[size - count :]


@cache
def _descending_powers(size: int) -> npt.NDArray[np.uint64]:
    return np.ascontiguousarray(np.cumprod(np.full(size, _BASE, np.uint64))[::-1])
