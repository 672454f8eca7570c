"""The Python client against mock engines, through a wire that is cut again and again."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import runpy
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web

from seer_async.client import AsyncClient, AsyncRollout, Client, RolloutError
from seer_async.clientcalls import Lines
from seer_async.errors import SeerError
from seer_servers.ports import Ports
from tests.service.serving import FAST, SLOW, mock_engines, prompts, served

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from tests.live.engines import MockProcess

EXAMPLE = Path(__file__).parents[2] / "examples" / "rejection_sampling.py"


@pytest.fixture(scope="module")
def engines() -> Iterator[list[MockProcess]]:
    with mock_engines(FAST, SLOW) as engines:
        yield engines


class Cutter:
    """A TCP relay that cuts every connection after some bytes, as `cuts` says."""

    def __init__(self, url: str, cuts: random.Random) -> None:
        self.count = 0
        self._port = int(url.rpartition(":")[2])
        self._cuts = cuts

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self._relay, "127.0.0.1", 0)
        try:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            server.close()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._port)
        forth = asyncio.create_task(_pump(reader, far_writer, 1 << 40))
        await _pump(far_reader, writer, self._cuts.randrange(200, 20_000))
        self.count += 1
        forth.cancel()
        for each in (writer, far_writer):
            each.transport.abort()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, most: int) -> None:
    with contextlib.suppress(ConnectionError):
        while most > 0 and (data := await reader.read(min(1024, most))):
            writer.write(data)
            await writer.drain()
            most -= len(data)


async def test_a_wire_that_is_cut(engines: list[MockProcess], tmp_path: Path) -> None:
    async with served(engines, tmp_path) as app:
        cutter = Cutter(app.url, random.Random(4))
        async with cutter.running() as url, AsyncClient(url) as client:
            rollout = await client.rollout(prompts(12), n=4, max_tokens=100, seed=3)
            found = [sample async for sample in rollout]
            assert sorted(sample.id for sample in found) == sorted(f"p{g}/{i}" for g in range(12) for i in range(4))
            groups = [group async for group in rollout.groups()]
            assert len(groups) == 12
            assert all([sample.index for sample in group] == [0, 1, 2, 3] for group in groups)
            assert [sample async for sample in rollout.samples(after=40)] == found[40:]
            assert len(await client.rollouts()) == 1  # however often the request was cut
        assert cutter.count > 10
        print(f"{cutter.count} connections")


async def test_cancelled_from_the_side(engines: list[MockProcess], tmp_path: Path) -> None:
    async with served(engines, tmp_path) as app, AsyncClient(app.url) as client:
        rollout = await client.rollout(["one", [5, 6, 7], {"messages": [{"role": "user", "content": "two"}]}], n=8)
        found: list[Any] = []
        with pytest.raises(RolloutError, match="cancelled"):
            await _cancelling(rollout, found)
        status = await rollout.status()
        assert (status.status, status.spooled) == ("cancelled", len(found))
        with pytest.raises(RolloutError):
            [sample async for sample in client.attach(rollout.id)]
        assert [worker.name for worker in await client.workers()] == ["engine-0", "engine-1"]
        assert (await client.status()).rollouts[0].id == rollout.id


async def _cancelling(rollout: AsyncRollout, found: list[Any]) -> None:
    async for sample in rollout:
        found.append(sample)
        await rollout.cancel()


async def test_what_the_server_refuses(engines: list[MockProcess], tmp_path: Path) -> None:
    async with served(engines, tmp_path) as app, AsyncClient(app.url) as client:
        with pytest.raises(SeerError, match="top_p must be"):
            await client.rollout(["x"], top_p=3)
        with pytest.raises(SeerError, match="no rollout"):
            await client.attach("nobody").status()
        with pytest.raises(SeerError, match="no rollout"):
            [sample async for sample in client.attach("nobody")]
    async with AsyncClient(app.url, patience_s=1) as client:
        with pytest.raises(SeerError, match="no progress in 1 s"):
            await client.rollouts()


async def test_a_busy_server_is_asked_again(engines: list[MockProcess], tmp_path: Path) -> None:
    async with served(engines, tmp_path, jobs={"max_open": 1}) as app, AsyncClient(app.url) as client:
        first = await client.rollout(prompts(2), n=2)
        second = asyncio.create_task(client.rollout(prompts(2), n=2))
        assert len([sample async for sample in first]) == 4
        assert len([sample async for sample in await second]) == 4


async def test_the_server_comes_back_without_the_rollout(engines: list[MockProcess], tmp_path: Path) -> None:
    """What it had of it is read to the end, then the reader is told."""
    ports = Ports(1)
    async with served(engines, tmp_path, port=ports[0]) as app, AsyncClient(app.url) as client:
        rollout = await client.rollout(prompts(4), n=8, max_tokens=1500, ignore_eos=True)
        quick = await client.rollout(prompts(2), n=2, max_tokens=4)
        assert len([sample async for sample in quick]) == 4
    async with AsyncClient(app.url) as client:
        reading = asyncio.create_task(_all(client, rollout.id))
        again = asyncio.create_task(_all(client, quick.id))
        await asyncio.sleep(0.5)
        async with served(engines, tmp_path, port=ports[0]):
            with pytest.raises(RolloutError, match="lost"):
                await reading
            assert len(await again) == 4


async def _all(client: AsyncClient, rollout: str) -> list[Any]:
    return [sample async for sample in client.attach(rollout)]


def test_without_asyncio(engines: list[MockProcess], tmp_path: Path) -> None:
    with _background(engines, tmp_path) as url, Client(url) as client:
        rollout = client.rollout(prompts(6), n=3, max_tokens=60)
        assert len({sample.id for sample in rollout}) == 18
        assert [len(group) for group in rollout.groups(after=2)] == [3] * 4
        assert rollout.status().done == 18
        assert rollout.cancel().status == "done"
        assert len(client.workers()) == 2
        assert [each.id for each in client.rollouts()] == [rollout.id]
        with pytest.raises(SeerError, match="no prompts"):
            client.rollout([])


@contextlib.contextmanager
def _background(engines: list[MockProcess], folder: Path) -> Iterator[str]:
    ready, url, loop = threading.Event(), "", asyncio.new_event_loop()
    end = asyncio.Event()

    async def serve() -> None:
        nonlocal url
        async with served(engines, folder) as app:
            url = app.url
            ready.set()
            await end.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    try:
        assert ready.wait(30)
        yield url
    finally:
        loop.call_soon_threadsafe(end.set)
        thread.join(30)
        loop.close()


def test_the_example(engines: list[MockProcess], tmp_path: Path) -> None:
    """A mock knows no sums: every round is sampled whole, and nothing is kept."""
    with _background(engines, tmp_path / "spool") as url:
        options = ["--url", url, "--out", str(tmp_path / "out.jsonl"), "--questions", "4", "--rounds", "2", "-n", "8"]
        command = [sys.executable, str(EXAMPLE), *options]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"round (\d): 32 of 32 responses", done.stdout) == ["0", "1"]
    assert (tmp_path / "out.jsonl").read_text() == ""


def test_the_example_keeps_what_is_right() -> None:
    example = runpy.run_path(str(EXAMPLE))
    texts = ["none", " 7", " 8.", " 8", "9"]
    samples = [
        SimpleNamespace(group=group, text=text, error="", extra={"answer": 8}) for text in texts for group in ("a", "b")
    ]
    cancelled: list[bool] = []

    class Fake(list[SimpleNamespace]):
        def cancel(self) -> None:
            cancelled.append(True)

    kept = list(example["accepted"](Fake(samples), 2))
    assert [(sample.group, sample.text) for sample in kept] == [("a", " 8."), ("b", " 8.")]
    assert cancelled == [True]


def test_lines() -> None:
    """Cut anywhere, with what only looks like the end of a line."""
    data = '{"a":"\u2028\x85\r"}\n\n\n[1]\n'.encode()
    for size in range(1, len(data)):
        lines = Lines()
        parts = [data[start : start + size] for start in range(0, len(data), size)]
        assert [line for part in parts for line in lines.feed(part)] == [data[: data.index(b"\n")], b"[1]"]


async def test_the_key_is_sent(tmp_path: Path) -> None:
    seen = []

    async def answer(request: web.Request) -> web.Response:
        seen.append(request.headers["Authorization"])
        return web.json_response({"rollouts": []})

    app = web.Application()
    app.router.add_get("/v1/rollouts", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    async with AsyncClient(f"http://127.0.0.1:{runner.addresses[0][1]}/", api_key="sesame") as client:
        assert await client.rollouts() == []
    await runner.cleanup()
    assert seen == ["Bearer sesame"]
