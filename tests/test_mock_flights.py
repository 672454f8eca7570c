"""Requests in flight in a mock engine: aborted, abandoned, preempted, queued, frozen, and met by new weights."""

from __future__ import annotations

import asyncio

import pytest

from seer_servers.mock import KV, LanguageModel, MockConfig, Speed, reference_response
from seer_servers.mock.model import Sampling
from tests.mock_http import GENERATE, PROMPT, SLOW, begun, generate, generate_body, get, metrics, post, running, until


async def test_abort_answers_with_what_there_is():
    whole, _, _ = reference_response(PROMPT, 7, 4000, ignore_eos=True)
    async with running(SLOW) as (_, session):
        call = asyncio.create_task(generate(session, PROMPT, max_tokens=4000, ignore_eos=True, request_id="a"))
        other = asyncio.create_task(generate(session, PROMPT, max_tokens=4000, ignore_eos=True, request_id="b"))

        await begun(session)
        await post(session, "/abort_requests", {"request_ids": ["a"]})  # not the engine's name for it, as in vLLM
        assert (await metrics(session))["vllm:num_requests_running"] == 2
        reply = await post(session, "/abort_requests", {"request_ids": ["generate-tokens-a"]})
        assert reply == {"status": "aborted", "aborted": 1}
        tokens, logprobs, finish_reason = await call
        assert finish_reason == "abort"
        assert 0 < len(tokens) == len(logprobs) < 4000
        assert tokens == whole[: len(tokens)]
        assert not other.done()
        await post(session, "/abort_requests", {})
        assert (await other)[2] == "abort"
        assert (await metrics(session))["vllm:kv_cache_usage_perc"] == 0


async def test_a_client_that_hangs_up_frees_the_engine():
    async with running(SLOW) as (server, session):
        call = asyncio.create_task(generate(session, PROMPT, max_tokens=4000, ignore_eos=True))

        async def busy():
            return (await metrics(session))["vllm:num_requests_running"] == 1

        async def idle():
            return (await metrics(session))["vllm:num_requests_running"] == 0

        await until(busy)
        assert (await metrics(session))["vllm:kv_cache_usage_perc"] > 0
        call.cancel()
        await asyncio.wait_for(until(idle), 30)
        assert not server.engine._flights


async def test_preemptions_are_counted_and_change_no_token():
    config = MockConfig(
        max_model_len=160,
        speed=Speed(step_ms=5, per_request_ms=0),
        kv=KV(num_blocks=10, block_size=16),
    )
    async with running(config) as (_, session):
        calls = [generate(session, [*PROMPT, n], max_tokens=80, ignore_eos=True, request_id=str(n)) for n in range(4)]
        replies = await asyncio.gather(*calls)
        assert replies == [reference_response([*PROMPT, n], 7, 80, ignore_eos=True) for n in range(4)]
        assert (await metrics(session))["vllm:num_preemptions_total"] > 0


async def test_more_requests_than_slots_wait_in_the_engine():
    config = MockConfig(speed=SLOW.speed, kv=KV(max_num_seqs=2))
    async with running(config) as (_, session):
        calls = [
            asyncio.create_task(generate(session, PROMPT, max_tokens=4000, ignore_eos=True, request_id=str(n)))
            for n in range(5)
        ]

        async def queued():
            figures = await metrics(session)
            return (figures["vllm:num_requests_running"], figures["vllm:num_requests_waiting"]) == (2, 3)

        await asyncio.wait_for(until(queued), 10)
        await post(session, "/abort_requests", {})
        replies = await asyncio.gather(*calls)
        assert {finish_reason for _, _, finish_reason in replies} == {"abort"}
        assert sum(not tokens for tokens, _, _ in replies) >= 3


async def test_new_weights_take_over_in_the_middle_of_a_response():
    seed = next(seed for seed in range(10_000) if 200 < len(reference_response(PROMPT, seed, 10_000)[0]) < 400)
    async with running(MockConfig(speed=Speed(step_ms=20, per_request_ms=0))) as (_, session):
        call = asyncio.create_task(post(session, GENERATE, generate_body(PROMPT, max_tokens=400, seed=seed)))
        await begun(session)
        reply = await post(session, "/update_weight_version", {"new_version": "v2"})
        assert reply == {"success": True, "new_version": "v2"}
        choice = (await call)["choices"][0]
        old, new = choice["weight_versions"]
        assert (old["version"], old["start"], new["version"]) == ("default", 0, "v2")
        kept = old["end"]
        assert new["start"] == kept
        first = reference_response(PROMPT, seed, 400)[0][:kept]
        after = LanguageModel(version="v2").respond(
            PROMPT + first, len(PROMPT), Sampling(seed=seed, max_tokens=400 - kept)
        )
        assert choice["token_ids"] == first + after.token_ids
        assert choice["finish_reason"] == after.finish_reason
        assert new["end"] == (await metrics(session))["vllm:generation_tokens_total"] == len(choice["token_ids"])
        assert await get(session, "/weight_info") == {"weight_version": "v2"}


async def test_pause_keep_freezes_and_resume_goes_on():
    async with running(SLOW) as (_, session):
        call = asyncio.create_task(generate(session, PROMPT, max_tokens=300, ignore_eos=True))

        await begun(session)
        await post(session, "/pause?mode=keep", {})
        assert await get(session, "/is_paused") == {"is_paused": True}
        late = asyncio.create_task(generate(session, PROMPT, max_tokens=5, request_id="late"))
        frozen = (await metrics(session))["vllm:generation_tokens_total"]
        await asyncio.sleep(0.4)
        assert (await metrics(session))["vllm:generation_tokens_total"] == frozen
        assert (await metrics(session))["vllm:num_requests_waiting"] == 1
        await post(session, "/resume", {})
        assert await call == reference_response(PROMPT, 7, 300, ignore_eos=True)
        assert await late == reference_response(PROMPT, 7, 5)
        assert await get(session, "/is_paused") == {"is_paused": False}


@pytest.mark.parametrize(("mode", "length", "ending"), [("wait", 300, "length"), ("abort", 4000, "abort")])
async def test_pause_waits_or_aborts(mode, length, ending):
    async with running(SLOW) as (_, session):
        call = asyncio.create_task(generate(session, PROMPT, max_tokens=length, ignore_eos=True))

        await begun(session)
        await post(session, f"/pause?mode={mode}", {})
        assert (await metrics(session))["vllm:num_requests_running"] == 0
        assert (await call)[2] == ending
        late = asyncio.create_task(generate(session, PROMPT, max_tokens=5, request_id="late"))
        await asyncio.sleep(0.2)
        assert not late.done()
        await post(session, "/resume", {})
        assert (await late)[2] == "length"
