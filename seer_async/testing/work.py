"""A call inside a simulated engine: what it has, and what the weights will add to it.

Invariant: a token is final when the engine has decoded it; what was only planned is planned again when weights change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from seer_async.testing.model import Generated, Model
from seer_async.types import ChunkReply, TopLogprob, VersionSpan

EPS = 1e-6
"""Steps. An engine counts them as a real number; two targets this close are reached together."""


class Work(msgspec.Struct, eq=False):
    """A call inside an engine. `done` gets the reply, or None when the engine dies."""

    name: str
    prefix: list[int]
    params: dict[str, Any]
    done: Callable[[ChunkReply | None], None]
    tokens: list[int] = []
    logprobs: list[float] = []
    spans: list[VersionSpan] = []
    ahead: Generated | None = None  # what comes after `tokens` while the weights stay as they are
    version: str = ""
    begun: float = 0.0  # the engine's step count when `ahead` began

    @property
    def prompt(self) -> tuple[int, ...]:
        """The prompt before any response token."""
        return tuple(self.prefix[: self.params["extra_args"]["seer_prompt_len"]])

    @property
    def length(self) -> int:
        """Tokens in KV memory, apart from those decoded since `begun`."""
        return len(self.prefix) + len(self.tokens)

    def plan(self, model: Model, version: str, begun: float) -> float:
        """Decide what the weights `version` will add from step `begun` on; returns the step at which it ends."""
        params, have = self.params, len(self.tokens)
        self.version, self.begun = version, begun
        self.ahead = model.generate(
            self.prefix + self.tokens,
            prompt_len=params["extra_args"]["seer_prompt_len"],
            seed=params["seed"],
            version=version,
            max_tokens=params["max_tokens"] - have,
            min_tokens=params.get("min_tokens", 0) - have,
            ignore_eos=params.get("ignore_eos", False),
            stop_token_ids=params.get("stop_token_ids", ()),
        )
        return begun + len(self.ahead.token_ids)

    def keep(self, steps: float) -> int:
        """Make the tokens decoded until step count `steps` final; returns how many there are."""
        assert self.ahead is not None
        start = len(self.tokens)
        count = min(len(self.ahead.token_ids), int(steps - self.begun + EPS))
        self.tokens = self.tokens + self.ahead.token_ids[:count]
        self.logprobs = self.logprobs + self.ahead.logprobs[:count]
        if count:
            self.spans = [*self.spans, VersionSpan(self.version, start, start + count)]
        return count

    def reply(self, *, with_versions: bool, cut: bool = False) -> ChunkReply:
        """The answer, after everything has been kept; `cut` if it was ended before its time."""
        assert cut or self.ahead is not None
        ended = None if cut else self.ahead
        tops = self.params["logprobs"]
        return ChunkReply(
            token_ids=self.tokens,
            logprobs=self.logprobs,
            top_logprobs=alternatives(self.tokens, self.logprobs) if tops else None,
            finish_reason=ended.finish_reason if ended else "abort",
            stop_reason=ended.stop_reason if ended else None,
            versions=tuple(self.spans) if with_versions else (),
        )


def alternatives(tokens: Sequence[int], logprobs: Sequence[float]) -> list[list[TopLogprob]]:
    """One made-up alternative at each position."""
    return [[TopLogprob(token + 1, logprob - 1)] for token, logprob in zip(tokens, logprobs, strict=True)]
