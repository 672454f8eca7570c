"""What a running rollout looks like at one moment: for the live screen, metrics.jsonl and anyone who asks.

A snapshot is a copy; reading it never touches the core's state. Taking one is O(requests), so take a few a second.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from seer_async.request import TERMINAL, State

if TYPE_CHECKING:
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
    engines: list[EngineView]
    groups: list[GroupView]
    tail: list[RequestView]


def take_snapshot(core: Core, now: float) -> Snapshot:
    """Look at the core at `now`, seconds on the run's clock."""
    requests = core.buffer.requests.values()
    unfinished = [r for r in requests if r.state not in TERMINAL]
    left = {r.id: max(1, core.context.estimate(r.group) - r.generated) for r in unfinished}
    probes = [r for r in requests if r.index < core.config.scheduler.probes]
    engines = [_engine(instance, now) for instance in core.instances.values()]
    counts = core.buffer.counts
    return Snapshot(
        now=now,
        done=counts[State.DONE],
        failed=counts[State.FAILED],
        total=len(requests),
        running=counts[State.RUNNING],
        waiting=counts[State.WAITING],
        parked=counts[State.PARKED],
        tokens=sum(r.generated for r in requests),
        tokens_left=sum(left.values()),
        probes_waiting=sum(r.state in {State.WAITING, State.PARKED} for r in probes),
        probes_running=sum(r.state is State.RUNNING for r in probes),
        probes_done=sum(r.state in TERMINAL for r in probes),
        migrations=core.migrations,
        retries=core.retries,
        restarts=core.restarts,
        preemptions=sum(view.preemptions for view in engines),
        closing=core.closing,
        engines=engines,
        groups=[_group(core, g) for g in core.buffer.groups.values() if any(r.id in left for r in g.requests)],
        tail=[_request(core, r) for r in sorted(unfinished, key=lambda r: -left[r.id])[:_SHOWN_TAIL]],
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
        preemptions=stats.preemptions if stats else 0,
        generated=instance.generated,
        weight_version=instance.version,
        last_error=instance.last_error,
    )


def _group(core: Core, group: Group) -> GroupView:
    return GroupView(
        id=group.id,
        done=sum(r.state in TERMINAL for r in group.requests),
        total=len(group.requests),
        running=sum(r.state is State.RUNNING for r in group.requests),
        longest=max(r.generated for r in group.requests),
        estimate=core.context.estimate(group),
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
