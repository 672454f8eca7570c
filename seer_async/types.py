"""Values that travel between the parts: prompts, replies, provenance, finished samples.

Everything here is plain data. A `Prompt` and a `Sample` are what enters and leaves a run; a `ChunkReply` is what
an engine said; a `Chunk` is the record of one accepted chunk. Times are Unix seconds (on a virtual clock, seconds since
its start), so those of a resumed run line up with those before it.
"""

from __future__ import annotations

from typing import Any

import msgspec

UNKNOWN_VERSION = "unknown"  # of an engine that does not name its weights


class Message(msgspec.Struct, frozen=True):
    """One chat message."""

    role: str
    content: str


class Prompt(msgspec.Struct, frozen=True, kw_only=True):
    """One dataset line: what a group's requests all start from.

    Exactly one of `text`, `messages` and `token_ids` is given by the user; `token_ids` is filled in by
    tokenising through an engine before the prompt reaches the core. `line` is where it stands in its file, from 1.
    """

    id: str
    line: int | None = None
    text: str | None = None
    messages: list[Message] | None = None
    token_ids: list[int] | None = None
    extra: dict[str, Any] | None = None


class TopLogprob(msgspec.Struct, frozen=True):
    """One alternative at one position."""

    token_id: int
    logprob: float


class VersionSpan(msgspec.Struct, frozen=True):
    """`version` sampled the tokens [start, end) of a reply."""

    version: str
    start: int
    end: int


class ChunkReply(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine answered to one call; checked against the call before it gets here.

    `token_ids`, `logprobs` and (when asked for) `top_logprobs` have one entry per generated token.
    `finish_reason` is "stop", "length" or "abort"; `stop_reason` is a stop string or a stop token id, and
    None when the model's own end-of-sequence token ended the response. `versions` is empty when the engine
    does not say which weights sampled which token; `version_after` is then what it had after the last one. `cached`
    tokens of the prefix were in the engine's own prefix cache, `pooled` came from the KV pool; 0 where it does not say.
    """

    token_ids: list[int]
    logprobs: list[float]
    top_logprobs: list[list[TopLogprob]] | None = None
    finish_reason: str
    stop_reason: int | str | None = None
    versions: tuple[VersionSpan, ...] = ()
    version_after: str | None = None
    cached: int = 0
    pooled: int = 0


class Chunk(msgspec.Struct, frozen=True, kw_only=True):
    """Provenance of one accepted chunk.

    `n` counts the chunks of one response from 0; `tokens` of them were accepted. `queued` is when the request
    entered the Request Buffer, `start` when the call left, `end` when its reply was accepted. `attempt` counts the
    calls made for this chunk from 1. Of its prefix, `cached` tokens were in the engine's own cache and `pooled` came
    from the KV pool, as far as the engine says; the rest was computed.
    """

    n: int
    tokens: int
    engine: str
    epoch: int
    weight_version: str
    attempt: int
    queued: float
    start: float
    end: float
    cached: int = 0
    pooled: int = 0


class Timings(msgspec.Struct, frozen=True, kw_only=True):
    """Where a sample's time went, in seconds. `queued + generating` is less than `total` when calls failed."""

    submitted: float
    first_start: float
    finished: float
    total: float
    queued: float
    generating: float


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One line of samples.jsonl: self-contained, and of the same shape whether it succeeded or failed.

    `stop_reason`, `error` and `weight_version` are empty where there is none: readers that infer a column's type from
    the first lines (as `datasets` does) must not take it for a column of nulls.

    `finish_reason` is "stop", "length", "unfinished" (stopped early by an off-policy policy) or "error".
    `on_policy` is False when tokens of several weight versions were mixed, or when the policy that chose which samples
    to finish biases the set.
    """

    id: str
    group: str
    index: int
    prompt: str | None
    messages: list[Message] | None
    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str | None
    logprobs: list[float]
    top_logprobs: list[list[TopLogprob]] | None
    finish_reason: str
    stop_reason: str
    error: str
    seed: int
    weight_version: str
    on_policy: bool
    chunks: list[Chunk]
    timings: Timings
    extra: dict[str, Any] | None
    run: str


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine is, learned when it is attached; constant during one epoch, except the weight version.

    `boot` tells one life of the server from the next: a changed value is a new epoch. `process` names that life among
    all servers, however they are reached; it is empty where a server does not say. `aliases` are other names of
    `model`. `num_blocks` KV blocks of `block_size` tokens. `shares_prefixes` says that sequences which begin alike
    share KV blocks (vLLM's prefix caching). `kv_pool` names the pool it shares KV through, "kind:id"; engines that
    share one have the same name. `max_logprobs` is the most alternatives it gives for a token.
    """

    boot: str
    process: str = ""
    model: str
    aliases: tuple[str, ...] = ()
    root: str | None = None
    max_model_len: int
    block_size: int
    num_blocks: int
    max_num_seqs: int | None = None
    vocab_size: int | None = None
    logprobs_mode: str | None = None
    max_logprobs: int = 20
    weight_version: str = UNKNOWN_VERSION
    capabilities: frozenset[str] = frozenset()
    shares_prefixes: bool = False
    kv_pool: str | None = None
    dialect: str = "generate"


class PoolStats(msgspec.Struct, frozen=True, kw_only=True):
    """A KV pool as one engine sees it: sizes of the whole pool, and that engine's counters since its start.

    `loads`, `saves`, `failures` (found but not loadable, so computed again) and `refused` (not saved) are blocks.
    """

    blocks: int
    bytes: int
    capacity_bytes: int
    evictions: int
    loads: int
    saves: int
    failures: int
    refused: int


class DraftStats(msgspec.Struct, frozen=True, kw_only=True):
    """An engine's drafting since its start: drafts that were verified, their tokens, and those of them that were right.

    `generated` are all tokens of the engine. What only our drafter counts is 0 or empty with others: its `steps`, of
    which `steps_off` were switched off, `switch_offs` (how often it stopped because it did not pay), `drafter_s` (its
    own seconds), and `accepted_at[i]` of `drafted_at[i]` tokens at position i of a draft.
    """

    verified: int = 0
    drafted: int = 0
    accepted: int = 0
    generated: int = 0
    steps: int = 0
    steps_off: int = 0
    switch_offs: int = 0
    drafter_s: float = 0.0
    drafted_at: list[int] = []
    accepted_at: list[int] = []


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """One reading of an engine's telemetry. Counters are totals since the engine's start; `kv_used` is in [0, 1].

    Of `prompt_tokens`, `cached_tokens` were in the engine's own prefix cache and `pooled_tokens` came from a KV pool.
    What preempted requests compute again is not in them: these are `recomputed_tokens`, None where the engine does not
    say.
    """

    boot: str
    running: int
    waiting: int
    kv_used: float
    preemptions: int
    generated_tokens: int
    prompt_tokens: int
    cached_tokens: int
    pooled_tokens: int = 0
    recomputed_tokens: int | None = None
    weight_version: str | None = None
    pool: PoolStats | None = None
    drafts: DraftStats | None = None

    @property
    def prefilled_tokens(self) -> int:
        """Prompt tokens that were computed: neither in the engine's prefix cache nor loaded from elsewhere."""
        return self.prompt_tokens - self.cached_tokens - self.pooled_tokens
