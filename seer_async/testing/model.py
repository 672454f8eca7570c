"""A language model that is a pure function, so that every sample can be checked token by token.

Invariants: the token after a prefix depends on (prefix, seed, weight version) and nothing else, its logprob on (prefix,
token, weight version). A response therefore does not depend on how it was cut into calls, and one lost, repeated or
foreign token changes everything behind it.

A prefix enters as its CRC-32, which takes in a whole prefix in C and one more token in a fraction of a microsecond.
Lengths are log-normal; `correlation` of the variance of their logarithm is shared by all responses to a prompt.
"""

from __future__ import annotations

import math
from array import array
from functools import lru_cache
from hashlib import blake2b
from statistics import NormalDist
from typing import TYPE_CHECKING
from zlib import crc32

import msgspec

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

EOS = 0
_MASK = 2**64 - 1
_STEPS = 2**24  # logprobs are multiples of 4 / _STEPS, so they survive JSON exactly
_NORMAL = NormalDist()


class Generated(msgspec.Struct):
    """Tokens with one logprob each. `finish_reason` is "stop" or "length", `stop_reason` the stop token's id if any."""

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    stop_reason: int | None


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """A family of responses. Lengths in tokens, the end-of-sequence token included."""

    vocab_size: int = 1000
    mean_length: float = 40.0
    sigma: float = 0.8
    correlation: float = 0.75

    def length(self, prompt: Sequence[int], seed: int, version: str) -> int:
        """How long the response is when nothing else ends it."""
        return _length(self, absorb(prompt), seed, version)

    def generate(
        self,
        prefix: Sequence[int],
        *,
        prompt_len: int,
        seed: int,
        version: str,
        max_tokens: int,
        min_tokens: int = 0,
        ignore_eos: bool = False,
        stop_token_ids: Collection[int] = (),
    ) -> Generated:
        """Continue `prefix`, whose first `prompt_len` tokens are the prompt.

        `max_tokens` and `min_tokens` count from the end of `prefix`, as in a call to an engine.
        """
        state = absorb(prefix)
        key = _number("noise", seed, version)
        weights = _number("weights", version)
        length = math.inf if ignore_eos else _length(self, absorb(prefix[:prompt_len]), seed, version)
        last = length - 1 - (len(prefix) - prompt_len)
        tokens: list[int] = []
        logprobs: list[float] = []
        for n in range(max_tokens):
            may_end = n >= min_tokens
            token = EOS if may_end and n >= last else self._token(_mix(state ^ key), () if may_end else stop_token_ids)
            state = crc32(token.to_bytes(4, "little"), state)
            tokens.append(token)
            logprobs.append(-4 * (_mix(state ^ weights) >> 40) / _STEPS)
            if token == EOS or (may_end and token in stop_token_ids):
                return Generated(tokens, logprobs, "stop", None if token == EOS else token)
        return Generated(tokens, logprobs, "length", None)

    def _token(self, draw: int, banned: Collection[int]) -> int:
        words = self.vocab_size - 1
        token = 1 + ((draw >> 40) * words >> 24)
        while token in banned:
            token = 1 + token % words
        return token


def absorb(tokens: Sequence[int]) -> int:
    """The state of the model after these tokens."""
    return crc32(array("I", tokens).tobytes())


def _mix(value: int) -> int:
    """64 well-mixed bits."""
    value = value * 0xD6E8FEB86659FD93 & _MASK
    value ^= value >> 32
    return value * 0xD6E8FEB86659FD93 & _MASK


@lru_cache(maxsize=65_536)
def _number(*parts: int | str) -> int:
    """64 bits out of a purpose and its parts, the same in every process."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


@lru_cache(maxsize=65_536)
def _length(model: Model, prompt: int, seed: int, version: str) -> int:
    shared = _normal("group", prompt) * math.sqrt(model.correlation)
    own = _normal("response", prompt, seed, version) * math.sqrt(1 - model.correlation)
    return max(1, round(model.mean_length * math.exp(model.sigma * (shared + own) - model.sigma**2 / 2)))


def _normal(*parts: int | str) -> float:
    return _NORMAL.inv_cdf((_number(*parts) + 0.5) / 2**64)
