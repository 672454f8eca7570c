"""A Chrome trace of a run, written while it goes; open trace.json in ui.perfetto.dev or chrome://tracing.

Each engine is a process with one thread a slot; each call is a complete event in the lowest slot that was free. An
arrow leads from a request's previous call to its next one where that ran on another engine. Failures, cancellations and
engines that come and go are instants; KV, calls in flight and tokens a second are counters.

The format is the JSON array of the Trace Event Format, one event a line. Times are whole microseconds since the first
event of the run; when that was is in the first line, so that a resumed run goes on along the same axis.

Invariants: calls in one slot never overlap; both ends of an arrow are written together; the file grows by whole lines,
so after a crash it lacks its "]" and at most what came since the last `counter`.
"""

from __future__ import annotations

import heapq
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from seer_async.appendfile import AppendFile

if TYPE_CHECKING:
    from pathlib import Path

    from seer_async.events import Dispatch
    from seer_async.snapshot import EngineView, Snapshot

_RUN_PID = 1  # the run's own process; 0 means the idle task to some viewers
_PIDS_APART = 100_000  # a slot's thread id is its engine's process id plus its number, so that no two are the same
_MOST_BUFFERED = 1 << 12  # events


class _Past(msgspec.Struct):
    """What an earlier part of the run has written: `origin` in Unix seconds, None before the first event."""

    origin: float | None = None
    pids: dict[str, int] = {}
    arrows: int = 0


class _Call(NamedTuple):
    """A call in flight."""

    engine: _Engine
    slot: int
    start: int
    request: str
    args: dict[str, Any]


class _Last(NamedTuple):
    """Where a request's latest call ran, and the instant just before it ended."""

    pid: int
    tid: int
    at: int


