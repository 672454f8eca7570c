"""What `seer serve` itself costs: a trainer's rollout through HTTP over mock engines, and single requests beside them.

The service is a process of its own, so its CPU is its own. A rollout is one request, as TRL sends it: prompts as token
ids, n responses to each, with token ids and logprobs in the answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import statistics
import sys
import time
from typing import TYPE_CHECKING, Any

import msgspec

from seer_async.engine import engine_session
from seer_async.errors import SeerError
from seer_cli.load import mock_engine_processes
from seer_servers.ports import Ports

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import aiohttp

_PATH = "/v1/completions"
_PROMPT_TOKENS = 64
_ONE = {"max_tokens": 16, "seed": 1, "ignore_eos": True}
_WARM_UP = 20
_CPU = "seer_process_cpu_seconds_total "


class _Choice(msgspec.Struct):
    index: int
    token_ids: list[int]


class _Reply(msgspec.Struct):
    choices: list[_Choice]


async def measure_serve(*, prompts: int, n: int, chunk: int, engines: int, turns: int) -> dict[str, Any]:
    """Figures by name; see the module docstring."""
    async with (
        mock_engine_processes(engines, 1024, step_ms=20.0) as urls,
        _service(urls, chunk) as url,
        engine_session() as session,
    ):
        rollout = await _rollout(session, url, prompts=prompts, n=n, chunk=chunk)
    async with (
        mock_engine_processes(1, 64, step_ms=0.0) as (direct,),
        _service([direct], chunk) as url,
        engine_session() as session,
    ):
        return rollout | await _overhead(session, direct, url, turns)


async def _rollout(session: aiohttp.ClientSession, url: str, *, prompts: int, n: int, chunk: int) -> dict[str, Any]:
    asked = {
        "prompt": [_prompt(number) for number in range(prompts)],
        "n": n,
        "max_tokens": 512,
        "logprobs": 0,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }
    before, start = await _cpu_s(session, url), time.perf_counter()
    async with session.post(url + _PATH, json=asked) as response:
        body = await response.read()
        status = response.status
    wall, spent = time.perf_counter() - start, await _cpu_s(session, url) - before
    choices = msgspec.json.decode(body, type=_Reply).choices if status == 200 else []  # noqa: PLR2004 - HTTP
    chunks = sum(-(-len(choice.token_ids) // chunk) for choice in choices)
    return {
        "responses": len(choices),
        "errors": prompts * n - sum(choice.index == place for place, choice in enumerate(choices)),
        "tokens": sum(len(choice.token_ids) for choice in choices),
        "chunks": chunks,
        "wall time, s": round(wall, 2),
        "CPU of the service, s": round(spent, 2),
        "CPU per chunk, ms": round(1000 * spent / max(1, chunks), 3),
    }


async def _overhead(session: aiohttp.ClientSession, direct: str, url: str, turns: int) -> dict[str, Any]:
    """One request at a time, in turn to an engine and to the service before it."""
    took: dict[str, list[float]] = {direct: [], url: []}
    for turn in range(_WARM_UP + turns):
        for base, times in took.items():
            start = time.perf_counter()
            async with session.post(base + _PATH, json=_ONE | {"prompt": _prompt(turn)}) as response:
                await response.read()
                response.raise_for_status()
            times.append(time.perf_counter() - start)
    engine, service = (1000 * statistics.median(times[_WARM_UP:]) for times in took.values())
    return {
        "one request to an engine, median ms": round(engine, 2),
        "one request to the service, median ms": round(service, 2),
        "overhead of one request, ms": round(service - engine, 2),
    }


@contextlib.asynccontextmanager
async def _service(urls: list[str], chunk: int) -> AsyncIterator[str]:
    """`seer serve` over engines: its URL."""
    ports = Ports(1)
    servers = [part for url in urls for part in ("--server", url)]
    command = [
        sys.executable,
        "-m",
        "seer_cli.main",
        "serve",
        *servers,
        "--port",
        str(ports[0]),
        "--chunk-size",
        str(chunk),
    ]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    try:
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), 60)
        if b"ready" not in line:
            raise SeerError("seer serve did not start; its message is above")
        yield line.split()[-1].decode()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def _prompt(number: int) -> list[int]:
    rng = random.Random(number)  # noqa: S311 - a workload, not a secret
    return [rng.randrange(3, 1000) for _ in range(_PROMPT_TOKENS)]


async def _cpu_s(session: aiohttp.ClientSession, url: str) -> float:
    async with session.get(f"{url}/metrics") as response:
        page = await response.text()
    (line,) = [line for line in page.splitlines() if line.startswith(_CPU)]
    return float(line.split()[-1])
