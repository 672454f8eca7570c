"""Mock engines as processes of their own, to be killed for real."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import socket
import sys
import time
from typing import TYPE_CHECKING

import httpx

from seer_cli.main import app
from seer_servers.ports import Ports

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.process import BaseProcess


_SERVER = multiprocessing.get_context("forkserver")
# A process a test costs milliseconds, where an interpreter costs seconds; commands are modules that are loaded late.
_SERVER.set_forkserver_preload(["seer_cli.main", "seer_cli.mock"])
_START_S = 60.0


class MockProcess:
    """One mock engine on a port that stays the same over its lives."""

    def __init__(self, port: int, *options: str) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.options = options
        self._port = port
        self._process: BaseProcess | None = None

    def launch(self) -> None:
        command = ["mock-engine", "--port", str(self._port), *self.options]
        self._process = _SERVER.Process(target=_run, args=(command,), daemon=True)
        self._process.start()

    def wait_ready(self) -> None:
        deadline = time.monotonic() + _START_S
        while not self._listens():
            assert self._process and self._process.is_alive(), f"the mock engine ended: {self.options}"
            assert time.monotonic() < deadline, "the mock engine does not start"
            time.sleep(0.01)

    def _listens(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._port), timeout=1):
            return True
        return False

    async def start(self) -> None:
        self.launch()
        await asyncio.to_thread(self.wait_ready)

    def kill(self) -> None:
        if self._process:
            self._process.kill()
            self._process.join()


def _run(command: list[str]) -> None:
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115 - for as long as the process lives
    app(command)


@contextlib.contextmanager
def mock_engines(*options: list[str]) -> Iterator[list[MockProcess]]:
    """One engine for each list of command-line options."""
    ports = Ports(len(options))
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
    async with httpx.AsyncClient(timeout=60) as client:
        page = (await client.get(f"{engine.url}/metrics")).text
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
    lines = [line for line in page.splitlines() if line.startswith(names)]
    return int(sum(float(line.rsplit(" ", 1)[1]) for line in lines))
