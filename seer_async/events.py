"""Events go into the core, commands come out of it; both are plain data.

Invariant: everything that can change a decision arrives as an event with the time at which it happened, so the same
events give the same commands under a live fleet, a virtual clock and a replay.
"""

from __future__ import annotations

from typing import Any

import msgspec

from seer_async.errors import FailureKind
from seer_async.options import GroupOptions
from seer_async.types import Chunk, ChunkReply, EngineInfo, EngineStats, Prompt, Sample, TopLogprob

# Events


class GroupAdded(msgspec.Struct, frozen=True, kw_only=True):
    """A tokenised prompt wants `n` responses.

    `limit` is the most tokens of each; `forced_lengths`, by index, end responses there whatever the model says. Without
    `options` those of the config hold; without `seeds`, each response's seed derives from the run's. In a core that
    lasts, a group that is still open is joined: `n` more responses, numbered on.
    """

    prompt: Prompt
    n: int
    limit: int
    forced_lengths: tuple[int, ...] | None = None
    options: GroupOptions | None = None
    seeds: tuple[int, ...] | None = None


class RequestsCancelled(msgspec.Struct, frozen=True, kw_only=True):
    """Nobody wants these requests' responses any more; those that have ended are passed over."""

    requests: tuple[str, ...]


class HandBackRequested(msgspec.Struct, frozen=True, kw_only=True):
    """These requests end with what they have, and with what their calls in flight have sampled.

    Engines are told to hand that back; one that does not is dealt with by a later `RequestsCancelled`.
    """

    requests: tuple[str, ...]


class InputClosed(msgspec.Struct, frozen=True, kw_only=True):
    """No more groups will come: the run is done when all requests are."""


class Restored(msgspec.Struct, frozen=True, kw_only=True):
    """A journal of an earlier run holds this record; comes after its `GroupAdded` and before any engine is up."""

    record: Record
    emitted: bool = False


class ChunkFinished(msgspec.Struct, frozen=True, kw_only=True):
    """An engine answered a call, and the reply is well-formed."""

    call: int
    reply: ChunkReply


class ChunkFailed(msgspec.Struct, frozen=True, kw_only=True):
    """A call brought nothing."""

    call: int
    kind: FailureKind
    message: str
    retry_after: float | None = None


class EngineUp(msgspec.Struct, frozen=True, kw_only=True):
    """An engine answers, and a first short generation on it worked."""

    engine: str
    info: EngineInfo


class EngineDown(msgspec.Struct, frozen=True, kw_only=True):
    """An engine does not answer any more; whatever was in flight there is lost."""

    engine: str
    reason: str


class EngineReport(msgspec.Struct, frozen=True, kw_only=True):
    """A reading of an engine's telemetry."""

    engine: str
    stats: EngineStats


class EngineHeld(msgspec.Struct, frozen=True, kw_only=True):
    """Somebody has paused the engine itself (`held`), or it goes on: until then what it works on goes elsewhere."""

    engine: str
    held: bool


class EngineAdded(msgspec.Struct, frozen=True, kw_only=True):
    """The fleet has an engine more; it is down until it is up."""

    engine: str


class EngineRemoved(msgspec.Struct, frozen=True, kw_only=True):
    """The fleet has an engine less; what is in flight there is lost."""

    engine: str


class VersionSet(msgspec.Struct, frozen=True, kw_only=True):
    """These are the weights to sample from, whatever engines have now; for a core that lasts."""

    version: str


class AdapterChanged(msgspec.Struct, frozen=True, kw_only=True):
    """The LoRA adapter of this name is replaced: what was sampled with the one before is not gone on with.

    Comes while the core is paused, before any engine has the new one.
    """

    model: str


class Paused(msgspec.Struct, frozen=True, kw_only=True):
    """Send nothing until `Resumed`; what is in flight goes on."""


class Resumed(msgspec.Struct, frozen=True, kw_only=True):
    """Go on sending."""


class Woke(msgspec.Struct, frozen=True, kw_only=True):
    """The time asked for by a `Wake` has come."""


class DrainRequested(msgspec.Struct, frozen=True, kw_only=True):
    """Finish what is in flight, start nothing."""


class AbortRequested(msgspec.Struct, frozen=True, kw_only=True):
    """Drop what is in flight and stop."""


Event = (
    GroupAdded
    | RequestsCancelled
    | HandBackRequested
    | InputClosed
    | Restored
    | ChunkFinished
    | ChunkFailed
    | EngineUp
    | EngineDown
    | EngineReport
    | EngineHeld
    | EngineAdded
    | EngineRemoved
    | VersionSet
    | AdapterChanged
    | Paused
    | Resumed
    | Woke
    | DrainRequested
    | AbortRequested
)


# Commands


class Dispatch(msgspec.Struct, frozen=True, kw_only=True):
    """Send a call: continue `prefix` for at most `max_tokens` tokens, as the request's chunk `n`, counted from 0.

    `model` is a LoRA adapter, empty for the model itself; `salt` belongs behind the cache salt of run and weights.
    `continues` is False when the response ends with this chunk whatever the engine samples.
    """

    call: int
    n: int
    engine: str
    epoch: int
    request: str
    prefix: list[int]
    params: dict[str, Any]
    max_tokens: int
    weight_version: str
    model: str = ""
    salt: str = ""
    continues: bool = True


class Cancel(msgspec.Struct, frozen=True, kw_only=True):
    """Give up a call in flight. Closing its connection makes the engine stop working for it."""

    call: int
    engine: str


class HandBack(msgspec.Struct, frozen=True, kw_only=True):
    """Tell an engine to end these calls at once, and to answer them with what it has sampled."""

    engine: str
    calls: tuple[int, ...]


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """Must be in the journal before any later command is executed: one accepted chunk, or a restart (`chunk` None)."""

    request: str
    chunk: Chunk | None = None
    token_ids: list[int] = []
    logprobs: list[float] = []
    top_logprobs: list[list[TopLogprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    mixed: bool = False


class Emit(msgspec.Struct, frozen=True, kw_only=True):
    """A sample is finished, for better or worse."""

    sample: Sample


class Wake(msgspec.Struct, frozen=True, kw_only=True):
    """Send `Woke` at this time."""

    at: float


class Stop(msgspec.Struct, frozen=True, kw_only=True):
    """Nothing more will happen: "done", "drained", "aborted" or "no_engine"."""

    reason: str


Command = Dispatch | Cancel | HandBack | Record | Emit | Wake | Stop
