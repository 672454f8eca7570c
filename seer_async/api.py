"""Values of the native HTTP API: what `seer serve` answers and its clients read.

Times are Unix seconds, durations seconds, lengths tokens, sizes bytes. Fields may be added; none changes its meaning.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from seer_async.snapshot import Snapshot
from seer_async.types import Sample

RUNNING, DONE, CANCELLED, FAILED, LOST = "running", "done", "cancelled", "failed", "lost"


_PROMPT = {
    "properties": {
        "id": {"type": "string"},
        "prompt": {"type": "string"},
        "messages": {"type": "array", "items": {"type": "object"}},
        "prompt_token_ids": {"type": "array", "items": {"type": "integer", "minimum": 0}},
    },
    "oneOf": [{"required": [name]} for name in ("prompt", "messages", "prompt_token_ids")],
}


class RolloutOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """How a rollout is sampled: `n` responses to each prompt; what is not given is as the server is configured.

    `sampling` holds options as `seer_async.sampling.Sampling` names them; `model` is the served model or a LoRA
    adapter. With `stream` the answer is the stream of samples itself.
    """

    n: int | None = None
    sampling: dict[str, Any] = {}
    model: str | None = None
    chunk_size: int | None = None
    stream: bool = False


class RolloutRequest(RolloutOptions, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A rollout that somebody wants.

    A prompt has exactly one of `prompt`, `messages` and `prompt_token_ids`, an `id` if you like, and any other fields,
    which come out again as `extra`. Errors call a prompt by its place, from 1, as they call a dataset's line.
    """

    prompts: list[Annotated[dict[str, Any], msgspec.Meta(extra_json_schema=_PROMPT)]]


class TailView(msgspec.Struct, frozen=True, kw_only=True):
    """One unfinished response of a rollout; `left` by its group's estimate."""

    id: str
    state: str
    generated: int
    left: int


class RolloutStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A rollout at one moment.

    `status` is "running", "done", "cancelled", "failed" (see `error`) or "lost" (its server ended before it did; what
    had finished is still there). Of `samples` responses, `waiting` are not begun, `open` are with the scheduler, `done`
    have ended by themselves and `failed` have not; `spooled` of them can be read, in `groups_done` whole groups.
    `tokens` are those of the ended and the open ones. `tokens_left` and `eta_s` are estimates, None where nothing is
    known yet. `tail` are the unfinished responses with the most estimated tokens left, longest first.
    """

    id: str
    status: str
    error: str
    created: float
    ended: float | None
    groups: int
    n: int
    seed: int
    samples: int
    waiting: int
    open: int
    done: int
    failed: int
    spooled: int
    groups_done: int
    tokens: int
    tokens_per_s: float
    tokens_left: int | None
    eta_s: float | None
    bytes: int
    tail: list[TailView] = []


class RolloutList(msgspec.Struct, frozen=True, kw_only=True):
    """Every rollout that the server knows, newest first."""

    rollouts: list[RolloutStatus]


class GroupSamples(msgspec.Struct, frozen=True, kw_only=True):
    """A finished group: all its samples, by index."""

    group: str
    samples: list[Sample]


class EngineRate(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine generates, all its clients together: tokens a second over the last few seconds."""

    name: str
    url: str
    tokens_per_s: float


class Lengths(msgspec.Struct, frozen=True, kw_only=True):
    """Lengths of the latest `count` responses that ended by themselves.

    `bins` counts those that are at least `edges[i]` and less than `edges[i + 1]` tokens long.
    """

    count: int
    edges: list[float]
    bins: list[int]
    median: int
    p90: int
    p99: int
    longest: int


class FleetStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The service at one moment.

    `history` holds `[seconds ago, tokens a second, requests in flight]`, oldest first. `groups_hidden` and
    `rollouts_hidden` count those beyond the ones listed.
    """

    time: float
    started: float
    run: str
    model: str
    version: str
    paused: str | None
    max_requests: int
    tokens_per_s: float
    samples_per_s: float
    engines: list[EngineRate]
    lengths: Lengths
    history: list[tuple[float, float, int]]
    snapshot: Snapshot
    groups_hidden: int
    rollouts: list[RolloutStatus]
    rollouts_hidden: int
