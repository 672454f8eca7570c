"""What an engine is: what its steps cost and how much it holds.

A step's time is linear in what it does, so that the time of many steps between two changes of the batch has a closed
form: while KV grows by `growth` tokens a step, s steps take `fixed * s + slope * s * s / 2` seconds.
"""

from __future__ import annotations

import math

import msgspec

from seer_async.testing.cost import LinearCost

_FLAT = 1e-18  # below this slope, seconds a step a step, time is linear in steps


class EngineCost(LinearCost, frozen=True, kw_only=True):
    """Seconds of engine time; `LinearCost`, and what drafting and a KV pool cost.

    `draft_token_s` is what one more drafted token adds to a step, its drafting included. `load_token_s` is how long a
    token's KV takes from the pool; loads run beside decoding and delay only the call that waits for them.
    """

    draft_token_s: float = 0.0005
    load_token_s: float = 0.0

    def stretch(self, batch: int, drafted: float, context: float, growth: float) -> Stretch:
        """Steps of `batch` sequences from `context` tokens of KV on, with `drafted` tokens in each."""
        fixed = self.base_s + self.sequence_s * batch + self.draft_token_s * drafted + self.context_token_s * context
        return Stretch(fixed, self.context_token_s * growth)


class Stretch(msgspec.Struct, frozen=True):
    """Steps without a change of the batch: the first takes `fixed` seconds, each later one `slope` more."""

    fixed: float
    slope: float

    def seconds(self, steps: float) -> float:
        """How long that many steps take."""
        return (self.fixed + self.slope * steps / 2) * steps

    def steps(self, seconds: float) -> float:
        """How many steps that long is; the inverse of `seconds`."""
        if self.slope < _FLAT:
            return seconds / self.fixed
        return 2 * seconds / (self.fixed + math.sqrt(self.fixed * self.fixed + 2 * self.slope * seconds))


class EngineModel(msgspec.Struct, frozen=True, kw_only=True):
    """One engine: `kv_tokens` of KV memory, at most `max_seqs` sequences in a batch."""

    cost: EngineCost
    kv_tokens: int
    max_seqs: int = 1024


class Fleet(msgspec.Struct, frozen=True, kw_only=True):
    """`instances` engines alike, and the tokens of a chunk on them (0: whole responses)."""

    engine: EngineModel
    instances: int
    chunk_size: int