class _Engine:
    """One engine's process: its slots, and what the previous snapshot said of it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.view: EngineView | None = None
        self.slots = 0
        self._free: list[int] = []

    def take(self) -> int:
        """The lowest free slot, counted from 1."""
        if self._free:
            return heapq.heappop(self._free)
        self.slots += 1
        return self.slots

    def give_back(self, slot: int) -> None:
        """Free a slot."""
        heapq.heappush(self._free, slot)


class TraceWriter:
    """Writes the trace at `path`, or goes on with the one that is there. `now` is always in Unix seconds.

    Lines are buffered until `counter`. `finished` and `cancelled` never touch the disk; every other method, and the
    constructor, raise OSError when the disk refuses.
    """

    def __init__(self, path: Path) -> None:
        past = _settle(path)
        self._resumed = past.origin is not None
        self._origin = past.origin or 0.0
        self._begun = False
        self._arrows = past.arrows
        self._pids = past.pids
        self._engines: dict[str, _Engine] = {}
        self._calls: dict[int, _Call] = {}
        self._last: dict[str, _Last] = {}
        self._seen_at = 0.0
        self._lines: list[bytes] = []
        self._encode = msgspec.json.Encoder().encode
        self._file = AppendFile(path)

    def engine(self, name: str) -> int:
        """The process id of an engine; engines are listed in the order in which they are first named."""
        return self._engine(name).pid

    def dispatched(self, dispatch: Dispatch, now: float) -> None:
        """A call left."""
        engine = self._engine(dispatch.engine)
        known = engine.slots
        slot = engine.take()
        if slot > known:
            self._name("thread_name", engine.pid, f"slot {slot:04}", tid=engine.pid + slot)
        args = {
            "request": dispatch.request,
            "chunk": dispatch.n,
            "prefix": len(dispatch.prefix),
            "max_tokens": dispatch.max_tokens,
            "weight_version": dispatch.weight_version,
            "epoch": dispatch.epoch,
        }
        self._calls[dispatch.call] = _Call(engine, slot, self._us(now), dispatch.request, args)
        if len(self._lines) >= _MOST_BUFFERED:
            self._flush()

    def finished(self, call: int, now: float, *, tokens: int, outcome: str, finish_reason: str | None) -> None:
        """A call was answered (outcome "ok"), or failed."""
        self._end(call, now, {"tokens": tokens, "outcome": outcome, "finish_reason": finish_reason})

    def cancelled(self, call: int, now: float) -> None:
        """A call was given up."""
        self._end(call, now, {"tokens": 0, "outcome": "cancelled", "finish_reason": None})

    def counter(self, snapshot: Snapshot) -> None:
        """The fleet at one moment; writes out what has gathered."""
        now, ts = snapshot.now, self._us(snapshot.now)
        speed = 0.0
        for view in snapshot.engines:
            engine = self._engine(view.name)
            self._note_change(engine, view, ts)
            before = engine.view.generated if engine.view else view.generated
            rate = (view.generated - before) / max(1e-6, now - self._seen_at)
            self._count(engine.pid, ts, "KV", {"used": view.kv_used, "reserved": view.kv_reserved})
            self._count(engine.pid, ts, "calls", {"in flight": view.in_flight})
            self._count(engine.pid, ts, "speed", {"tokens/s": rate})
            engine.view = view
            speed += rate
        self._count(_RUN_PID, ts, "speed", {"tokens/s": speed})
        self._seen_at = now
        self._flush()

    def close(self) -> None:
        """Write what has gathered and end the array. Calls still in flight are left out."""
        whole = self._begun or self._resumed
        try:
            if whole:
                self._flush()
            self._file.append(b"]\n" if whole else b"[]\n")
        finally:
            self._file.close()

    # Calls

    def _end(self, number: int, now: float, result: dict[str, Any]) -> None:
        engine, slot, start, request, args = self._calls.pop(number)
        engine.give_back(slot)
        end = max(start, self._us(now))
        pid, tid = engine.pid, engine.pid + slot
        whole = {"ph": "X", "ts": start, "dur": end - start, "pid": pid, "tid": tid, "name": request}
        self._write(whole | {"args": args | result})
        self._arrow(self._last.get(request), pid, tid, start)
        if result["outcome"] != "ok":
            self._instant(result["outcome"], end, pid, tid, scope="t", args={"request": request})
        self._last[request] = _Last(pid, tid, max(start, end - 1))

    def _arrow(self, last: _Last | None, pid: int, tid: int, start: int) -> None:
        """Viewers tie an arrow's ends to the events around them, so the first lies just inside the earlier call."""
        if last is None or last.pid == pid:
            return
        self._arrows += 1
        arrow = {"id": self._arrows, "name": "moved", "cat": "moved"}
        self._write({"ph": "s", "ts": last.at, "pid": last.pid, "tid": last.tid, **arrow})
        self._write({"ph": "f", "ts": start, "pid": pid, "tid": tid, "bp": "e", **arrow})

    # Engines

    def _engine(self, name: str) -> _Engine:
        engine = self._engines.get(name)
        if engine is None:
            pid = self._pids.setdefault(name, _PIDS_APART * (1 + len(self._pids)))
            engine = self._engines[name] = _Engine(pid)
            self._name("process_name", pid, name, tid=pid)
            self._write({"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": pid}})
        return engine

    def _note_change(self, engine: _Engine, view: EngineView, ts: int) -> None:
        before = engine.view
        if before is None or (before.state, before.epoch) != (view.state, view.epoch):
            why = {"epoch": view.epoch, "error": view.last_error}
            self._instant(view.state, ts, engine.pid, engine.pid, scope="p", args=why)

    def _count(self, pid: int, ts: int, name: str, values: dict[str, float]) -> None:
        self._write({"ph": "C", "ts": ts, "pid": pid, "tid": pid, "name": name, "args": values})

    # Lines

    def _us(self, now: float) -> int:
        if not self._begun:
            self._begun = True
            self._begin(now)
        return round((now - self._origin) * 1e6)

    def _begin(self, now: float) -> None:
        if self._resumed:
            self._instant("resumed", self._us(now), _RUN_PID, _RUN_PID, scope="g", args={})
        else:
            self._origin = now
            self._lines.insert(0, self._head(now))

    def _head(self, now: float) -> bytes:
        started = time.strftime("started %Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
        first = {"ph": "M", "name": "process_labels", "pid": _RUN_PID, "args": {"labels": started, "unix_time": now}}
        second = {"ph": "M", "name": "process_name", "pid": _RUN_PID, "args": {"name": "seer"}}
        return b"[\n" + self._encode(first) + b"\n," + self._encode(second) + b"\n"

    def _name(self, kind: str, pid: int, name: str, *, tid: int) -> None:
        self._write({"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}})

    def _instant(self, name: str, ts: int, pid: int, tid: int, *, scope: str, args: dict[str, Any]) -> None:
        self._write({"ph": "i", "ts": ts, "pid": pid, "tid": tid, "s": scope, "name": name, "args": args})

    def _write(self, event: dict[str, Any]) -> None:
        """Buffer one event. `ts` comes before `name`: Perfetto looks for it from the left and gives up at an escape."""
        self._lines.append(b"," + self._encode(event) + b"\n")

    def _flush(self) -> None:
        if self._lines:
            self._file.append(b"".join(self._lines))
            self._lines.clear()


class _Named(msgspec.Struct):
    """As much of a metadata event as a resumed run needs."""

    pid: int
    args: dict[str, Any]


def _settle(path: Path) -> _Past:
    """Cut a trace after its last whole event, and say what is in it."""
    past = _Past()
    if not path.exists():
        return past
    with path.open("r+b") as file:
        kept = 0
        for line in file:
            if line == b"]\n" or not line.endswith(b"\n"):
                break
            try:
                _learn(past, line)
            except (msgspec.DecodeError, UnicodeDecodeError):
                break
            kept += len(line)
        file.truncate(kept if past.origin is not None else 0)
    return past


def _learn(past: _Past, line: bytes) -> None:
    if line.startswith(b',{"ph":"s"'):
        past.arrows += 1
    elif line.startswith(b',{"ph":"M","name":"process_name"'):
        named = msgspec.json.decode(line[1:], type=_Named)
        if named.pid != _RUN_PID:
            past.pids[named.args["name"]] = named.pid
    elif line.startswith(b'{"ph":"M"'):
        past.origin = msgspec.json.decode(line, type=_Named).args.get("unix_time")
