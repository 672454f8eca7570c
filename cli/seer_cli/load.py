"""What the orchestrator itself costs: a rollout with thousands of chunks in flight over mock engine processes.

The figures are of the real shell, client, journal and sink; only the engines are mock. `in_flight` chunks of 64 tokens
are kept in flight and `pending` requests wait, so every reply is followed by a decision among them.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seer_async.config import resolve
from seer_async.events import ChunkFinished
from seer_async.fleet import open_fleet
from seer_async.rollout import Rollout
from seer_async.runfolder import RunFolder
from seer_async.types import Prompt
from seer_cli.process import calm_gc
from seer_servers.ports import Ports

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from seer_async.core import Core
    from seer_async.events import Command, Event
    from seer_async.snapshot import Snapshot

_CHUNK = 64
_GROUP = 8
_PROMPT_TOKENS = 64
_LAG_PERIOD_S = 0.01
_CHUNKS_PER_S = 400  # about what two cores carry with the mock engines on them too; sets how slow those are


async def measure_core(*, in_flight: int, pending: int, engines: int, seconds: float) -> dict[str, Any]:
    """Figures by name; see the module docstring."""
    chunk_s = in_flight / _CHUNKS_PER_S
    async with mock_engine_processes(engines, in_flight, step_ms=chunk_s / _CHUNK * 1000) as urls:
        return await _measure(urls, in_flight, pending, seconds)


async def _measure(urls: list[str], in_flight: int, pending: int, seconds: float) -> dict[str, Any]:
    config = resolve(
        {
            "rollout": {"n": _GROUP, "chunk_size": _CHUNK},
            "sampling": {"max_tokens": 64 * _CHUNK, "ignore_eos": True, "seed": 1},
            "engine": {"max_in_flight": -(-in_flight // len(urls))},
            "fleet": {"servers": urls},
            "output": {"trace": False},
        }
    )
    with tempfile.TemporaryDirectory() as scratch:
        async with open_fleet(config, urls) as fleet:
            await fleet.attach()
            folder = RunFolder.create(
                Path(scratch) / "run", config, _prompts(in_flight + pending), dataset="", command=[]
            )
            rollout = Rollout(folder, fleet, None)
            calm_gc()
            meter = _Meter(rollout.core)
            asyncio.get_running_loop().call_later(seconds + meter.warm_up_s, rollout.abort)
            async with meter:
                result = await rollout.run()
            folder.close()
            return meter.figures(result.snapshot)


def _prompts(requests: int) -> list[Prompt]:
    rng = random.Random(0)  # noqa: S311 - a workload, not a secret
    groups = -(-requests // _GROUP)
    return [
        Prompt(id=f"g{g}", token_ids=[rng.randrange(3, 1000) for _ in range(_PROMPT_TOKENS)]) for g in range(groups)
    ]


class _Meter:
    """Counts what the orchestrator does between the end of its warm-up and the end of the run."""

    warm_up_s = 5.0  # sending the first chunks is a burst that no steady state has

    def __init__(self, core: Core) -> None:
        self._core = core
        self._handle = core.handle_all
        self._decisions: list[float] = []
        self._lags: list[float] = []
        self._in_flight: list[int] = []
        self._pending: list[int] = []
        self._cpu = 0.0
        self._wall = 0.0
        self._chunks = 0
        core.handle_all = self._timed  # type: ignore[method-assign]  # measuring from outside keeps the core free of clocks

    def _timed(self, events: Iterable[Event], now: float) -> list[Command]:
        taken = list(events)
        start = time.thread_time()
        commands = self._handle(taken, now)
        if taken and isinstance(taken[0], ChunkFinished):
            self._decisions.append(time.thread_time() - start)
        return commands

    async def __aenter__(self) -> None:
        self._task = asyncio.create_task(self._watch())

    async def __aexit__(self, *_: object) -> None:
        self._cpu = _cpu_s() - self._cpu
        self._wall = time.perf_counter() - self._wall
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _watch(self) -> None:
        await asyncio.sleep(self.warm_up_s)
        self._cpu, self._wall = _cpu_s(), time.perf_counter()
        self._decisions.clear()
        while True:
            due = time.perf_counter() + _LAG_PERIOD_S
            await asyncio.sleep(_LAG_PERIOD_S)
            self._lags.append(max(0.0, time.perf_counter() - due))
            self._in_flight.append(len(self._core.calls))
            self._pending.append(self._core.buffer.open - len(self._core.calls))

    def figures(self, snapshot: Snapshot) -> dict[str, Any]:
        """The figures, in words a reader needs no table for."""
        chunks = len(self._decisions)
        return {
            "chunks accepted": chunks,
            "chunks per second": round(chunks / self._wall, 1),
            "chunks in flight, median": _at(self._in_flight, 0.5),
            "requests pending, median": _at(self._pending, 0.5),
            "errors": snapshot.failed + snapshot.retries,
            "CPU per chunk, ms": round(1000 * self._cpu / max(1, chunks), 3),
            "event-loop lag p50, ms": round(1000 * _at(self._lags, 0.5), 2),
            "event-loop lag p99, ms": round(1000 * _at(self._lags, 0.99), 2),
            "event-loop lag max, ms": round(1000 * _at(self._lags, 1.0), 2),
            "reply to decision p50, CPU us": round(1e6 * _at(self._decisions, 0.5), 1),
            "reply to decision p99, CPU us": round(1e6 * _at(self._decisions, 0.99), 1),
        }


def _at(values: list[Any], share: float) -> Any:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


@contextlib.asynccontextmanager
async def mock_engine_processes(count: int, in_flight: int, *, step_ms: float) -> AsyncIterator[list[str]]:
    """Mock engine processes with room for `in_flight` chunks together."""
    seqs = -(-in_flight // count)
    options = ["--max-num-seqs", str(seqs), "--num-blocks", str(seqs * 300), "--step-ms", f"{step_ms:.3f}"]
    options += ["--per-request-ms", "0", "--max-model-len", "16384"]
    processes: list[asyncio.subprocess.Process] = []
    urls: list[str] = []
    ports = Ports(count)
    try:
        for port in ports:
            command = [sys.executable, "-m", "seer_cli.main", "mock-engine", "--port", str(port), *options]
            processes.append(await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE))
            urls.append(f"http://127.0.0.1:{port}")
        for process in processes:
            assert process.stdout is not None
            await asyncio.wait_for(process.stdout.readline(), 30)  # "mock engine ready"
        yield urls
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
