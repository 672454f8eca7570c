"""`seer serve` over real engines, and an engine itself, asked at random: what is left out means the same to both."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from seer_async.config import resolve
from seer_servers.service.serve import serving
from tests.vllm.test_serve import CHAT, COMPLETIONS, GENERATE, differences, marked

if TYPE_CHECKING:
    from collections.abc import Mapping

    from seer_servers.fleet import LocalFleet

pytestmark = pytest.mark.vllm

CASES, AT_ONCE = 60, 8
LIMITS = (1, 2, 7, 8, 9, 15, 16, 17, 24, 40)
ALWAYS: dict[str, tuple[Any, ...]] = {
    "min_tokens": (0, 1, 5),
    "stop": ("a", " the", [".", "\n"], ["e", "t", "o"]),
    "stop_token_ids": ([30], [28, 282]),
    "include_stop_str_in_output": (True, False),
    "presence_penalty": (0.0, 0.5, -1.0),
    "frequency_penalty": (0.0, 0.5, -0.5),
    "repetition_penalty": (1.0, 1.2, 0.9),
    "ignore_eos": (True, False),
    "skip_special_tokens": (True, False),
    "bad_words": ([" the"], ["a", " and"]),
    "allowed_token_ids": (list(range(200, 600)),),
}
SEEDED = {"n": (1, 2, 3), "temperature": (0.3, 0.6, 1.0, 1.5), "top_p": (0.5, 0.9, 1.0), "top_k": (-1, 0, 1, 5, 50)}
ENVELOPES: dict[str, dict[str, tuple[Any, ...]]] = {
    COMPLETIONS: {"logprobs": (0, None), "return_token_ids": (True, False), "return_tokens_as_token_ids": (True,)},
    CHAT: {"logprobs": (True, False), "return_token_ids": (True, False)},
    GENERATE: {"cache_salt": ("s",)},
}
PROMPTS: dict[str, dict[str, tuple[Any, ...]]] = {
    COMPLETIONS: {"prompt": ("The sea is", "One, two,", "A word:")},
    CHAT: {"messages": tuple([{"role": "user", "content": text}] for text in ("Hi", "Name three colours"))},
    GENERATE: {"token_ids": ([504, 3413, 314], [1, 9690, 198], [504])},
}


def some(dice: random.Random, choices: Mapping[str, tuple[Any, ...]], chance: float) -> dict[str, Any]:
    return {name: dice.choice(values) for name, values in choices.items() if dice.random() < chance}


def asked(dice: random.Random) -> tuple[str, dict[str, Any]]:
    """A route and a body; whatever is random has a seed."""
    path = dice.choice([COMPLETIONS, CHAT, GENERATE])
    params = some(dice, ALWAYS, 0.2)
    params |= (
        {"temperature": 0} if dice.random() < 0.5 else {"seed": dice.choice((0, 7, 2**40))} | some(dice, SEEDED, 0.4)
    )
    if path != COMPLETIONS or dice.random() < 0.8:
        params |= {"max_tokens": dice.choice(LIMITS)}
    body = some(dice, PROMPTS[path], 1) | some(dice, ENVELOPES[path], 0.4)
    return path, body | ({"sampling_params": params} if path == GENERATE else params)


async def test_one_server_or_a_fleet_at_random(vllm_fleet: LocalFleet) -> None:
    dice = random.Random(1)
    config = resolve({"serve": {"port": 0}, "rollout": {"chunk_size": 8}})
    turns = asyncio.Semaphore(AT_ONCE)
    async with (
        httpx.AsyncClient(base_url=vllm_fleet.urls[-1], timeout=300) as engine,
        serving(config, vllm_fleet.urls) as (_, url),
        httpx.AsyncClient(base_url=url, timeout=300) as service,
    ):

        async def one(path: str, request: dict[str, Any]) -> int:
            async with turns:
                body = await marked(engine, request)
                replies = [await client.post(path, json=body) for client in (engine, service)]
            codes = [reply.status_code for reply in replies]
            assert codes[0] == codes[1], (path, body, [reply.text for reply in replies])
            if codes[0] == httpx.codes.OK:
                differ = list(differences(*(reply.json() for reply in replies)))
                assert not differ, (path, body, differ)
            return codes[0]

        codes = await asyncio.gather(*(one(*asked(dice)) for _ in range(CASES)))
    assert codes.count(httpx.codes.OK) > 0.9 * CASES
