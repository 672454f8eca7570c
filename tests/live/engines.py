"""Mock engines as processes of their own, to be killed for real."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from typing import TYPE_CHECKING

import httpx
from seer_servers.fleet import free_ports

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class MockProcess:
    """One mock engine on a port that stays the same over its lives."""

    def __init__(self, port: int, *options: str) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._command = [sys.executable, "-m", "seer_cli.main", "mock-engine", "--port", str(port), *options]
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(*self._command, stdout=asyncio.subprocess.PIPE)
        assert self._process.stdout
        line = await asyncio.wait_for(self._process.stdout.readline(), 60)
        assert b"ready" in line, line

    async def kill(self) -> None:
        if self._process and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()


@contextlib.asynccontextmanager
async def mock_engines(*options: list[str]) -> AsyncIterator[list[MockProcess]]:
    """One engine for each list of command-line options."""
    ports = free_ports(len(options))
    engines = [MockProcess(port, *given) for port, given in zip(ports, options, strict=True)]
    try:
        await asyncio.gather(*(engine.start() for engine in engines))
        yield engines
    finally:
        await asyncio.gather(*(engine.kill() for engine in engines))


async def running(engine: MockProcess) -> int:
    """Requests that the engine works on now."""
    async with httpx.AsyncClient(timeout=10) as client:
        page = (await client.get(f"{engine.url}/metrics")).text
    lines = [line for line in page.splitlines() if line.startswith(("vllm:num_requests_running", "vllm:num_requests_waiting"))]
    return int(sum(float(line.rsplit(" ", 1)[1]) for line in lines))
