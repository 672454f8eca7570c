"""A fleet that outlives the command that started it: a process of its own that runs a `LocalFleet` until told to end.

Invariants: the supervisor holds its folder's lock, which it got from whoever started it, from its first moment to its
last; it tells its starter what happens until the fleet is up or has failed, and its log all along; it ends only when
its engines have, unless it is killed, and then they end by themselves (process.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from typing import TYPE_CHECKING

import msgspec

from seer_async.errors import SeerError
from seer_servers.fleet import EngineSpec, LocalFleet
from seer_servers.fleetfile import Engine, FleetFile, FleetFolder
from seer_servers.kvpool.launch import make_pool

if TYPE_CHECKING:
    from collections.abc import Callable

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """The fleet that is wanted."""

    name: str
    spec: EngineSpec
    engines: int
    kv_pool: str
    kv_pool_gib: float
    kv_pool_disk_gib: float = 0.0


class Report(msgspec.Struct, frozen=True):
    """A line from the supervisor to its starter; `kind` is "said", "up" or "failed"."""

    kind: str
    text: str


async def supervise(
    folder: FleetFolder, order: Order, *, say: Callable[[str], None], ready: Callable[[], None]
) -> None:
    """Run the fleet until SIGTERM or SIGINT, for the holder of the folder's lock; call `ready` when all engines are up.

    Raises:
        FleetError: An engine or the pool does not start; nothing is left running.
    """
    started = time.time()

    def told(text: str) -> None:
        with contextlib.suppress(OSError):  # a full disk is no reason to leave engines alone
            folder.write(_described(order, fleet, started))
        say(text)

    pool = make_pool(
        order.kv_pool,
        folder.path,
        capacity_gib=order.kv_pool_gib,
        disk_gib=order.kv_pool_disk_gib,
        spec=order.spec,
    )
    fleet = LocalFleet(order.spec, order.engines, folder.path, pool=pool, say=told)
    _end_on_signals()
    try:
        folder.write(_described(order, fleet, started))
        with contextlib.suppress(asyncio.CancelledError):
            async with fleet:
                ready()
                await asyncio.Event().wait()
    finally:
        folder.clear()


def _end_on_signals() -> None:
    """Cancel the task that calls, at the first signal; further ones must not disturb the end."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None

    def end() -> None:
        for each in _SIGNALS:
            loop.add_signal_handler(each, lambda: None)
        task.cancel()

    for each in _SIGNALS:
        loop.add_signal_handler(each, end)


def _described(order: Order, fleet: LocalFleet, started: float) -> FleetFile:
    return FleetFile(
        engines=[
            Engine(url=each.url, name=each.name, state=each.state, epoch=each.epoch, pid=each.pid)
            for each in fleet.engines
        ],
        name=order.name,
        host=socket.gethostname(),
        pid=os.getpid(),
        started=started,
        model=order.spec.model,
        kv_pool=order.kv_pool,
    )


class _Reporter:
    """The supervisor's voice: its log on standard error, and its starter's pipe until the fleet is up or has failed."""

    def __init__(self) -> None:
        self._heard = True

    def say(self, text: str) -> None:
        self._tell(Report("said", text))

    def ready(self) -> None:
        self._tell(Report("up", "all engines are up"))
        self._heard = False
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # closes the pipe

    def failed(self, error: SeerError) -> None:
        self._tell(Report("failed", str(error)))

    def _tell(self, report: Report) -> None:
        with contextlib.suppress(OSError):  # a full disk
            sys.stderr.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {report.text}\n")
            sys.stderr.flush()
        if self._heard:
            with contextlib.suppress(BrokenPipeError):  # the starter is gone; the fleet may stay
                os.write(sys.stdout.fileno(), msgspec.json.encode(report) + b"\n")


def main() -> int:
    """Run the fleet that standard input orders, holding the lock whose descriptor is the argument."""
    os.set_inheritable(int(sys.argv[1]), False)  # noqa: FBT003 - the standard library's signature
    order = msgspec.json.decode(sys.stdin.buffer.read(), type=Order)
    reporter = _Reporter()
    try:
        asyncio.run(supervise(FleetFolder(order.name), order, say=reporter.say, ready=reporter.ready))
    except SeerError as error:
        reporter.failed(error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
