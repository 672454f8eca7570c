"""The live screen of a rollout: one snapshot as lines that fit a terminal of any size.

Invariant: no line is wider than the screen and there are never more lines than it has rows; what does not fit is left
out, the least interesting first.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.text import Text

from seer_cli.panel import GAP, Column, Panel, aligned, bar, clean, duration, longest, share_out, short, side_by_side

if TYPE_CHECKING:
    from collections.abc import Sequence

    from seer_async.snapshot import DraftView, EngineView, GroupView, PoolView, RequestView, Snapshot

_GIB = 2**30
_WIDE = 120  # columns from which panels and facts stand side by side
_AIRY = 30  # rows from which sections are set apart
_LABEL = 10
_MOST_ID = 30
_POSITIONS = 3  # of a draft whose acceptance is shown
_WARN = "dark_orange3"
_STATE_STYLES = {"up": "green", "closed": _WARN, "down": "bold red"}


class Frame(NamedTuple):
    """One picture. Rates are in tokens a second, None while unknown; `seconds` count from the display's begin."""

    run: str
    phase: str
    seconds: float
    snapshot: Snapshot
    rate: float | None
    rates: dict[str, float | None]  # by engine
    final: bool = False


def eta(snapshot: Snapshot, rate: float | None) -> float | None:
    """Seconds until the run ends by the groups' estimates; None when they say nothing.

    All tokens need their time at the fleet's rate, and the longest request needs its own at its share of that rate.
    """
    if not rate or snapshot.closing:
        return None
    own = max((view.estimate - view.generated for view in snapshot.tail), default=0)
    return max(snapshot.tokens_left, own * max(1, snapshot.running)) / rate


def lay_out(frame: Frame, width: int, height: int) -> list[Text]:
    """The whole screen."""
    air = [Text()] if height >= _AIRY - 1 else []
    lines = [_header(frame, width), *air, _samples(frame.snapshot, width), *_facts(frame, width)]
    sections = _sections(frame, width)
    room = height - len(lines) - len(sections) * (1 + len(air))
    rows = share_out(room, [max(panel.length for panel in section) for section in sections])
    for section, count in zip(sections, rows, strict=True):
        each = (width + GAP) // len(section) - GAP
        if count:
            lines += [*air, *side_by_side([panel.lines(each, count) for panel in section], each)]
    for line in lines:
        line.truncate(width, overflow="ellipsis")
        line.no_wrap = True
    return lines[: max(1, height)]


def _sections(frame: Frame, width: int) -> list[list[Panel[Any]]]:
    """Panels from top to bottom, and side by side."""
    snapshot = frame.snapshot
    if frame.final:
        return [[Panel(_final_columns(snapshot), snapshot.engines, _engine_interest, hidden=_states)]]
    engines = Panel(_engine_columns(frame), snapshot.engines, _engine_interest, hidden=_states, note=_trouble)
    groups = Panel(_group_columns(snapshot.groups), snapshot.groups, _group_interest, ranked=True, hidden=lambda _: "")
    tail = Panel(_tail_columns(snapshot.tail), snapshot.tail, lambda _: 0)
    panels: list[Panel[Any]] = [panel for panel in (groups, tail) if panel.length]
    return [[engines], panels] if panels and width >= _WIDE else [[engines], *([panel] for panel in panels)]


# Above the panels


def _header(frame: Frame, width: int) -> Text:
    closing = frame.snapshot.closing
    phase = "stopping now" if closing == "aborted" and not frame.final else frame.phase
    left = Text.assemble(" ", ("seer", "bold"), "  ", (f"{clean(frame.run)}  " if frame.run else "", "cyan"))
    left.append(clean(phase), f"bold {_WARN}" if closing else "")
    right = Text(f" {duration(frame.seconds)} ", "dim")
    return aligned(left, max(0, width - len(right))) + right


def _samples(snapshot: Snapshot, width: int) -> Text:
    total = max(1, snapshot.total)
    ended = snapshot.done + snapshot.failed
    said = Text.assemble(
        (f"{ended:,}", "bold"),
        (f" of {snapshot.total:,}", "dim"),
        f" {100 * ended // total:>3}%  ",
        _count(snapshot.failed, "failed", "red"),
    )
    picture = bar(max(4, width - _LABEL - said.cell_len - 3), ended / total, snapshot.running / total)
    return Text.assemble((" samples".ljust(_LABEL), "dim"), picture, "  ", said)


