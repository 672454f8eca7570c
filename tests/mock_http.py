"""Mock engines in the tests' own process, and calls to them."""

from __future__ import annotations

import asyncio
import contextlib

import aiohttp

from seer_servers.mock import MockConfig, MockServer, Speed

GENERATE = "/inference/v1/generate"
COMPLETIONS = "/v1/completions"
INSTANT = MockConfig(speed=Speed(time_scale=0))
SLOW = MockConfig(speed=Speed(step_ms=5, per_request_ms=0))
PROMPT = [75, 104, 111, 111, 114]


@contextlib.asynccontextmanager
async def running(config=INSTANT, **options):
    server = MockServer(config, **options)
    runner, url = await server.start()
    try:
        async with aiohttp.ClientSession(url, timeout=aiohttp.ClientTimeout(60)) as session:
            yield server, session
    finally:
        await runner.cleanup()


def generate_body(prefix, *, prompt_len=None, request_id="r", **params):
    params = {"max_tokens": 32, "seed": 7, "logprobs": 0, **params}
    params["extra_args"] = {"seer_prompt_len": prompt_len or len(prefix)}
    return {"request_id": request_id, "model": "mock", "token_ids": prefix, "sampling_params": params}


def completion_body(prefix, *, prompt_len=None, **params):
    return {
        "model": "mock",
        "prompt": prefix,
        "max_tokens": 32,
        "seed": 7,
        "logprobs": 0,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "vllm_xargs": {"seer_prompt_len": prompt_len or len(prefix)},
        **params,
    }


async def post(session, path, body, status=200):
    async with session.post(path, json=body) as response:
        assert response.status == status, await response.text()
        return await response.json()


async def get(session, path):
    async with session.get(path) as response:
        assert response.status == 200
        return await response.json()


async def generate(session, prefix, **options):
    """Tokens, logprobs and finish reason of one call on the preferred route."""
    choice = (await post(session, "/inference/v1/generate", generate_body(prefix, **options)))["choices"][0]
    content = choice["logprobs"]["content"]
    assert [entry["token_id"] for entry in content] == choice["token_ids"]
    return choice["token_ids"], [entry["logprob"] for entry in content], choice["finish_reason"]


async def metrics(session):
    async with session.get("/metrics") as response:
        text = await response.text()
    return {
        line.split("{")[0].split(" ")[0]: float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line[0] != "#"
    }


async def until(condition):
    while not await condition():
        await asyncio.sleep(0.01)


async def begun(session):
    """Wait until the engine has generated some tokens."""

    async def generating():
        return (await metrics(session))["vllm:generation_tokens_total"] > 10

    await until(generating)
