"""Snapshots to look at: made-up ones, hostile ones, and those of a `FakeRun` at given moments."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from seer_async.snapshot import EngineView, GroupView, RequestView, Snapshot

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.fake_run import FakeRun

HOSTILE = (
    "\x1b[31m\x07[bold]\u202egnp.exe\u2066\u200b"
    + "e\u0301\u0302\u0303" * 9
    + "{:04} \x9b2J\r\n\u4f60\u597d"
    + "x" * 90
)

ENGINE = EngineView(
    name="engine-0", state="up", epoch=1, in_flight=3, slots=16, kv_used=0.25, kv_reserved=0.5, queued=0, preemptions=0,
    generated=100, weight_version="step-7", last_error=None,
)  # fmt: skip
GROUP = GroupView(id="g0", done=2, total=8, running=3, longest=500, estimate=700, known=True)
REQUEST = RequestView(id="g0/3", state="running", engine="engine-0", generated=100, estimate=700)
SNAPSHOT = Snapshot(
    now=0.0, done=10, failed=1, total=64, running=20, waiting=30, parked=3, tokens=1000, tokens_left=5000,
    probes_waiting=1, probes_running=2, probes_done=5, migrations=11, retries=12, restarts=13, preemptions=14,
    closing=None, engines=[ENGINE], groups=[GROUP], tail=[REQUEST],
)  # fmt: skip


def engine(name: str, state: str = "up", **more: Any) -> EngineView:
    return replace(ENGINE, name=name, state=state, **more)


def group(id_: str, **more: Any) -> GroupView:
    return replace(GROUP, id=id_, **more)


def snapshot(**more: Any) -> Snapshot:
    return replace(SNAPSHOT, **more)


def moments(run: FakeRun, *seconds: float) -> Iterator[Snapshot]:
    wanted = set(seconds)
    for at, seen in zip(itertools.count(1), run.snapshots(1.0), strict=False):
        if at in wanted:
            yield seen
        if at >= max(wanted):
            return
