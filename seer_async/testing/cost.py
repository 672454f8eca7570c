"""What a step of a simulated engine costs: the one place to replace when an engine is to be like a measured one."""

from __future__ import annotations

from typing import Protocol

import msgspec


class CostModel(Protocol):
    """Seconds of engine time."""

    def step_s(self, running: int, context: int) -> float:
        """One decoding step: a token for each of `running` sequences of `context` tokens together."""

    def prefill_s(self, tokens: int) -> float:
        """Computing `tokens` prompt tokens that are not cached; nothing is decoded meanwhile."""


class LinearCost(msgspec.Struct, frozen=True, kw_only=True):
    """Memory-bound decoding: a fixed part, a part for each sequence, a part for the KV that is read."""

    base_s: float = 0.010
    sequence_s: float = 0.0005
    context_token_s: float = 0.0
    prefill_token_s: float = 0.00005

    def step_s(self, running: int, context: int) -> float:
        """See `CostModel`."""
        return self.base_s + self.sequence_s * running + self.context_token_s * context

    def prefill_s(self, tokens: int) -> float:
        """See `CostModel`."""
        return self.prefill_token_s * tokens
