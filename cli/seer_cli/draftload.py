"""What the draft server and its clients cost: processes that behave like engines, at a given rate of tokens.

Each client process steps like an engine: it adds a few tokens to each of its requests and looks for what others have
added. A token is the time of its step in microseconds, so whoever fetches it knows how long it has been on its way.
CPU time is of the steady state, without the start; the engines' own part is told apart from what their thread does.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np

from seer_async.errors import FleetError
from seer_servers.drafting.client import DraftClient
from seer_servers.drafting.link import ask_stats
from seer_servers.drafting.service import DraftService

if TYPE_CHECKING:
    from multiprocessing.queues import Queue
    from multiprocessing.synchronize import Barrier
    from pathlib import Path

    from numpy.typing import NDArray

    from seer_servers.drafting.wire import Stats

STEP_S = 0.02  # of the engines that the clients stand for
WARM_S = 2.0
DRAIN_S = 1.0
START_TIMEOUT_S = 60.0
_MASK = (1 << 31) - 1


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """Groups of requests that each grow by `rate` tokens a second, spread over client processes, for `seconds`."""

    groups: int
    requests: int  # in each group
    rate: float
    clients: int
    seconds: float


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured. CPU is in shares of one core, delays from `update` in one process to `fetched` in another."""

    load: Load
    tokens_per_s: float  # that the server took in
    delivered: float  # of the tokens that a client should get from others, the share that it got
    server_cpu: float
    client_cpu: float  # of one client: its thread and ZMQ's, without its engine's calls
    update_us: float  # of one call, the mean
    delay_p50_ms: float
    delay_p99_ms: float
    messages_per_s: float  # of all clients; as many replies
    bytes_out_per_s: float
    bytes_in_per_s: float
    largest_bytes: int
    dropped: int


class _Part(NamedTuple):
    """One client's share of the figures."""

    seconds: float
    cpu_s: float
    updates: int
    update_s: float
    fetched: int
    delays_us: NDArray[np.int64]
    stats: dict[str, int | float]


async def measure_server(load: Load, folder: Path) -> Figures:
    """Run a server and its clients for `load.seconds` and a little more; the server's log goes to `folder`.

    Raises:
        FleetError: The server or a client does not start.
    """
    service = DraftService(folder)
    await service.start()
    try:
        return await asyncio.to_thread(_measure, load, service.address)
    finally:
        await service.stop()


def _measure(load: Load, address: str) -> Figures:
    spawn = multiprocessing.get_context("spawn")
    line, parts = spawn.Barrier(load.clients + 1), spawn.Queue()
    clients = [
        spawn.Process(target=_client, args=(load, index, address, line, parts), daemon=True)
        for index in range(load.clients)
    ]
    for client in clients:
        client.start()
    try:
        line.wait(START_TIMEOUT_S)
        time.sleep(WARM_S)
        before = _stats(address)
        time.sleep(load.seconds)
        after = _stats(address)
        return _figures(load, before, after, [parts.get(timeout=START_TIMEOUT_S) for _ in clients])
    finally:
        for client in clients:
            client.join(START_TIMEOUT_S)


def _stats(address: str) -> Stats:
    stats = ask_stats(address)
    if stats is None:
        raise FleetError("the draft server does not answer: look at its log")
    return stats


def _figures(load: Load, before: Stats, after: Stats, parts: list[_Part]) -> Figures:
    server_s = after.uptime_s - before.uptime_s
    delays = np.concatenate([part.delays_us for part in parts]) / 1000
    expected = sum(part.updates for part in parts) * (load.clients - 1)
    return Figures(
        load=load,
        tokens_per_s=(after.tokens - before.tokens) / server_s,
        delivered=sum(part.fetched for part in parts) / expected / _per_step(load) if expected else 1.0,
        server_cpu=(after.cpu_s - before.cpu_s) / server_s,
        client_cpu=sum(part.cpu_s / part.seconds for part in parts) / len(parts),
        update_us=sum(part.update_s for part in parts) / sum(part.updates for part in parts) * 1e6,
        delay_p50_ms=float(np.percentile(delays, 50)) if len(delays) else 0.0,
        delay_p99_ms=float(np.percentile(delays, 99)) if len(delays) else 0.0,
        messages_per_s=_rate(parts, "sync_messages"),
        bytes_out_per_s=_rate(parts, "sync_bytes_out"),
        bytes_in_per_s=_rate(parts, "sync_bytes_in"),
        largest_bytes=int(max(part.stats[f"sync_largest_{way}"] for part in parts for way in ("in", "out"))),
        dropped=int(sum(part.stats["sync_dropped"] for part in parts)),
    )


def _rate(parts: list[_Part], what: str) -> float:
    return sum(part.stats[what] / part.seconds for part in parts)


def _per_step(load: Load) -> int:
    return max(1, round(load.rate * STEP_S))


def _client(load: Load, index: int, address: str, line: Barrier, parts: Queue[_Part]) -> None:
    parts.put(_Engine(load, index, address).run(line))


class _Engine:
    """Stands for an engine: every `load.clients`th request of each group runs here."""

    def __init__(self, load: Load, index: int, address: str) -> None:
        self._client = DraftClient(address, name=f"load-{index}")
        self._own = [
            (f"group-{group}", f"request-{number}")
            for group in range(load.groups)
            for number in range(index, load.requests, load.clients)
        ]
        self._load = load
        self._updates = 0
        self._update_ns = 0
        self._delays: list[NDArray[np.int64]] = []

    def run(self, line: Barrier) -> _Part:
        for group in range(self._load.groups):
            self._client.register_group(f"group-{group}", 60.0)
        self._client.fetched()
        line.wait(START_TIMEOUT_S)
        step_s = _per_step(self._load) / self._load.rate
        warm = int(WARM_S / step_s)
        last = warm + int(self._load.seconds / step_s)
        begun, cpu, stats = time.monotonic(), 0.0, self._client.stats()
        started = begun
        for step in range(last):
            if step == warm:
                started, cpu, stats = time.monotonic(), _others_cpu(), self._client.stats()
            time.sleep(max(0.0, begun + step * step_s - time.monotonic()))
            self._step(step * _per_step(self._load))
        seconds, cpu = time.monotonic() - started, _others_cpu() - cpu
        grown = {name: value - stats[name] for name, value in self._client.stats().items()}
        grown |= {name: value for name, value in self._client.stats().items() if "largest" in name}
        self._drain()
        self._client.close()
        delays = np.concatenate([*self._delays, np.empty(0, np.int64)])
        return _Part(seconds, cpu, self._updates, self._update_ns / 1e9, len(delays), delays, grown)

    def _step(self, position: int) -> None:
        tokens = [time.monotonic_ns() // 1000 & _MASK] * _per_step(self._load)
        update = self._client.update
        started = time.perf_counter_ns()
        for group, request in self._own:
            update(group, request, position, tokens)
        self._update_ns += time.perf_counter_ns() - started
        self._updates += len(self._own)
        self._look()

    def _look(self) -> None:
        now = time.monotonic_ns() // 1000
        for increment in self._client.fetched():
            self._delays.append((now - increment.tokens.astype(np.int64)) & _MASK)

    def _drain(self) -> None:
        for _ in range(int(DRAIN_S / STEP_S)):
            time.sleep(STEP_S)
            self._look()


def _others_cpu() -> float:
    """CPU seconds of this process's other threads: the client's, and ZMQ's behind it."""
    return time.process_time() - time.thread_time()
