"""trace.json: the format's rules, slots, arrows, what a crash leaves, and what a resumed run adds."""

from __future__ import annotations

import errno
import itertools
import json
import os
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import pytest

from seer_async.events import Dispatch
from seer_async.trace import TraceWriter
from tests.fake_run import START, FakeRun

if TYPE_CHECKING:
    from pathlib import Path

Event = dict[str, Any]
NEEDED = {
    "X": {"name", "ts", "dur", "pid", "tid", "args"},
    "i": {"name", "ts", "pid", "tid", "s"},
    "C": {"name", "ts", "pid", "args"},
    "s": {"name", "cat", "id", "ts", "pid", "tid"},
    "f": {"name", "cat", "id", "ts", "pid", "tid", "bp"},
    "M": {"name", "pid", "args"},
}
METADATA = {"process_name", "thread_name", "process_labels", "process_sort_index"}


def dispatch(call: int, engine: str, request: str = "g/0", generated: int = 0) -> Dispatch:
    return Dispatch(
        call=call, n=generated // 64, engine=engine, epoch=1, request=request, prefix=[7] * (40 + generated),
        params={"extra_args": {"seer_prompt_len": 40}}, max_tokens=64, weight_version="step-1",
    )  # fmt: skip


def ok(trace: TraceWriter, call: int, now: float) -> None:
    trace.finished(call, now, tokens=64, outcome="ok", finish_reason="length")


def read(path: Path) -> list[Event]:
    events = json.loads(path.read_text())
    assert isinstance(events, list)
    return events


def of(events: list[Event], phase: str) -> list[Event]:
    return [event for event in events if event["ph"] == phase]


def slot(event: Event) -> int:
    return int(event["tid"] - event["pid"])


def check(events: list[Event]) -> None:
    """The rules of the Trace Event Format that viewers rely on, and our own about slots and arrows."""
    for event in events:
        assert event.keys() >= NEEDED[event["ph"]], event
        keys = list(event)
        assert "ts" not in event or keys.index("ts") < keys.index("name"), "see TraceWriter._write"
        assert all(
            isinstance(event[key], int) and event[key] >= 0 for key in ("ts", "dur", "pid", "tid") if key in event
        )
        if event["ph"] == "C":
            assert all(isinstance(value, int | float) for value in event["args"].values())
        if event["ph"] == "M":
            assert event["name"] in METADATA
    named = {event["pid"] for event in of(events, "M") if event["name"] == "process_name"}
    assert {event["pid"] for event in events} <= named
    assert not named & {event["tid"] for event in of(events, "X")}, "a slot is no process's main thread"
    threads = {(event["pid"], event["tid"]) for event in of(events, "M") if event["name"] == "thread_name"}
    assert {(event["pid"], event["tid"]) for event in of(events, "X")} <= threads
    _check_slots(events)
    _check_arrows(events)


