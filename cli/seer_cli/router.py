"""vllm-router in front of the engines, and a plain client: what one would use without Seer.

Every response is one call, all are sent at once, and the router chooses the engine. The group's name goes along as the
session, so that sticky policies keep a group together.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import sys
import time
import uuid
from typing import TYPE_CHECKING, Any

import aiohttp

from seer_async.engine import engine_session
from seer_async.errors import FleetError, UsageError
from seer_servers.ports import Ports
from seer_servers.process import Process

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from seer_async.types import Prompt
    from seer_cli.contest import Work

_START_S, _POLL_S = 60.0, 0.1
_CALL_S = 3600.0


def require_router() -> None:
    """UsageError if the package is not installed."""
    if importlib.util.find_spec("vllm_router") is None:
        raise UsageError("vllm-router is not installed here: pip install vllm-router, or leave out its contenders")


async def routed(url: str, model: str, work: Work) -> list[float]:
    """Sample every response through the router at `url`; returns when each finished, Unix seconds.

    Raises:
        FleetError: The router answers a call with an error.
    """
    salt = uuid.uuid4().hex
    async with engine_session() as session:
        calls = [
            _call(session, url, model, prompt, work.lengths[f"{prompt.id}/{index}"], salt=salt)
            for index in range(work.n)
            for prompt in work.prompts
        ]
        return await asyncio.gather(*calls)


async def _call(
    session: aiohttp.ClientSession, url: str, model: str, prompt: Prompt, length: int, *, salt: str
) -> float:
    body: dict[str, Any] = {
        "model": model,
        "prompt": prompt.token_ids,
        "max_tokens": length,
        "ignore_eos": True,
        "logprobs": 0,
        "return_token_ids": True,
        "cache_salt": salt,  # prompts of an earlier round are not found again, nor in runs of our own
        "kv_transfer_params": {"seer_load": False, "seer_save": False},  # no pool
    }
    timeout = aiohttp.ClientTimeout(total=_CALL_S)
    async with session.post(
        f"{url}/v1/completions", json=body, headers={"X-Session-ID": prompt.id}, timeout=timeout
    ) as response:
        said = await response.json(content_type=None)
        if response.status != 200:  # noqa: PLR2004 - HTTP
            raise FleetError(f"vllm-router answers {response.status}: {str(said)[:300]}")
    if len(said["choices"][0]["token_ids"]) != length:
        raise FleetError(f"vllm-router brings {len(said['choices'][0]['token_ids'])} tokens instead of {length}")
    return time.time()


@contextlib.asynccontextmanager
async def router(urls: Sequence[str], policy: str, log: Path) -> AsyncIterator[str]:
    """Run a router in front of engines, with its output in `log`: its URL, when it answers.

    Raises:
        FleetError: It does not start.
    """
    ports = Ports(2)
    port, metrics = ports
    options = ["--worker-urls", *urls, "--policy", policy, "--host", "127.0.0.1", "--port", str(port)]
    options += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics)]
    options += ["--request-timeout-secs", f"{_CALL_S:.0f}", "--log-level", "error"]
    command = [sys.executable, "-m", "vllm_router.launch_router", *options]
    process = await Process.start(command, os.environ, log)
    url = f"http://127.0.0.1:{port}"
    try:
        if not await _ready(url, process):
            raise FleetError(f"vllm-router does not start: {process.last_words()}")
        yield url
    finally:
        process.kill()
        await process.wait()


async def _ready(url: str, process: Process) -> bool:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_START_S), aiohttp.ClientSession() as session:
            while process.alive:
                with contextlib.suppress(aiohttp.ClientError):
                    async with session.get(f"{url}/health") as response:
                        if response.ok:
                            return True
                await asyncio.sleep(_POLL_S)
    return False
