"""What a running rollout looks like at one moment: for the live screen, metrics.jsonl and anyone who asks.

A snapshot is a copy; reading it never touches the core's state. Taking one is O(requests), so take a few a second.
"""

from __future__ import annotations

import heapq
from itertools import zip_longest
from operator import itemgetter
from typing import TYPE_CHECKING

import msgspec

from seer_async.request import TERMINAL, State
from seer_async.types import DraftStats

if TYPE_CHECKING:
    from collections.abc import Iterable

    from seer_async.core import Core
    from seer_async.instance import Instance
    from seer_async.request import Group, Request

_SHOWN_TAIL = 8


class EngineView(msgspec.Struct, frozen=True, kw_only=True):
    """One engine. `kv_used` is what it reports, `kv_reserved` what we hold of its KV; both in [0, 1]."""

    name: str
    state: str  # "up", "closed" (failing or busy, no calls for a while) or "down"
    epoch: int
    in_flight: int
    slots: int
    kv_used: float
    kv_reserved: float
    queued: int  # requests waiting inside the engine
    preemptions: int
    generated: int  # tokens accepted from it
    weight_version: str
    last_error: str | None
    drafts: DraftStats | None = None


class PoolView(msgspec.Struct, frozen=True, kw_only=True):
    """The KV pools together. Sizes in bytes; blocks since the engines started; `loaded` are this run's tokens."""

    bytes: int
    capacity_bytes: int
    blocks: int
    loaded: int
    failures: int  # blocks that were found but had to be computed again
    refused: int  # blocks that were not saved
    evictions: int


class DraftView(DraftStats, frozen=True, kw_only=True):
    """Drafting on all engines together, since they started."""

    @property
    def length(self) -> float:
        """Mean acceptance length of a draft: tokens that its step brought, the bonus token included."""
        return 1 + self.accepted / self.verified if self.verified else 1.0

    @property
    def per_step(self) -> float:
        """Tokens that a step brought a request, with a draft or without: one, and those accepted."""
        return self.generated / max(1, self.generated - self.accepted) if self.generated else 1.0

    @property
    def shares(self) -> list[float]:
        """Share of the drafted tokens at each position that were accepted; empty where nobody counts positions."""
        return [a / d if d else 0.0 for d, a in zip(self.drafted_at, self.accepted_at, strict=False)]


class GroupView(msgspec.Struct, frozen=True, kw_only=True):
    """One unfinished group. Lengths in tokens; `known` says whether the estimate rests on a finished response."""

    id: str
    done: int
    total: int
    running: int
    longest: int
    estimate: int
    known: bool


class RequestView(msgspec.Struct, frozen=True, kw_only=True):
    """One unfinished request."""

    id: str
    state: str
    engine: str | None
    generated: int
    estimate: int


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The run at one moment. `tail` are the unfinished requests with the most estimated tokens left, longest first."""

    now: float
    done: int
    failed: int
    total: int
    running: int
    waiting: int
    parked: int
    tokens: int
    tokens_left: int  # by the groups' estimates
    probes_waiting: int
    probes_running: int
    probes_done: int
    migrations: int
    retries: int
    restarts: int
    preemptions: int
    closing: str | None
    pool: PoolView | None = None
    drafts: DraftView | None = None
    engines: list[EngineView]
    groups: list[GroupView]
    tail: list[RequestView]


def take_snapshot(core: Core, now: float) -> Snapshot:
    """Look at the core at `now`, seconds on the run's clock."""
    groups: list[GroupView] = []
    unfinished: list[tuple[int, Request]] = []  # tokens left by estimate
    for group in core.buffer.groups.values():
        estimate = core.context.estimate(group)
        open_ = [r for r in group.requests if r.state not in TERMINAL]
        if open_:
            groups.append(_group(core, group, estimate, len(open_)))
            unfinished.extend((max(1, estimate - r.generated), r) for r in open_)
    probes = [r for g in core.buffer.groups.values() for r in g.requests[: core.config.scheduler.probes]]
    engines = [_engine(instance, now) for instance in core.instances.values()]
    counts = core.buffer.counts
    return Snapshot(
        now=now,
        done=counts[State.DONE],
        failed=counts[State.FAILED],
        total=core.buffer.total,
        running=counts[State.RUNNING],
        waiting=counts[State.WAITING],
        parked=counts[State.PARKED],
        tokens=core.responses.tokens,
        tokens_left=sum(left for left, _ in unfinished),
        probes_waiting=sum(r.state in {State.WAITING, State.PARKED} for r in probes),
        probes_running=sum(r.state is State.RUNNING for r in probes),
        probes_done=sum(r.state in TERMINAL for r in probes),
        migrations=core.responses.migrations,
        retries=core.retries,
        restarts=core.responses.restarts,
        preemptions=sum(view.preemptions for view in engines),
        closing=core.closing,
        pool=_pool(core),
        drafts=_drafts(core),
        engines=engines,
        groups=groups,
        tail=[_request(core, r) for _, r in heapq.nlargest(_SHOWN_TAIL, unfinished, key=itemgetter(0))],
    )


