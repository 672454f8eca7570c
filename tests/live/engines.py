"""Mock engines as processes of their own, to be killed for real."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from typing import TYPE_CHECKING

import httpx

from seer_servers.fleet import free_ports

if TYPE_CHECKING:
    from collections.abc import Iterator


class MockProcess:
    """One mock engine on a port that stays the same over its lives."""

    def __init__(self, port: int, *options: str) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._command = [sys.executable, "-m", "seer_cli.main", "mock-engine", "--port", str(port), *options]
        self._process: subprocess.Popen[bytes] | None = None

    def launch(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE)

    def wait_ready(self) -> None:
        assert self._process and self._process.stdout
        line = self._process.stdout.readline()
        assert b"ready" in line, line

    async def start(self) -> None:
        self.launch()
        await asyncio.to_thread(self.wait_ready)

    def kill(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()
            assert self._process.stdout
            self._process.stdout.close()


@contextlib.contextmanager
def mock_engines(*options: list[str]) -> Iterator[list[MockProcess]]:
    """One engine for each list of command-line options."""
    ports = free_ports(len(options))
    engines = [MockProcess(port, *given) for port, given in zip(ports, options, strict=True)]
    try:
        for engine in engines:
            engine.launch()
        for engine in engines:
            engine.wait_ready()
        yield engines
    finally:
        for engine in engines:
            engine.kill()


async def running(engine: MockProcess) -> int:
    """Requests that the engine works on now."""
    async with httpx.AsyncClient(timeout=10) as client:
        page = (await client.get(f"{engine.url}/metrics")).text
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
    lines = [line for line in page.splitlines() if line.startswith(names)]
    return int(sum(float(line.rsplit(" ", 1)[1]) for line in lines))
