"""Trainers against `seer serve` over real engines: TRL's, openai's and verifiers' own packages, the requests of SkyRL
and prime-rl, and GRPO with new weights every step.
"""

from __future__ import annotations

import asyncio
import importlib.util
import random
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from openai import AsyncOpenAI

from seer_async.client import Client
from seer_async.config import resolve
from seer_servers.model import ensure_default_model
from seer_servers.service.serve import serving
from tests.environments import environment
from tests.vllm.putback import put_back

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from types import ModuleType

    from seer_async.service import Service
    from seer_servers.fleet import LocalFleet

pytestmark = pytest.mark.vllm

MESSAGES = [{"role": "user", "content": "Name a colour."}]
CHUNK = 8  # tokens: every answer here is cut several times
VERIFIERS_SCRIPT = Path(__file__).parents[1] / "service" / "trainers" / "verifiers_asks.py"
EXAMPLE = Path(__file__).parents[2] / "examples" / "grpo.py"


@asynccontextmanager
async def served(fleet: LocalFleet) -> AsyncIterator[tuple[Service, str]]:
    config = resolve({"serve": {"port": 0, "stream_chunk_size": CHUNK}, "rollout": {"chunk_size": CHUNK}})
    async with serving(config, fleet.urls) as (service, url):
        yield service, url


async def test_trl(vllm_fleet: LocalFleet) -> None:
    """TRL's client over the fleet and over one engine: the same greedy tokens and logprobs, prompt-major."""
    async with served(vllm_fleet) as (_, url):
        ours, theirs = [await asyncio.to_thread(_asked_by_trl, each) for each in (url, vllm_fleet.urls[-1])]
    for name in ("generate", "ids", "chat"):
        said, expected = ours[name], theirs[name]
        for field in ("prompt_ids", "completion_ids", "logprob_token_ids"):
            assert said[field] == expected[field], (name, field)
        for one, other in zip(said["logprobs"], expected["logprobs"], strict=True):
            assert [v for row in one for v in row] == pytest.approx([v for row in other for v in row], abs=2e-3)
    sampled = ours["sampled"]
    assert len(sampled["prompt_ids"]) == 2 and len(sampled["completion_ids"]) == 8
    assert all(len(ids) == len(rows) for ids, rows in zip(sampled["completion_ids"], sampled["logprobs"], strict=True))
    assert len({tuple(ids) for ids in sampled["completion_ids"]}) > 4, "responses of a group are independent"
    assert ours["world"] == 2, "the fleet is one server with the workers of all engines"


def _asked_by_trl(url: str) -> dict[str, Any]:
    from trl.generation.vllm_client import VLLMClient

    client = VLLMClient(base_url=url, connection_timeout=10.0)
    greedy: dict[str, Any] = {"temperature": 0.0, "max_tokens": 30}
    return {
        "generate": client.generate(["The sea is", "One, two,"], logprobs=2, **greedy),
        "ids": client.generate([[504, 3413, 314], [504]], **greedy),
        "chat": client.chat([MESSAGES, MESSAGES * 2], **greedy),
        "sampled": client.generate(["Once upon a time", "A list:"], n=4, max_tokens=20, temperature=1.0, top_p=0.95),
        "world": client.get_world_size(),
    }


async def test_openai(vllm_fleet: LocalFleet) -> None:
    """The openai package: completions, chat, streams, logprobs and n, each as the engine itself answers."""
    async with served(vllm_fleet) as (_, url):
        said = [await _asked_by_openai(each) for each in (url, vllm_fleet.urls[-1])]
        client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        group = await client.chat.completions.create(
            model=said[0][0], messages=MESSAGES, n=4, temperature=1.0, max_tokens=20, logprobs=True
        )
    assert said[0] == said[1]
    assert [choice.index for choice in group.choices] == [0, 1, 2, 3]
    for choice in group.choices:
        assert (
            choice.logprobs and choice.logprobs.content and all(entry.logprob <= 0 for entry in choice.logprobs.content)
        )
    assert group.usage and group.usage.completion_tokens == sum(len(c.logprobs.content) for c in group.choices)  # type: ignore[union-attr,arg-type]


async def _asked_by_openai(url: str) -> list[Any]:
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    models = await client.models.list()
    model = models.data[0].id
    greedy: dict[str, Any] = {"model": model, "temperature": 0.0, "max_tokens": 30}
    plain = await client.completions.create(prompt=["The sea is", "One, two,"], logprobs=1, **greedy)
    chat = await client.chat.completions.create(messages=MESSAGES, logprobs=True, top_logprobs=2, **greedy)
    pieces = [piece async for piece in await client.completions.create(prompt="The sea is", stream=True, **greedy)]
    deltas = [
        piece
        async for piece in await client.chat.completions.create(
            messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **greedy
        )
    ]
    logprobs = chat.choices[0].logprobs
    assert logprobs and logprobs.content
    return [
        model,
        [(choice.index, choice.text, choice.finish_reason) for choice in plain.choices],
        [choice.logprobs and choice.logprobs.tokens for choice in plain.choices],
        plain.usage and (plain.usage.prompt_tokens, plain.usage.completion_tokens),
        (chat.choices[0].message.content, chat.choices[0].finish_reason),
        [(entry.token, len(entry.top_logprobs)) for entry in logprobs.content],
        "".join(piece.choices[0].text for piece in pieces),
        "".join(piece.choices[0].delta.content or "" for piece in deltas if piece.choices),
        [piece.usage.completion_tokens for piece in deltas if piece.usage],
    ]


