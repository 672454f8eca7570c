"""Running a mock engine as a process of its own."""

from __future__ import annotations

import asyncio
import gc
import signal
from typing import TYPE_CHECKING

from seer_servers.filelimit import raise_file_limit

if TYPE_CHECKING:
    from seer_servers.mock.server import MockServer


async def serve(server: MockServer, host: str, port: int) -> None:
    """Serve until SIGINT or SIGTERM."""
    raise_file_limit()
    _calm_collector()
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    runner, url = await server.start(host, port)
    print(f"mock engine ready at {url}", flush=True)  # noqa: T201 - the line that starters wait for
    await stop.wait()
    await runner.cleanup()


def _calm_collector() -> None:
    """With thousands of calls in flight, the default thresholds spend a sixth of the CPU looking for cycles."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)