def _facts(frame: Frame, width: int) -> list[Text]:
    now = frame.snapshot
    tokens = _fact("tokens", *_tokens(frame))
    requests = _fact(
        "requests", _count(now.running, "running"), _count(now.waiting, "waiting"), _count(now.parked, "parked", _WARN)
    )
    probes = _fact(
        "probes",
        _count(now.probes_running, "running"),
        _count(now.probes_waiting, "waiting"),
        _count(now.probes_done, "done"),
    )
    so_far = _fact(
        "so far",
        _count(now.migrations, "migrated"),
        _count(now.retries, "retried", _WARN),
        _count(now.restarts, "restarted", _WARN),
        _count(now.preemptions, "preempted", _WARN),
    )
    extra = [*([_pool(now.pool)] if now.pool else []), *([_drafts(now.drafts)] if now.drafts else [])]
    if frame.final:
        return [tokens, *([requests] if now.waiting + now.parked else []), so_far, *extra]
    if width < _WIDE:
        return [tokens, requests, probes, so_far, *extra]
    return side_by_side([[tokens, requests, *extra], [so_far, probes]], (width + GAP) // 2 - GAP)


def _pool(pool: PoolView) -> Text:
    used = f"{pool.bytes / _GIB:.1f}/{pool.capacity_bytes / _GIB:.1f}"
    return _fact(
        "KV pool",
        Text.assemble((used, "bold"), (" GiB", "dim")),
        _count(pool.loaded, "tokens loaded"),
        _count(pool.failures, "failed", _WARN),
        _count(pool.refused, "refused", _WARN),
    )


def _drafts(drafts: DraftView) -> Text:
    """What a step brings, the drafter's time in it, what is accepted at the first positions, and how much is off."""
    step = Text.assemble((f"{drafts.per_step:.2f}", "bold"), (" tokens a step", "dim"))
    if not drafts.steps:  # not our drafter, which counts more
        share = f"{drafts.accepted / max(1, drafts.drafted):.0%}"
        return _fact("drafts", step, Text.assemble((share, "bold"), (" accepted", "dim")))
    step = Text.assemble(
        (f"{drafts.per_step:.2f}", "bold"),
        (" tokens, ", "dim"),
        (f"{1e3 * drafts.drafter_s / drafts.steps:.2f}", "bold"),
        (" ms a step", "dim"),
    )
    shares = " ".join(f"{share:.0%}" for share in drafts.shares[:_POSITIONS])
    off = f"{drafts.steps_off / drafts.steps:.0%}"
    return _fact(
        "drafts",
        step,
        Text.assemble((shares or "none", "bold"), (" accepted", "dim")),
        Text.assemble((off, "bold" if drafts.steps_off else "dim"), (f" off ({short(drafts.switch_offs)}x)", "dim")),
    )


def _tokens(frame: Frame) -> list[Text]:
    snapshot, rate = frame.snapshot, frame.rate
    said = [_count(snapshot.tokens, "done")]
    if frame.final:
        return said
    mark = "~" if all(group.known for group in snapshot.groups) else "<"  # unknown groups count at their limit
    said += [_count(snapshot.tokens_left, "left"), Text.assemble((_rate(rate), "bold"), (" tokens/s", "dim"))]
    if seconds := eta(snapshot, rate):
        said.append(Text.assemble(("ETA ", "dim"), (mark + duration(seconds), "bold")))
    return said


def _fact(label: str, *said: Text) -> Text:
    return Text.assemble((f" {label}".ljust(_LABEL), "dim"), Text("  ").join(said))


def _count(count: int, what: str, warn: str = "") -> Text:
    return Text.assemble((short(count), f"bold {warn}" if count else "dim"), (f" {what}", "dim"))


def _rate(rate: float | None) -> str:
    return "-" if rate is None else short(rate)


# Engines


def _engine_columns(frame: Frame) -> list[Column[EngineView]]:
    name, state, epoch, preempted, weights = _identity(frame.snapshot.engines)
    return [
        name,
        state,
        epoch,
        Column("in flight", _in_flight, 9, right=True),
        Column("KV used, held", _kv, 15, 44, rank=1),
        Column("tok/s", lambda view, _: Text(_rate(frame.rates[view.name])), 6, right=True, rank=2),
        Column("queued", lambda view, _: _alarming(view.queued), 6, right=True, rank=5),
        preempted,
        weights,
    ]


def _final_columns(snapshot: Snapshot) -> list[Column[EngineView]]:
    """What each engine has done; what it was doing last says little."""
    name, state, epoch, preempted, weights = _identity(snapshot.engines)
    total = max(1, sum(view.generated for view in snapshot.engines))
    return [
        name,
        state,
        epoch,
        Column("tokens", lambda view, _: Text(short(view.generated)), 7, right=True),
        Column("share", lambda view, width: bar(width, view.generated / total), 8, 32, rank=1),
        preempted,
        weights,
    ]


def _identity(views: Sequence[EngineView]) -> tuple[Column[EngineView], ...]:
    names = longest((view.name for view in views), 16)
    versions = longest((view.weight_version for view in views), 24)
    return (
        Column("engine", lambda view, _: Text(clean(view.name), "bold"), max(6, names)),
        Column("state", lambda view, _: Text(view.state, _STATE_STYLES[view.state]), 6),
        Column("epoch", lambda view, _: Text(str(view.epoch)), 5, right=True),
        Column("preempt", lambda view, _: _alarming(view.preemptions), 7, right=True, rank=3),
        Column("weights", lambda view, _: Text(clean(view.weight_version), "cyan"), 7, versions, rank=4),
    )


def _in_flight(view: EngineView, _: int) -> Text:
    return Text.assemble(str(view.in_flight), (f"/{view.slots}", "dim"))


def _kv(view: EngineView, width: int) -> Text:
    picture = bar(width - 10, view.kv_used, max(0.0, view.kv_reserved - view.kv_used))
    return picture.append(f" {view.kv_used:4.0%}").append(f" {view.kv_reserved:4.0%}", "dim")


def _alarming(count: int) -> Text:
    return Text(short(count), f"bold {_WARN}" if count else "dim")


def _engine_interest(view: EngineView) -> tuple[bool, bool, int]:
    """Those in trouble, then those that keep us waiting, then those that had to preempt."""
    return view.state == "up", not view.queued, -view.preemptions


def _states(views: Sequence[EngineView]) -> str:
    return ": " + ", ".join(f"{count} {state}" for state, count in Counter(view.state for view in views).items())


def _trouble(view: EngineView) -> tuple[int, Text] | None:
    if view.state == "down":
        return 1, Text(clean(view.last_error or "does not answer yet"), "red")
    return (2, Text(clean(view.last_error or "busy"), _WARN)) if view.state == "closed" else None


# Groups and the tail


def _group_columns(views: Sequence[GroupView]) -> list[Column[GroupView]]:
    ids = longest((view.id for view in views), _MOST_ID)
    return [
        Column("groups to go", lambda view, _: Text(clean(view.id)), 12, ids),
        Column("done, running", _group_bar, 8, 32),
        Column("", lambda view, _: Text(f"{view.done}/{view.total}"), 5, right=True),
        Column("running", lambda view, _: Text(str(view.running)), 7, right=True, rank=2),
        Column("longest", lambda view, _: Text(short(view.longest)), 7, right=True, rank=1),
        Column("estimate", lambda view, _: _estimate(view), 8, right=True),
    ]


def _group_interest(view: GroupView) -> tuple[bool, int]:
    """What runs before what waits; then the most tokens to go."""
    return not view.running, -view.estimate * (view.total - view.done)


def _group_bar(view: GroupView, width: int) -> Text:
    return bar(width, view.done / view.total, view.running / view.total)


def _estimate(view: GroupView) -> Text:
    return Text(f"~{short(view.estimate)}") if view.known else Text(f"<{short(view.estimate)}", "dim")


def _tail_columns(views: Sequence[RequestView]) -> list[Column[RequestView]]:
    ids = longest((view.id for view in views), _MOST_ID)
    engines = longest((view.engine or "-" for view in views), 16)
    return [
        Column("longest to go", lambda view, _: Text(clean(view.id)), 13, ids),
        Column("tokens", lambda view, width: bar(width, view.generated / max(1, view.estimate)), 8, 32),
        Column("", _progress, 13, right=True),
        Column("state", _request_state, 7, rank=2),
        Column("engine", lambda view, _: Text(clean(view.engine or "-")), max(6, engines), rank=1),
    ]


def _progress(view: RequestView, _: int) -> Text:
    return Text.assemble(short(view.generated), (f"/{short(view.estimate)}", "dim"))


def _request_state(view: RequestView, _: int) -> Text:
    return Text(view.state, "green" if view.state == "running" else "dim")