def _engine(instance: Instance, now: float) -> EngineView:
    stats = instance.stats
    state = "down" if not instance.up else "up" if instance.usable(now) else "closed"
    return EngineView(
        name=instance.name,
        state=state,
        epoch=instance.epoch,
        in_flight=len(instance.in_flight),
        slots=instance.slots,
        kv_used=stats.kv_used if stats else 0.0,
        kv_reserved=min(1.0, instance.reserved / max(1, instance.capacity)),
        queued=stats.waiting if stats else 0,
        preemptions=instance.preempted,
        generated=instance.generated,
        weight_version=instance.version,
        last_error=instance.last_error,
        drafts=stats.drafts if stats else None,
    )


def _pool(core: Core) -> PoolView | None:
    """Engines that share a pool say the same of its size, and each something of its own about its use."""
    said = [(i.info.kv_pool, i.stats.pool) for i in core.instances.values() if i.info and i.stats and i.stats.pool]
    if not said:
        return None
    pools = dict(said).values()
    return PoolView(
        bytes=sum(pool.bytes for pool in pools),
        capacity_bytes=sum(pool.capacity_bytes for pool in pools),
        blocks=sum(pool.blocks for pool in pools),
        loaded=core.responses.pooled,
        failures=sum(pool.failures for _, pool in said),
        refused=sum(pool.refused for _, pool in said),
        evictions=sum(pool.evictions for pool in pools),
    )


def _drafts(core: Core) -> DraftView | None:
    found = [i.stats.drafts for i in core.instances.values() if i.stats and i.stats.drafts]
    if not found:
        return None
    return DraftView(
        verified=sum(drafts.verified for drafts in found),
        drafted=sum(drafts.drafted for drafts in found),
        accepted=sum(drafts.accepted for drafts in found),
        generated=sum(drafts.generated for drafts in found),
        steps=sum(drafts.steps for drafts in found),
        steps_off=sum(drafts.steps_off for drafts in found),
        switch_offs=sum(drafts.switch_offs for drafts in found),
        drafter_s=sum(drafts.drafter_s for drafts in found),
        drafted_at=_added(drafts.drafted_at for drafts in found),
        accepted_at=_added(drafts.accepted_at for drafts in found),
    )


def _added(counts: Iterable[list[int]]) -> list[int]:
    return [sum(column) for column in zip_longest(*counts, fillvalue=0)]


def _group(core: Core, group: Group, estimate: int, unfinished: int) -> GroupView:
    return GroupView(
        id=group.id,
        done=len(group.requests) - unfinished,
        total=len(group.requests),
        running=sum(r.state is State.RUNNING for r in group.requests),
        longest=max(r.generated for r in group.requests),
        estimate=estimate,
        known=core.context.known(group),
    )


def _request(core: Core, request: Request) -> RequestView:
    call = core.calls.get(request.call) if request.call is not None else None
    return RequestView(
        id=request.id,
        state=str(request.state),
        engine=call.instance.name if call else request.last_engine,
        generated=request.generated,
        estimate=core.context.estimate(request.group),
    )
