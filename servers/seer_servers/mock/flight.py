"""One request: what was asked, how its response unfolds, how it ended."""

from __future__ import annotations

import asyncio

import msgspec

from seer_servers.mock.model import LanguageModel, Sampling
from seer_servers.mock.speed import Job


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """One validated request. `id` is the engine's name for it; `prefix[:prompt_len]` is the original prompt.

    `adapter` is the name of a LoRA adapter, empty for the model itself; `group` says whose sibling it is.
    """

    id: str
    prefix: list[int]
    prompt_len: int
    sampling: Sampling
    cache_salt: str | None = None
    adapter: str = ""
    group: str = ""


class VersionSpan(msgspec.Struct, frozen=True):
    """`version` sampled the tokens [start, end) of a reply."""

    version: str
    start: int
    end: int


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What a request ended with; `versions` covers `token_ids` without gaps."""

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    stop_reason: int | None
    versions: list[VersionSpan]


class Flight(Job):
    """A request in flight.

    Its response is known from the start; the simulation says how many tokens of it have been generated, and only those
    are ever shown.
    """

    __slots__ = ("adapter", "call", "future", "logprobs", "model", "response", "token_ids", "versions")

    def __init__(self, call: Call, model: LanguageModel, adapter: str = "") -> None:
        self.call = call
        self.model = model
        self.adapter = adapter  # where its weights are
        self.response = model.adapted(adapter).respond(call.prefix, call.prompt_len, call.sampling)
        self.token_ids = self.response.token_ids
        self.logprobs = self.response.logprobs
        self.versions: list[VersionSpan] = []  # of versions before `model`'s
        self.future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        super().__init__(len(call.prefix), len(self.token_ids))

    def switch(self, model: LanguageModel, kept: int) -> None:
        """Go on under another version after the `kept` tokens generated so far."""
        sampling = self.call.sampling
        rest = msgspec.structs.replace(
            sampling,
            max_tokens=sampling.max_tokens - kept,
            min_tokens=max(0, sampling.min_tokens - kept),
        )
        self.versions = self._spans(kept)
        self.model = model
        prefix = self.call.prefix + self.token_ids[:kept]
        self.response = model.adapted(self.adapter).respond(prefix, self.call.prompt_len, rest)
        self.token_ids = self.token_ids[:kept] + self.response.token_ids
        self.logprobs = self.logprobs[:kept] + self.response.logprobs

    def whole(self) -> Outcome:
        """The complete response."""
        return Outcome(
            token_ids=self.token_ids,
            logprobs=self.logprobs,
            finish_reason=self.response.finish_reason,
            stop_reason=self.response.stop_reason,
            versions=self._spans(len(self.token_ids)),
        )

    def cut(self, kept: int) -> Outcome:
        """The first `kept` tokens, ended by an abort."""
        return Outcome(
            token_ids=self.token_ids[:kept],
            logprobs=self.logprobs[:kept],
            finish_reason="abort",
            stop_reason=None,
            versions=self._spans(kept),
        )

    def _spans(self, end: int) -> list[VersionSpan]:
        start = self.versions[-1].end if self.versions else 0
        return [*self.versions, VersionSpan(self.model.version, start, end)] if end > start else self.versions
