"""Drafts on a real engine on a GPU, where Model Runner V2 makes and verifies them. Without a GPU nothing runs here.

In bfloat16 a step that verifies drafts and one that does not differ in the last bits of their logits, so a few
responses may go their own way.
"""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING, Any

import pytest
from anyio.from_thread import start_blocking_portal

from seer_servers.fleet import EngineSpec, LocalFleet
from seer_servers.model import ensure_default_model
from seer_servers.placement import visible_gpus
from tests.vllm.drafting_engine import TOKENS, drafting

if TYPE_CHECKING:
    from collections.abc import Iterator

    from seer_async.types import ChunkReply
    from tests.vllm.drafting_engine import Drafting

pytestmark = [pytest.mark.vllm, pytest.mark.skipif(not visible_gpus(), reason="this machine has no GPU")]

PROMPTS = 6
OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6},
    {"temperature": 0.8, "top_p": 0.8, "presence_penalty": 0.4, "frequency_penalty": 0.2},
    {"top_k": 40, "min_tokens": TOKENS - 8},
]


@pytest.fixture(scope="module")
def gpu_fleet(vllm_installed: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    spec = EngineSpec(model=str(ensure_default_model()), max_model_len=2048, kv_cache_gib=4, draft="grouped")
    fleet = LocalFleet([spec], 1, tmp_path_factory.mktemp("fleet"))
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(fleet):
        yield fleet


async def test_drafts_change_no_token_and_no_logprob(gpu_fleet: LocalFleet) -> None:
    async with drafting(gpu_fleet) as engine:
        before = await engine.accepted()
        drafted = await _everything(engine, "on")
        after = await engine.accepted()
        assert after > before + len(drafted), "the drafts were used"
        async with engine.switched_off():
            plain = await _everything(engine, "off")
            assert await engine.accepted() == after
    pairs = list(zip(drafted, plain, strict=True))
    equal = [(some, other) for some, other in pairs if some.token_ids == other.token_ids]
    assert len(equal) >= 0.9 * len(pairs)
    assert sum(len(some.token_ids) for some, _ in equal) > TOKENS * len(pairs) / 2
    for some, other in equal:
        assert some.logprobs == pytest.approx(other.logprobs, abs=0.2)
        assert some.logprobs is not None
        assert all(map(math.isfinite, some.logprobs))


async def _everything(engine: Drafting, name: str) -> list[ChunkReply]:
    prompts = [await engine.prompt(number) for number in range(PROMPTS)]
    groups = await asyncio.gather(
        *(
            engine.siblings(prompt, f"{name} {number} {options}", **options)
            for number, prompt in enumerate(prompts)
            for options in OPTIONS
        )
    )
    return [reply for group in groups for reply in group]


async def test_a_reference_from_outside_is_a_sibling(gpu_fleet: LocalFleet) -> None:
    async with drafting(gpu_fleet) as engine:
        prompt = await engine.prompt(2)
        truth = await engine.inject(prompt, "with reference")
        # A group's tokens are fetched once one of its requests has been here: one that says something else.
        other = await engine.prompt(5)
        for name in ("first", "second"):
            await engine.respond(other, 3, {"seer_group": "with reference", "seer_request": name}, temperature=0.0)
        assert await engine.repeats(prompt, "with reference", truth) > len(truth) // 3


async def test_settings_and_counts(gpu_fleet: LocalFleet) -> None:
    async with drafting(gpu_fleet) as engine:
        assert await engine.get("config") == {"enabled": True, "adaptive": False}
        assert (await engine.post("config", {"max_spec_tokens": 4}))[0] == 400
        before = await engine.get("stats")
        prompt = await engine.prompt(4)
        accepted = await engine.accepted()
        for _ in range(3):  # a page is written while the engine works, with what the GPU had counted one page before
            await engine.siblings(prompt, "counted")
        assert await engine.accepted() > accepted
        after = await engine.get("stats")
        assert after["verified"] > before["verified"]
        assert all(right <= made for right, made in zip(after["accepted"], after["drafted"], strict=True))
        assert after["by_group"]["counted"][0] > 0
        assert after["server"]["sync_connected"] == 1
        async with engine.switched_off():
            for _ in range(3):
                await engine.siblings(prompt, "not drafted")
                await engine.accepted()
            before = await engine.get("stats")
            for _ in range(2):
                await engine.siblings(prompt, "not drafted")
                await engine.accepted()
            after = await engine.get("stats")
        assert after["verified"] == before["verified"]
        assert after["steps_off"] > before["steps_off"]