def _check_slots(events: list[Event]) -> None:
    slots = defaultdict(list)
    for event in of(events, "X"):
        slots[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    for spans in slots.values():
        spans.sort()
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


def _check_arrows(events: list[Event]) -> None:
    starts = {event["id"]: event for event in of(events, "s")}
    ends = {event["id"]: event for event in of(events, "f")}
    assert starts.keys() == ends.keys()
    assert len(starts) == len(of(events, "s")) == len(of(events, "f")), "an id was used twice"
    at = {(x["pid"], x["tid"], x["ts"]): x for x in of(events, "X")}
    for arrow, start in starts.items():
        end = ends[arrow]
        target = at[end["pid"], end["tid"], end["ts"]]  # an arrow ends exactly where a call starts
        assert start["ts"] <= end["ts"]
        assert start["pid"] != end["pid"]
        assert any(
            x["ts"] <= start["ts"] < max(x["ts"] + 1, x["ts"] + x["dur"]) and x["name"] == target["name"]
            for x in of(events, "X")
            if (x["pid"], x["tid"]) == (start["pid"], start["tid"])
        ), "an arrow starts inside an earlier call of the same request"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "trace.json"


@pytest.fixture
def trace(path: Path) -> TraceWriter:
    return TraceWriter(path)


def test_whole_run_keeps_to_the_format(path: Path, trace: TraceWriter) -> None:
    run = FakeRun(engines=4, groups=12, failing=20, tracer=trace)
    for snapshot in run.snapshots(1.0):
        trace.counter(snapshot)
    trace.close()
    events = read(path)
    check(events)
    good = [x for x in of(events, "X") if x["args"]["outcome"] == "ok"]
    assert sum(x["args"]["tokens"] for x in good) == run.core.responses.tokens
    assert len({x["name"] for x in good}) == 12 * 8
    assert len(of(events, "s")) >= run.core.responses.migrations > 0
    assert {"server", "cancelled", "up", "down"} <= {i["name"] for i in of(events, "i")}
    assert max(slot(x) for x in good) <= 16, "no more threads than slots"
    for name in {x["name"] for x in good}:  # chunks of a response are counted from 0, in the order of their prefixes
        chunks = sorted((x["args"]["prefix"], x["args"]["chunk"]) for x in good if x["name"] == name)
        assert [number for _, number in chunks] == list(range(len(chunks)))


def test_same_run_gives_the_same_trace(tmp_path: Path) -> None:
    for name in ("a", "b"):
        trace = TraceWriter(tmp_path / name)
        for snapshot in FakeRun(engines=3, groups=5, tracer=trace).snapshots(1.0):
            trace.counter(snapshot)
        trace.close()
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_lowest_free_slot_is_used(path: Path, trace: TraceWriter) -> None:
    for call in (1, 2, 3):
        trace.dispatched(dispatch(call, "a", f"g/{call}"), START)
    ok(trace, 2, START + 1)
    ok(trace, 1, START + 1)
    trace.dispatched(dispatch(4, "a", "g/4"), START + 1)
    trace.dispatched(dispatch(5, "a", "g/5"), START + 1)
    for call in (3, 4, 5):
        ok(trace, call, START + 2)
    trace.close()
    events = read(path)
    check(events)
    assert {x["name"]: slot(x) for x in of(events, "X")} == {"g/1": 1, "g/2": 2, "g/3": 3, "g/4": 1, "g/5": 2}


def test_a_move_between_engines_is_an_arrow(path: Path, trace: TraceWriter) -> None:
    trace.dispatched(dispatch(1, "a"), START)
    ok(trace, 1, START + 1)
    trace.dispatched(dispatch(2, "b", generated=64), START + 3)
    ok(trace, 2, START + 4)
    trace.dispatched(dispatch(3, "b", generated=128), START + 4)  # stays: no arrow
    ok(trace, 3, START + 5)
    trace.close()
    events = read(path)
    check(events)
    (start,), (end,) = of(events, "s"), of(events, "f")
    assert (start["ts"], end["ts"]) == (999_999, 3_000_000)
    names = {m["pid"]: m["args"]["name"] for m in of(events, "M") if m["name"] == "process_name"}
    assert (names[start["pid"]], names[end["pid"]]) == ("a", "b")


def test_chunk_args_and_failures(path: Path, trace: TraceWriter) -> None:
    trace.dispatched(dispatch(1, "a"), START)
    trace.finished(1, START + 0.5, tokens=0, outcome="timeout", finish_reason=None)
    trace.dispatched(dispatch(2, "a"), START + 1)
    ok(trace, 2, START + 2)
    trace.dispatched(dispatch(3, "a", generated=64), START + 2)
    trace.cancelled(3, START + 3)
    trace.close()
    events = read(path)
    check(events)
    failed, good, cancelled = of(events, "X")
    assert (failed["args"]["outcome"], cancelled["args"]["outcome"]) == ("timeout", "cancelled")
    assert good["args"] == {
        "request": "g/0", "chunk": 0, "prefix": 40, "max_tokens": 64, "weight_version": "step-1", "epoch": 1,
        "tokens": 64, "outcome": "ok", "finish_reason": "length",
    }  # fmt: skip
    assert (cancelled["args"]["chunk"], cancelled["args"]["prefix"]) == (1, 104)
    assert [i["name"] for i in of(events, "i")] == ["timeout", "cancelled"]


@pytest.mark.parametrize("request_id", ['a"]\n,{"ph":"s"', "\x1b]0;x\x07\u202e", '",{"ph":"M","name":"process_name"'])
def test_ids_from_the_user_cannot_break_the_file(path: Path, trace: TraceWriter, request_id: str) -> None:
    trace.dispatched(dispatch(1, "a", request_id), START)
    ok(trace, 1, START + 1)
    trace.close()
    TraceWriter(path).close()
    events = read(path)
    check(events)
    assert of(events, "X")[0]["name"] == request_id


def test_crash_leaves_whole_lines_and_a_resumed_run_goes_on(path: Path, trace: TraceWriter) -> None:
    run = FakeRun(engines=2, groups=3, tracer=trace)
    for _, snapshot in zip(range(40), run.snapshots(1.0), strict=False):
        trace.counter(snapshot)
    left = path.read_bytes()  # what is there when the process is killed
    crashed = json.loads(left + b"]")
    check(crashed)
    path.write_bytes(left[:-7])  # the power went, too
    again = TraceWriter(path)
    again.dispatched(dispatch(1, "engine-1"), START + 100)
    again.dispatched(dispatch(2, "engine-9", "g/1", generated=64), START + 101)
    ok(again, 1, START + 102)
    again.dispatched(dispatch(3, "engine-9", generated=64), START + 102)
    ok(again, 2, START + 103)
    ok(again, 3, START + 103)
    again.close()
    events = read(path)
    check(events)
    assert events[: len(crashed) - 1] == crashed[:-1], "only the torn event is gone"
    names = {m["args"]["name"]: m["pid"] for m in of(events, "M") if m["name"] == "process_name"}
    assert len(set(names.values())) == len(names) == 4  # seer, engine-0, engine-1, engine-9
    new = of(events, "X")[-3:]
    assert [x["ts"] for x in new] == [100_000_000, 101_000_000, 102_000_000], "on the first run's axis"
    assert [x["args"]["chunk"] for x in new] == [0, 1, 1]
    assert [i["ts"] for i in of(events, "i") if i["name"] == "resumed"] == [100_000_000]


def test_a_closed_trace_can_be_continued_too(path: Path, trace: TraceWriter) -> None:
    trace.dispatched(dispatch(1, "a"), START)
    ok(trace, 1, START + 1)
    trace.close()
    before = read(path)
    TraceWriter(path).close()
    assert read(path) == before, "a resumed run without events changes nothing"
    again = TraceWriter(path)
    again.dispatched(dispatch(1, "b"), START + 5)
    ok(again, 1, START + 6)
    again.close()
    events = read(path)
    check(events)
    assert events[: len(before)] == before


@pytest.mark.parametrize("left", [b"", b"[", b'[\n{"ph":"M","na', b"\0" * 5000, b"[]\n", b'[\n{"ph":"M"\0\n'])
def test_a_trace_that_never_began_begins_now(path: Path, left: bytes) -> None:
    path.write_bytes(left)
    trace = TraceWriter(path)
    trace.dispatched(dispatch(1, "a"), START)
    ok(trace, 1, START + 1)
    trace.close()
    events = read(path)
    check(events)
    assert of(events, "X")[0]["ts"] == 0


def test_a_run_without_events_is_valid_json(path: Path, trace: TraceWriter) -> None:
    trace.engine("a")
    trace.close()
    assert read(path) == []


def test_engines_are_listed_in_the_order_named(path: Path, trace: TraceWriter) -> None:
    first, second = trace.engine("engine-0"), trace.engine("engine-1")
    trace.dispatched(dispatch(1, "engine-1"), START)
    trace.dispatched(dispatch(2, "engine-0"), START)
    trace.cancelled(1, START)
    trace.cancelled(2, START)
    trace.close()
    events = read(path)
    check(events)
    order = {m["pid"]: m["args"]["sort_index"] for m in of(events, "M") if m["name"] == "process_sort_index"}
    assert order[first] < order[second]


def test_a_full_disk_reaches_the_caller_and_keeps_the_file_whole(
    path: Path, trace: TraceWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = FakeRun(engines=2, groups=3, tracer=trace)
    snapshots = run.snapshots(1.0)
    trace.counter(next(snapshots))
    write = os.write

    def torn(handle: int, data: bytes) -> int:
        if len(data) > 10:
            return write(handle, data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(os, "write", torn)
        snapshot = next(snapshots)
        with pytest.raises(OSError, match="No space"):
            trace.counter(snapshot)
    check(json.loads(path.read_bytes() + b"]"))
    trace.counter(next(snapshots))  # there is room again: nothing is missing, and nothing is there twice
    trace.close()
    check(read(path))


def test_a_path_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        TraceWriter(tmp_path / "gone" / "trace.json")


def test_a_chunk_costs_little(trace: TraceWriter) -> None:
    """The bound is 20 us; the test allows for a busy machine."""
    calls = [dispatch(call, f"engine-{call % 8}", f"g/{call % 512}", call // 512 * 64) for call in range(20_000)]
    best = float("inf")
    for round_ in range(3):
        start = time.process_time()
        for call in calls:
            trace.dispatched(call, START + round_ + call.call * 1e-5)
            ok(trace, call.call, START + round_ + call.call * 1e-5 + 1e-6)
        best = min(best, (time.process_time() - start) / len(calls))
    print(f"{best * 1e6:.1f} us a chunk")
    assert best < 60e-6
