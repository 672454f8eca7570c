"""Slow and greedy clients: they are cut off, cost little memory, and nobody else notices."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import httpx
import psutil

from seer_servers.mock import LanguageModel, reference_response
from seer_servers.ports import Ports
from tests.live.engines import mock_engines
from tests.service.server import COMPLETIONS, PROMPT, SPEED

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from tests.live.engines import MockProcess

EACH = 500
CLOSED_S = 45.0  # a few times what the service allows, because 1,500 connections are accepted one by one
MIB = 1 << 20
PATIENCE_S = 20.0  # of the others: seconds, because real engines share the cores while the suite runs
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@asynccontextmanager
async def command(engine: MockProcess, *settings: str) -> AsyncIterator[tuple[httpx.AsyncClient, psutil.Process]]:
    """`seer serve` as users start it, and its process."""
    ports = Ports(1)
    words = [word for setting in settings for word in ("--set", setting)]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "seer_cli.main", "serve", "--server", engine.url, "--port", str(ports[0]), *words,
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert b"ready" in await asyncio.wait_for(process.stdout.readline(), 60)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{ports[0]}", timeout=30) as client:
            yield client, psutil.Process(process.pid)
    finally:
        process.kill()
        await process.wait()


async def answered(client: httpx.AsyncClient, seed: int) -> float:
    """Seconds that a right answer takes."""
    begun = time.monotonic()
    reply = await client.post(
        COMPLETIONS, json={"prompt": PROMPT, "seed": seed, "max_tokens": 20, "return_token_ids": True}
    )
    tokens, _, _ = reference_response(PROMPT, seed, 20, model=LanguageModel(mean_length=60.0))
    assert reply.json()["choices"][0]["token_ids"] == tokens
    return time.monotonic() - begun


async def held(client: httpx.AsyncClient, begin: bytes, drip: bytes) -> float:
    """Seconds for which the service bears a connection that says `begin` and then `drip`, again and again."""
    reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
    begun = time.monotonic()
    writer.write(begin)
    closed = asyncio.create_task(reader.read())
    with contextlib.suppress(ConnectionError):
        while not closed.done():
            await asyncio.wait([closed], timeout=1.0)
            writer.write(drip)
        await closed
    writer.close()
    return time.monotonic() - begun


async def test_slow_clients_are_cut_off_and_others_served() -> None:
    with mock_engines(SPEED) as (engine,):
        async with command(engine) as (client, process):
            before = process.memory_info().rss
            kinds = [(b"", b""), (HEAD, b"X-A: b\r\n"), (HEAD + b"Content-Length: 9999\r\n\r\n{", b" ")]
            slow = [asyncio.create_task(held(client, *kind)) for kind in kinds for _ in range(EACH)]
            latencies = []
            while not all(task.done() for task in slow):
                latencies.append(await answered(client, len(latencies)))
                await asyncio.sleep(0.5)
            assert max(await asyncio.gather(*slow)) < CLOSED_S
            assert len(latencies) >= 3 and max(latencies) < PATIENCE_S
            assert process.num_fds() < EACH
            assert process.memory_info().rss - before < 64 * MIB


async def greedy(client: httpx.AsyncClient, head: bytes, piece: Callable[[bytes], bytes]) -> tuple[int, bytes]:
    """Send a GiB for as long as the service takes it; returns how much it took, in bytes, and the status line."""
    reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
    writer.write(HEAD + head + b"\r\n")
    sent, status = 0, asyncio.create_task(reader.readline())
    with contextlib.suppress(ConnectionError):
        while sent < 1024 * MIB and not status.done():
            writer.write(piece(b" " * MIB))
            await writer.drain()
            await asyncio.sleep(0)  # an answer is seen even if the service takes all as fast as it is sent
            sent += MIB
    line = await asyncio.wait_for(status, CLOSED_S)
    writer.close()
    return sent, line


async def test_a_body_of_a_gib_is_refused_unread() -> None:
    ways: list[tuple[bytes, Callable[[bytes], bytes]]] = [
        (b"Content-Length: %d\r\n" % (1024 * MIB), bytes),
        (b"Transfer-Encoding: chunked\r\n", lambda data: b"%x\r\n%b\r\n" % (len(data), data)),
    ]
    with mock_engines(SPEED) as (engine,):
        async with command(engine, "serve.max_body_mib=8") as (client, process):
            await answered(client, 0)
            before = process.memory_info().rss
            for head, piece in ways:
                sent, status = await greedy(client, head, piece)
                assert status.startswith(b"HTTP/1.1 413")
                assert sent < 64 * MIB, "most of it stays with the client"
                await answered(client, 1)
            assert process.memory_info().rss - before < 32 * MIB


async def test_a_reader_that_never_reads_disturbs_nobody() -> None:
    """Nor is it waited for without end; what it asked for is given up."""
    asked: dict[str, Any] = {"model": "mock", "prompt": PROMPT, "n": 128, "max_tokens": 4000, "ignore_eos": True}
    body = httpx.Request("POST", "http://x", json=asked | {"stream": True, "logprobs": 5, "return_token_ids": True})
    engine_speed = ["--step-ms", "2", "--per-request-ms", "0.01", "--mean-length", "60"]
    with mock_engines(engine_speed) as (engine,):
        async with command(engine, "serve.unread_s=3", "rollout.chunk_size=512") as (client, process):
            before = process.num_fds()
            reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port, limit=1)
            writer.write(HEAD + b"Content-Length: %d\r\n\r\n" % len(body.content) + body.content)
            begun = time.monotonic()
            latencies = []
            while len(latencies) < 5 or await open_requests(client):
                latencies.append(await answered(client, len(latencies)))
                assert time.monotonic() - begun < 120
                await asyncio.sleep(0.5)
            assert max(latencies) < PATIENCE_S
            async with asyncio.timeout(CLOSED_S):
                while process.num_fds() > before + 2:  # engines' connections come and go
                    await asyncio.sleep(0.2)
            writer.close()
            assert reader is not None


async def open_requests(client: httpx.AsyncClient) -> bool:
    page = (await client.get("/metrics")).text
    return "\nseer_requests_open 0\n" not in page
