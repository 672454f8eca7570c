"""Drafts from siblings on a real engine: they are used, and change nothing."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Any

import aiohttp
import psutil
import pytest

from seer_servers.drafting.link import Link
from seer_servers.drafting.wire import TOKEN_BYTES, Fetch, Fetched
from tests.vllm.drafting_engine import SIBLINGS, TOKENS, drafting

if TYPE_CHECKING:
    from seer_async.types import ChunkReply
    from seer_servers.fleet import LocalFleet

pytestmark = pytest.mark.vllm

OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6},
    {"top_p": 0.8, "presence_penalty": 0.4, "frequency_penalty": 0.2},
    {"min_tokens": TOKENS - 8},
]


async def test_drafts_change_no_token_and_no_logprob(vllm_fleet: LocalFleet) -> None:
    async with drafting(vllm_fleet) as engine:
        prompt = await engine.prompt(0)

        async def everything(name: str) -> list[list[ChunkReply]]:
            return await asyncio.gather(*(engine.siblings(prompt, f"{name} {o}", **o) for o in OPTIONS))

        before = await engine.accepted()
        drafted = await everything("on")
        after = await engine.accepted()
        assert after > before + len(OPTIONS) * SIBLINGS, "the drafts were used"
        async with engine.switched_off():
            plain = await everything("off")
            assert await engine.accepted() == after
    for options, some, others in zip(OPTIONS, drafted, plain, strict=True):
        for with_drafts, without in zip(some, others, strict=True):
            assert with_drafts.token_ids == without.token_ids, options
            assert with_drafts.logprobs == pytest.approx(without.logprobs, abs=2e-3), options


async def test_requests_that_say_nothing_are_siblings_by_their_prompt(vllm_fleet: LocalFleet) -> None:
    async with drafting(vllm_fleet) as engine:
        prompt = await engine.prompt(1)
        before = await engine.accepted()
        first = await engine.respond(prompt, 1, {}, temperature=0.0)
        again = await engine.respond(prompt, 2, {}, temperature=0.0)
        assert again.token_ids == first.token_ids
        assert await engine.accepted() - before > len(first.token_ids) // 2


async def test_a_reference_from_outside_is_a_sibling(vllm_fleet: LocalFleet) -> None:
    """What another system sends to the draft server is drafted from, and speeds up a response that says the same."""
    async with drafting(vllm_fleet) as engine:
        prompt, other = await engine.prompt(2), await engine.prompt(5)
        before = await engine.fetched()
        truth = await engine.inject(prompt, "with reference")
        # A group's tokens are fetched once one of its requests has been here: one that says something else.
        async with asyncio.timeout(60):
            while await engine.fetched() < before + len(truth):
                await engine.respond(other, 3, {"seer_group": "with reference", "seer_request": "x"}, temperature=0.0)
        assert await engine.repeats(prompt, "with reference", truth) > len(truth) // 3


async def test_routes(vllm_fleet: LocalFleet) -> None:
    async with drafting(vllm_fleet) as engine:
        assert await engine.post("register", {"groups": ["g"], "ttl_s": 5}) == (200, {"groups": 1})
        for path, body in (
            ("register", {"groups": []}),
            ("register", {"groups": ["g"], "ttl_s": -1}),
            ("update", {"group": "g", "request": "r", "token_ids": [-1]}),
            ("update", {"group": "g", "request": "r", "token_ids": [1], "prev_token_count": -1}),
            ("config", {"max_spec_tokens": 0}),
            ("config", {"colour": "red"}),
        ):
            assert (await engine.post(path, body))[0] in {400, 422}, body
        status, said = await engine.post("config", {"max_spec_tokens": 60})
        assert (status, "num_speculative_tokens" in str(said)) == (400, True)
        settings = await engine.get("config")
        assert settings["enabled"]
        assert settings["max_spec_tokens"] == 8
        stats = await engine.get("stats")
        assert stats["verified"] > 0
        assert sum(stats["accepted"]) <= sum(stats["drafted"])
        assert stats["server"]["sync_connected"] == 1
        async with aiohttp.ClientSession(vllm_fleet.urls[0]) as session, session.get("/metrics") as reply:
            page = await reply.text()
        for what in ("drafted", "accepted"):  # each group's count, and together no more than all
            groups = re.findall(rf'^seer:draft_group_tokens_{what}_total{{group=".+"}} (\S+)$', page, re.MULTILINE)
            assert 0 < len(groups) <= 32
            assert 0 < sum(map(float, groups)) <= sum(stats[what])
        async with aiohttp.ClientSession(vllm_fleet.urls[1]) as plain:
            for path in ("stats", "config"):
                async with plain.get(f"/v1/seer/drafts/{path}") as reply:
                    assert reply.status == 404


async def test_a_killed_draft_server_is_replaced_and_filled_again(vllm_fleet: LocalFleet) -> None:
    service = vllm_fleet.drafts
    assert service is not None
    async with drafting(vllm_fleet) as engine:
        prompt = await engine.prompt(3)
        whole = await engine.siblings(prompt, "killed")
        tokens = sum(len(reply.token_ids) for reply in whole)
        await until_known(service.address, "killed", tokens)
        victim = next(p for p in psutil.process_iter(["cmdline"]) if service.address in (p.info["cmdline"] or []))
        victim.kill()
        again = await engine.siblings(prompt, "killed again")
        assert [reply.token_ids for reply in again] == [reply.token_ids for reply in whole]
        await until_known(service.address, "killed again", tokens)
        await until_known(service.address, "killed", tokens)


async def until_known(address: str, group: str, tokens: int) -> None:
    """Wait until a draft server knows that many tokens of a group."""
    async with asyncio.timeout(30):
        while await asyncio.to_thread(known, address, group) < tokens:
            await asyncio.sleep(0.2)


def known(address: str, group: str) -> int:
    link = Link()
    with link.open(address):
        reply = link.exchange(Fetch(1, {group: {}}), connect_s=0.2)
    logs = reply.deltas.get(group, {}) if isinstance(reply, Fetched) else {}
    return sum(len(data) // TOKEN_BYTES for _, data in logs.values())
