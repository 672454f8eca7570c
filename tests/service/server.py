"""`seer serve` over mock engine processes, in the test's own process."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import httpx

from seer_async.config import merge, resolve
from seer_servers.mock import LanguageModel, reference_response
from seer_servers.service.serve import serving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from seer_async.service import Service
    from tests.live.engines import MockProcess

MODEL = LanguageModel(mean_length=60.0)
SPEED = ["--step-ms", "2", "--per-request-ms", "0.01", "--mean-length", "60"]
PROMPT = [75, 104, 111, 111, 114]
COMPLETIONS, CHAT, GENERATE = "/v1/completions", "/v1/chat/completions", "/inference/v1/generate"
MESSAGES = [{"role": "user", "content": "Say it"}]

_QUICK: dict[str, Any] = {
    "engine": {"telemetry_s": 0.1, "probe_timeout_s": 30.0, "chunk_timeout_s": 5.0, "patience_s": 15.0},
    "rollout": {"chunk_size": 16},
    "serve": {"port": 0, "stream_chunk_size": 8, "shutdown_s": 5.0},
}


@asynccontextmanager
async def served(
    engines: list[MockProcess], headers: dict[str, str] | None = None, **tree: Any
) -> AsyncIterator[tuple[Service, httpx.AsyncClient]]:
    async with (
        serving(resolve(merge(_QUICK, tree)), [engine.url for engine in engines]) as (service, url),
        httpx.AsyncClient(base_url=url, timeout=60, headers=headers) as client,
    ):
        yield service, client


async def post(client: httpx.AsyncClient, path: str, status: int = 200, **body: Any) -> Any:
    reply = await client.post(path, json=body)
    assert reply.status_code == status, reply.text
    return reply.json()


async def events(client: httpx.AsyncClient, path: str, **body: Any) -> list[Any]:
    """The events of a stream, which must end in [DONE]."""
    import msgspec

    async with client.stream("POST", path, json=body | {"stream": True}) as reply:
        assert reply.status_code == 200, await reply.aread()
        lines = [line.removeprefix("data: ") async for line in reply.aiter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [msgspec.json.decode(line) for line in lines[:-1]]


def reference(prompt: list[int], seed: int, max_tokens: int) -> tuple[list[int], list[float], str]:
    return reference_response(prompt, seed, max_tokens, model=MODEL)


def long_seed(prompt: list[int], tokens: int) -> int:
    """A seed whose response has at least so many tokens."""
    return next(seed for seed in range(1000) if len(reference(prompt, seed, tokens)[0]) == tokens)