async def test_generate(vllm_fleet: LocalFleet) -> None:
    """The requests of SkyRL and of prime-rl (renderers): what they read is what the engine itself answers."""
    async with served(vllm_fleet) as (service, url):
        ours, theirs = [await _generated(each) for each in (url, vllm_fleet.urls[-1])]
        for one, other in zip(ours, theirs, strict=True):
            assert one["token_ids"] == other["token_ids"] and one["finish_reason"] == other["finish_reason"]
            contents = [each["logprobs"]["content"] for each in (one, other)]
            assert [p["token_id"] for p in contents[0]] == one["token_ids"]
            assert [p["token"] for p in contents[0]] == [f"token_id:{token}" for token in one["token_ids"]]
            logprobs = [[p["logprob"] for p in content] for content in contents]
            assert logprobs[0] == pytest.approx(logprobs[1], abs=2e-3)
        whole = ours[-1]["token_ids"]
        kept = await _paused(service, url, "keep")
        assert (kept["token_ids"], kept["finish_reason"]) == (whole, "length"), "nobody can tell afterwards"
        aborted = await _paused(service, url, "abort")
        begun = aborted["token_ids"]
        assert aborted["finish_reason"] == "abort" and 0 < len(begun) < len(whole)
        rest = LONG | {"max_tokens": len(whole) - len(begun)}
        (continued,) = await _generated(url, ([*PROMPT, *begun], rest))
        assert begun + continued["token_ids"] == whole


PROMPT = [504, 3413, 314]
SKYRL = {
    "min_tokens": 1, "skip_special_tokens": True, "include_stop_str_in_output": True, "max_tokens": 30, "top_p": 1.0,
    "top_k": -1, "min_p": 0.0, "logprobs": 1, "stop": None, "temperature": 0.0,
}  # fmt: skip
RENDERERS = {
    "temperature": 0.0,
    "max_tokens": 30,
    "stop_token_ids": [0, 2],
    "logprobs": 1,
    "skip_special_tokens": False,
}
LONG = SKYRL | {"max_tokens": 64, "ignore_eos": True}


async def _generated(url: str, *asked: tuple[list[int], dict[str, Any]]) -> list[Any]:
    asked = asked or ((PROMPT, SKYRL), ([504], RENDERERS), (PROMPT, LONG))
    async with httpx.AsyncClient(base_url=url, timeout=120, headers={"X-Session-ID": "trajectory-1"}) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        bodies = [
            {"sampling_params": params, "model": model, "token_ids": prompt, "cache_salt": "3"}
            for prompt, params in asked
        ]
        replies = [await client.post("/inference/v1/generate", json=body) for body in bodies]
    assert all(reply.is_success for reply in replies), [reply.text[:500] for reply in replies]
    return [reply.json()["choices"][0] for reply in replies]


async def _paused(service: Service, url: str, mode: str) -> Any:
    """What a request gets that is paused in its middle."""
    before = service.core.responses.tokens
    task = asyncio.create_task(_generated(url, (PROMPT, LONG)))
    while service.core.responses.tokens < before + CHUNK:
        await asyncio.sleep(0.005)
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        (await client.post("/pause", params={"mode": mode, "clear_cache": "false"})).raise_for_status()
        await asyncio.sleep(0.5)
        assert task.done() == (mode == "abort")
        (await client.post("/resume")).raise_for_status()
    return (await task)[0]


@pytest.mark.parametrize("kind", ["eval", "train"])
async def test_verifiers(vllm_fleet: LocalFleet, kind: str) -> None:
    """verifiers' evaluation, with its chat client and the one that prime-rl trains with: every rollout is scored."""
    verifiers = environment("verifiers", "verifiers==0.4.0")
    async with served(vllm_fleet) as (service, url):
        renderer = [str(ensure_default_model())] if kind == "train" else []
        episodes = await asyncio.to_thread(
            verifiers.run, VERIFIERS_SCRIPT, url, service.info.model, kind, "2", *renderer
        )
    assert len(episodes) == 6
    for episode in episodes:
        (trace,) = episode["traces"]
        answer = trace["nodes"][-1]
        assert not trace["errors"]
        assert trace["rewards"]["said_something"]["score"] == bool((answer["message"].get("content") or "").strip())
        if kind == "train":
            assert len(answer["logprobs"]) > 1
            assert all(logprob <= 0 for logprob in answer["logprobs"])


async def test_grpo(vllm_fleet: LocalFleet, tmp_path: Path) -> None:
    """Two steps of examples/grpo.py: the engines sample from the very weights that the gradient step has made."""
    grpo = _example()
    try:
        async with served(vllm_fleet) as (service, url):
            steps = await asyncio.to_thread(_trained, grpo, url, tmp_path)
            assert service.core.versions.current == "step-2"
            async with httpx.AsyncClient() as client:
                said = [(await client.get(f"{each}/weight_info")).json() for each in vllm_fleet.urls]
            assert all("step-2" in str(each) for each in said), said
    finally:
        await put_back(vllm_fleet)
    assert [step.version for step in steps] == ["step-0", "step-1"]
    for step in steps:
        assert step.mismatch < 0.01 < step.moved, "engines sample from the weights of their version, which do change"


def _trained(grpo: ModuleType, url: str, folder: Path) -> list[Any]:
    random.seed(0)
    with Client(url) as client:
        policy = grpo.Policy(ensure_default_model(), 1e-4)
        return list(grpo.train(client, policy, folder, steps=2, batch=2, n=4, max_tokens=16))


def _example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("grpo", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module
