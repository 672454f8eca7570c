"""Keys: no route but the open ones answers without a valid one, and none ever shows."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

import httpx

from seer_servers.ports import Ports
from tests.mock_http import INSTANT
from tests.mock_http import running as mock_engine
from tests.service.server import CHAT, COMPLETIONS, GENERATE, MESSAGES, PROMPT, served

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    import pytest

    from tests.live.engines import MockProcess

OPEN = {"GET /health", "GET /ping", "POST /ping", "GET /metrics", "GET /version", "GET /openapi.json", "GET /"}
CLIENTS, ENGINES = "canary-of-the-clients-5f1c", "canary-of-the-engines-9b2e"


async def test_every_route_asks_for_a_key(
    engines: list[MockProcess], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also under wrong keys, and under one that was right before keys were rotated."""
    file = tmp_path / "keys"
    file.write_text("old\n")
    async with served(engines, serve={"port": 0, "api_key_file": str(file)}) as (_, client):
        assert (await client.get("/v1/models", headers={"Authorization": "Bearer old"})).status_code == 200
        file.write_text("rotated\n")
        async with asyncio.timeout(60):
            while (await client.get("/v1/models", headers={"Authorization": "Bearer rotated"})).status_code != 200:
                await asyncio.sleep(0.1)
        routes = [
            (method.upper(), path)
            for path, methods in (await client.get("/openapi.json")).json()["paths"].items()
            for method in methods
        ]
        assert len(routes) > 40
        for method, path in routes:
            for key in ("", "Bearer", "Bearer wrong", "Bearer old", "Basic rotated", "rotated"):
                reply = await client.request(method, path, headers={"Authorization": key} if key else {}, json={})
                refused = reply.status_code == 401 and reply.json() == {"error": "Unauthorized"}
                assert refused != (f"{method} {path}" in OPEN), (method, path, key, reply.status_code)


async def test_keys_never_show(tmp_path: Path) -> None:
    """A service and a rollout with both kinds of key, right and wrong, well and failing: all they say and write."""
    home = {"XDG_STATE_HOME": str(tmp_path / "state"), "CLIENT_KEYS": f"{CLIENTS}, other", "ENGINE_KEY": ENGINES}
    env = os.environ | home
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Say it"}\n{"prompt": "Say more"}\n')
    async with mock_engine(INSTANT, api_key=ENGINES) as (_, session):
        url = str(session._base_url).rstrip("/")
        said = [output async for output in _served(url, env, tmp_path)]
        for key in (ENGINES, "wrong"):
            words = ["rollout", "prompts.jsonl", "--server", url, "-n", "2", "--set", "engine.api_key_env=ENGINE_KEY"]
            words += ["--max-tokens", "20", "--set", "engine.patience_s=30"]
            code, output = await _run(words, env | {"ENGINE_KEY": key}, tmp_path)
            assert (code == 0) == (key == ENGINES), output
            said.append(output)
    written = _files(tmp_path)
    assert {"trace.json", "run.json", "journal", "metrics.jsonl", "job.json"} <= {path.name for path in written}
    for what in (*said, *written.values()):
        for canary in (CLIENTS, ENGINES):
            assert canary.encode() not in what


def _files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


async def _served(url: str, env: dict[str, str], folder: Path) -> AsyncIterator[bytes]:
    """Everything that `seer serve` over an engine says, to clients and on its own account."""
    ports = Ports(1)
    words = ["serve", "--server", url, "--port", str(ports[0]), "--api-key-env", "CLIENT_KEYS"]
    words += ["--set", "engine.api_key_env=ENGINE_KEY", "--set", "engine.patience_s=30"]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "seer_cli.main", *words, cwd=folder, env=env,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        yield await asyncio.wait_for(process.stdout.readuntil(b"\n"), 60)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{ports[0]}", timeout=30) as client:
            for key in (CLIENTS, ENGINES, CLIENTS[:-1], "other"):
                async for reply in _replies(client, {"Authorization": f"Bearer {key}"}):
                    yield repr(reply.headers).encode() + reply.content
            spread = {"prompts": [{"prompt": "Say it"}], "stream": True, "sampling": {"max_tokens": 9}}
            right = {"Authorization": f"Bearer {CLIENTS}"}
            rollout = await client.post("/v1/rollouts", json=spread, headers=right)
            assert rollout.status_code == 200, rollout.text
            yield rollout.content
        process.send_signal(signal.SIGINT)
        yield await asyncio.wait_for(process.stdout.read(), 30)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _replies(client: httpx.AsyncClient, headers: dict[str, str]) -> AsyncIterator[httpx.Response]:
    for path, methods in (await client.get("/openapi.json")).json()["paths"].items():
        if "get" in methods:
            yield await client.get(path.replace("{", "").replace("}", ""), headers=headers)
    sampling = {"max_tokens": 5}
    bodies: list[tuple[str, dict[str, Any]]] = [
        (COMPLETIONS, {"prompt": PROMPT} | sampling),
        (COMPLETIONS, {"prompt": PROMPT, "stream": True} | sampling),
        (COMPLETIONS, {"prompt": PROMPT, "echo": True}),
        (CHAT, {"messages": MESSAGES} | sampling),
        (GENERATE, {"token_ids": PROMPT, "sampling_params": sampling}),
        ("/workers", {"url": "http://127.0.0.1:1"}),
        ("/collective_rpc", {"method": "nothing"}),
        ("/v1/unload_lora_adapter", {"lora_name": "none"}),
    ]
    for path, body in bodies:
        yield await client.post(path, json=body, headers=headers)


async def _run(words: list[str], env: dict[str, str], folder: Path) -> tuple[int | None, bytes]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "seer_cli.main", *words, cwd=folder, env=env,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    output, _ = await process.communicate()
    return process.returncode, output
