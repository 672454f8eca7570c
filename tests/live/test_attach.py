"""Attaching engines: what they say of themselves decides whether they can sample together."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from aiohttp import web
from typer.testing import CliRunner

from seer_async.errors import FleetError, UsageError
from seer_async.types import Prompt
from seer_cli.main import app
from seer_servers.mock import MockServer
from tests.live.engines import mock_engines
from tests.mock_http import INSTANT
from tests.runs import roll
from tests.service.server import served

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

PROMPTS = [Prompt(id="g", token_ids=[5, 6, 7])]


@asynccontextmanager
async def two_addresses() -> AsyncIterator[list[str]]:
    """The URLs of one engine that listens twice, as one behind two host names does."""
    server = MockServer(INSTANT)
    runners = [await server.start() for _ in range(2)]
    try:
        yield [url for _, url in runners]
    finally:
        for runner, _ in runners:
            await runner.cleanup()


async def test_one_server_under_two_names_is_refused(tmp_path: Path) -> None:
    async with two_addresses() as (first, second):
        with pytest.raises(UsageError) as raised:
            await roll(tmp_path / "run", [first, second], PROMPTS, {})
    assert str(raised.value) in {
        f"{a} and {b} are the same server: give it once" for a, b in ((first, second), (second, first))
    }
    assert not (tmp_path / "run").exists()


@asynccontextmanager
async def some_server(status: int, body: bytes) -> AsyncIterator[str]:
    """The URL of a server that gives the same answer to everything."""

    async def answer(_: web.Request) -> web.Response:
        return web.Response(status=status, body=body)

    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (404, b"\n<!DOCTYPE HTML><p>Nothing matches the given URI.", "answered 404: a page for people; is this a vLLM"),
        (404, b"\x1b]0;owned\x07\x1b[2J" + b"x" * 10_000, "is this a vLLM server? Give its base URL, like http://host"),
        (404, b'{"error": {"message": "\\u001b[2J\\u202e"}}', "answered 404: \ufffd[2J\ufffd; is this a vLLM server?"),
        (200, b"<html>", "is this a vLLM server? Give its base URL, like http://host:8000"),
        (200, b'{"data": [{"id": "m"}]}', "is this a vLLM server? Give its base URL, like http://host:8000"),
        (401, b'{"error": "Unauthorized"}', "Unauthorized; name the environment variable that holds its API key"),
        (500, b"\x9b2J", "answered 500: "),
    ],
)
async def test_other_servers_are_told_from_vllm(tmp_path: Path, status: int, body: bytes, says: str) -> None:
    async with some_server(status, body) as url:
        with pytest.raises(FleetError) as raised:
            await roll(tmp_path / "run", [url], PROMPTS, {})
    said = str(raised.value)
    assert says in said
    assert said.isprintable()
    assert len(said) < 600


@pytest.mark.parametrize(
    ("line", "says"),
    [('{"prompt_token_ids": [99999999]}', "token id 99999999 is outside"), ('{"no": 1}', "give exactly one of")],
)
async def test_wrong_prompts_are_named_alike(tmp_path: Path, line: str, says: str) -> None:
    """Whether they are found by the parser, or when engines are there."""
    file = tmp_path / "data.jsonl"
    file.write_text(f'{{"prompt": "x"}}\n\n{line}\n')
    with mock_engines([]) as (engine,):
        command = ["rollout", str(file), "--server", engine.url, "--json", "--out", str(tmp_path / "run")]
        done = await asyncio.to_thread(CliRunner().invoke, app, command)
    assert done.exit_code == 2
    assert f"{file}:3: " in json.loads(done.stdout)["message"]
    assert says in json.loads(done.stdout)["message"]


async def test_a_service_takes_no_server_under_a_second_name() -> None:
    with mock_engines([]) as engines:
        async with two_addresses() as (first, second), served(engines) as (_, client):
            assert (await client.post("/workers", json={"url": first})).status_code == 200
            again = await client.post("/workers", json={"url": first.replace("127.0.0.1", "localhost") + "/"})
            assert again.json()["name"] == "engine-1"
            while (await client.get("/workers/engine-1")).json()["state"] != "UP":
                await asyncio.sleep(0.05)
            refused = await client.post("/workers", json={"url": second})
            assert refused.status_code == 400
            assert f"{second} is the same server as {first}" in refused.text
            assert len((await client.get("/workers")).json()["workers"]) == 2
