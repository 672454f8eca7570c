"""The mock engine over HTTP: vLLM's wire, requests in flight, and the command that starts it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
from pathlib import Path

import aiohttp
import pytest
from tokenizers import Tokenizer

from seer_async.errors import ConfigError
from seer_servers.mock import KV, LanguageModel, MockConfig, Speed, reference_response
from tests.mock_http import (
    COMPLETIONS,
    GENERATE,
    PROMPT,
    completion_body,
    generate,
    generate_body,
    get,
    metrics,
    post,
    running,
)


@pytest.mark.parametrize("route", ["generate", "completions"])
async def test_chunks_over_two_engines_equal_the_reference(route):
    async with running() as (_, first), running() as (_, second):
        for seed in range(5):
            prompt = [*PROMPT, seed]
            tokens, logprobs, finish_reason = [], [], "length"
            while finish_reason == "length":
                session = (first, second)[len(tokens) // 48 % 2]
                options = {"prompt_len": len(prompt), "seed": seed, "max_tokens": 48}
                if route == "generate":
                    chunk = await generate(session, prompt + tokens, **options)
                else:
                    reply = await post(session, COMPLETIONS, completion_body(prompt + tokens, **options))
                    choice = reply["choices"][0]
                    chunk = choice["token_ids"], choice["logprobs"]["token_logprobs"], choice["finish_reason"]
                    assert choice["prompt_token_ids"] == prompt + tokens
                    assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in chunk[0]]
                    assert reply["usage"]["completion_tokens"] == len(chunk[0])
                tokens, logprobs, finish_reason = tokens + chunk[0], logprobs + chunk[1], chunk[2]
            assert (tokens, logprobs, finish_reason) == reference_response(prompt, seed, 10_000)


async def test_greedy_ignores_the_seed_and_no_seed_means_a_fresh_one():
    async with running() as (_, session):
        greedy = [await generate(session, PROMPT, seed=seed, temperature=0) for seed in (1, 2, None)]
        assert greedy == [reference_response(PROMPT, 99, 32, temperature=0)] * 3
        free = [await generate(session, PROMPT, seed=None) for _ in range(2)]
        assert free[0] != free[1]


async def test_a_response_ends_at_the_context_limit():
    config = MockConfig(speed=Speed(time_scale=0), max_model_len=20)
    async with running(config) as (_, session):
        tokens, _, finish_reason = await generate(session, PROMPT, max_tokens=100, ignore_eos=True)
        assert (len(tokens), finish_reason) == (15, "length")
        tokens, _, _ = await generate(session, PROMPT, max_tokens=None, ignore_eos=True)
        assert len(tokens) == 15


async def test_stop_token_is_named_and_stop_strings_are_left_to_the_orchestrator():
    tokens, _, _ = reference_response(PROMPT, 7, 32, ignore_eos=True)
    async with running() as (_, session):
        body = generate_body(PROMPT, stop_token_ids=[tokens[3]], stop=["w"], ignore_eos=True)
        choice = (await post(session, "/inference/v1/generate", body))["choices"][0]
        assert (choice["token_ids"], choice["finish_reason"], choice["stop_reason"]) == (tokens[:4], "stop", tokens[3])


async def test_top_logprobs_hold_the_sampled_token_first():
    async with running() as (_, session):
        reply = await post(session, "/inference/v1/generate", generate_body(PROMPT, logprobs=3))
        for entry in reply["choices"][0]["logprobs"]["content"]:
            assert len(entry["top_logprobs"]) == 3
            assert entry["top_logprobs"][0] == {"token_id": entry["token_id"], "logprob": entry["logprob"], "rank": 1}
            assert len({other["token_id"] for other in entry["top_logprobs"]}) == 3
        reply = await post(session, COMPLETIONS, completion_body(PROMPT, logprobs=3))
        assert {len(top) for top in reply["choices"][0]["logprobs"]["top_logprobs"]} == {4}


BAD_CALLS = {
    "unknown model": (GENERATE, {**generate_body(PROMPT), "model": "other"}, 404, "model"),
    "prompt too long": (GENERATE, generate_body([3] * 16_384), 400, None),
    "empty prompt": (GENERATE, {"token_ids": [], "sampling_params": {}}, 400, "token_ids"),
    "missing field": (GENERATE, {"sampling_params": {}}, 400, None),
    "wrong type": (GENERATE, {"token_ids": ["a"], "sampling_params": {}}, 400, "token_ids[0]"),
    "token out of vocabulary": (GENERATE, generate_body([32_000]), 400, None),
    "negative token": (GENERATE, generate_body([-1]), 400, None),
    "max_tokens 0": (GENERATE, generate_body(PROMPT, max_tokens=0), 400, "sampling_params.max_tokens"),
    "min above max": (GENERATE, generate_body(PROMPT, min_tokens=99), 400, "min_tokens"),
    "negative temperature": (GENERATE, generate_body(PROMPT, temperature=-1), 400, "sampling_params.temperature"),
    "several choices": (GENERATE, generate_body(PROMPT, n=2), 400, "n"),
    "stream": (GENERATE, {**generate_body(PROMPT), "stream": True}, 400, "stream"),
    "prompt longer than the tokens": (GENERATE, generate_body(PROMPT, prompt_len=9), 400, "seer_prompt_len"),
    "completions, wrong type": (COMPLETIONS, completion_body({"a": 1}), 400, "prompt"),
    "no route": ("/v1/chat/completions", {}, 404, None),
    "pause mode": ("/pause?mode=nap", {}, 400, "mode"),
    "version": ("/update_weight_version", {"new_version": 3}, 400, "new_version"),
    "fault": ("/mock/faults", {"active": {"gremlin": 1}}, 400, "active"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
async def test_errors_have_vllms_shape(case):
    path, body, status, param = BAD_CALLS[case]
    async with running() as (_, session):
        error = (await post(session, path, body, status))["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert (error["code"], error["param"]) == (status, param)
        assert error["message"]


BAD_UTF8 = b'{"model": "\xff", "request_ids": ["\xff"]}'


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"null", b"[1]", b'{"token_ids": [NaN]}', b"\xff\xfe", b'{"x":' + b"[" * 100_000, BAD_UTF8],
)
async def test_no_body_makes_the_server_fail(raw):
    async with running() as (_, session):
        for path in (GENERATE, COMPLETIONS, "/tokenize", "/abort_requests"):
            async with session.post(path, data=raw, headers={"Content-Type": "application/json"}) as response:
                assert response.status == 400
                assert (await response.json())["error"]["code"] == 400
        async with session.post(GENERATE, data=b"{}", headers={"Content-Type": "text/plain"}) as response:
            assert response.status == 400


async def test_the_descriptive_routes():
    async with running() as (server, session):
        async with session.get("/health") as response:
            assert (response.status, await response.read()) == (200, b"")
        assert await get(session, "/version") == {"version": "0.32.0"}
        card = (await get(session, "/v1/models"))["data"][0]
        assert (card["id"], card["root"], card["owned_by"], card["max_model_len"]) == ("mock", "mock", "vllm", 16_384)
        assert await get(session, "/weight_info") == {"weight_version": "default"}
        info = await get(session, "/v1/seer/info")
        assert info["boot_id"] == server.engine.boot_id
        assert info["capabilities"] == ["position_seeds", "continuation"]
        assert (info["block_size"], info["num_blocks"], info["max_num_seqs"]) == (16, 4096, 256)


async def test_metrics_count():
    async with running() as (_, session):
        before = await metrics(session)
        await generate(session, PROMPT * 10, ignore_eos=True)
        await generate(session, PROMPT * 10, ignore_eos=True, request_id="other")
        after = await metrics(session)
        assert after["vllm:generation_tokens_total"] - before["vllm:generation_tokens_total"] == 64
        assert after["vllm:prompt_tokens_total"] - before["vllm:prompt_tokens_total"] == 100
        assert after["vllm:prefix_cache_queries_total"] == 100
        assert after["vllm:prefix_cache_hits_total"] == 48  # three full blocks of the second call's 50 tokens
        assert after["vllm:num_requests_running"] == after["vllm:kv_cache_usage_perc"] == 0
        assert after["process_start_time_seconds"] == before["process_start_time_seconds"]
        async with session.get("/metrics") as response:
            assert (
                'vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="4096"} 1.0' in await response.text()
            )


async def test_the_tokenizer_served_is_the_tokenizer_used():
    async with running() as (_, session):
        async with session.get("/v1/seer/tokenizer") as response:
            tokenizer = Tokenizer.from_buffer(await response.read())
        assert tokenizer.get_vocab_size() == 32_000
        reply = await post(session, "/tokenize", {"model": "mock", "prompt": "Grüße, 世界"})
        assert reply["tokens"] == tokenizer.encode("Grüße, 世界").ids
        assert reply["count"] == len("Grüße, 世界".encode())
        chat = {"messages": [{"role": "user", "content": "Hi"}]}
        reply = await post(session, "/tokenize", chat)
        assert tokenizer.decode(reply["tokens"]) == "user: Hi\nassistant: "
        text = (await post(session, "/detokenize", {"tokens": reply["tokens"]}))["prompt"]
        assert text == "user: Hi\nassistant: "
        reply = await post(session, COMPLETIONS, completion_body("Hi", vllm_xargs=None, max_tokens=500))
        choice = reply["choices"][0]
        assert choice["prompt_token_ids"] == tokenizer.encode("Hi").ids
        assert choice["text"] == tokenizer.decode(choice["token_ids"])


async def test_the_key_guards_what_vllm_guards():
    async with running(api_key="secret") as (_, session):
        for path, status in {"/v1/models": 401, "/v1/seer/info": 401, "/health": 200, "/metrics": 200}.items():
            async with session.get(path) as response:
                assert response.status == status
        await post(session, GENERATE, generate_body(PROMPT), 401)
        for key, status in {"secret": 200, "wrong": 401, "": 401}.items():
            async with session.get("/v1/models", headers={"Authorization": f"Bearer {key}"}) as response:
                assert response.status == status


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: MockConfig(max_model_len=100_000),
        lambda: MockConfig(model=LanguageModel(vocab_size=100)),
        lambda: MockConfig(speed=Speed(time_scale=-1)),
        lambda: MockConfig(kv=KV(block_size=0)),
    ],
)
def test_a_config_that_makes_no_engine_is_refused(wrong):
    with pytest.raises(ConfigError, match="--"):
        wrong()


@contextlib.asynccontextmanager
async def command(*options):
    """`seer mock-engine` as a process, and its URL."""
    code = "import typer; from seer_cli.mock import mock_engine; typer.run(mock_engine)"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, "--port", "0", *options, stdout=asyncio.subprocess.PIPE
    )
    try:
        line = (await asyncio.wait_for(process.stdout.readline(), 60)).decode()
        yield process, re.fullmatch(r"mock engine ready at (http://\S+)\n", line)[1]
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 15) == 0


async def test_the_command_serves_until_it_is_told_to_stop():
    async with (
        command("--seed", "3", "--weight-version", "w1", "--time-scale", "0", "--fault", "error-503:0") as (_, url),
        aiohttp.ClientSession(url) as session,
    ):
        assert await get(session, "/weight_info") == {"weight_version": "w1"}
        assert (await get(session, "/mock/faults"))["active"] == {"error-503": 0.0}
        expected = reference_response(PROMPT, 7, 32, model=LanguageModel(seed=3, version="w1"))
        assert await generate(session, PROMPT) == expected


def cpu_seconds(pid):
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


async def measure_cpu_per_chunk(calls, concurrency):
    """Server CPU seconds per 64-token chunk on a prefix of 300 tokens, HTTP included."""
    async with command("--time-scale", "0") as (process, url), aiohttp.ClientSession(url) as session:

        async def client(first):
            for n in range(first, calls, concurrency):
                await generate(session, [3 + n, *range(400, 699)], seed=n, max_tokens=64, ignore_eos=True)

        await client(calls - 1)  # connections, caches
        before = cpu_seconds(process.pid)
        await asyncio.gather(*(client(n) for n in range(concurrency)))
        return (cpu_seconds(process.pid) - before) / calls


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="reads CPU time from Linux's /proc")
async def test_cpu_per_chunk(capsys):
    seconds = await measure_cpu_per_chunk(calls=1500, concurrency=50)
    with capsys.disabled():
        print(f"\nmock engine: {seconds * 1000:.2f} ms of CPU per 64-token chunk on {os.cpu_count()} cores")
    assert 0 < seconds < 0.01


@pytest.mark.vllm
async def test_replies_are_valid_for_vllms_own_classes():
    completion = pytest.importorskip("vllm.entrypoints.openai.completion.protocol")
    tokens = pytest.importorskip("vllm.entrypoints.scale_out.token_in_token_out.protocol")
    async with running() as (_, session):
        body = generate_body(PROMPT, logprobs=2)
        tokens.GenerateRequest.model_validate(body)
        reply = await post(session, GENERATE, body)
        parsed = tokens.GenerateTokensResponse.model_validate(reply)
        assert parsed.choices[0].logprobs.content[0].top_logprobs[1].rank == 2
        assert reply.keys() <= tokens.GenerateTokensResponse.model_fields.keys()
        assert reply["choices"][0].keys() <= tokens.GenerateTokensChoice.model_fields.keys()
        body = completion_body(PROMPT)
        completion.CompletionRequest.model_validate(body)
        reply = await post(session, COMPLETIONS, body)
        completion.CompletionResponse.model_validate(reply)
        assert reply.keys() <= completion.CompletionResponse.model_fields.keys()
        assert reply["choices"][0].keys() <= completion.CompletionResponseChoice.model_fields.keys()
