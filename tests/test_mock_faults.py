"""Each fault of the mock engine does what its description says, on both routes where it applies to both."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path

import aiohttp
import pytest

from seer_async.errors import ConfigError
from seer_servers.mock import LanguageModel, reference_response
from seer_servers.mock.faults import DESCRIPTIONS, parse_fault
from tests.mock_http import COMPLETIONS, GENERATE, PROMPT, completion_body, generate, generate_body, get, post, running


def tokens_and_logprobs(choice):
    logprobs = choice["logprobs"]
    if "content" in logprobs:
        return choice["token_ids"], [entry["logprob"] for entry in logprobs["content"]]
    return choice["token_ids"], logprobs["token_logprobs"]


def is_nan(choice, _honest):
    return all(math.isnan(logprob) for logprob in tokens_and_logprobs(choice)[1])


EDITED = {
    "wrong-types": lambda choice, _: isinstance(choice["token_ids"][0], str),
    "nan-logprobs": is_nan,
    "positive-logprob": lambda choice, _: tokens_and_logprobs(choice)[1][-1] > 0,
    "missing-logprobs": lambda choice, _: choice["logprobs"] is None,
    "token-out-of-range": lambda choice, _: choice["token_ids"][-1] == 32_000,
    "negative-token": lambda choice, _: choice["token_ids"][-1] == -1,
    "more-tokens": lambda choice, _: list(map(len, tokens_and_logprobs(choice))) == [33, 33],
    "fewer-tokens": lambda choice, _: list(map(len, tokens_and_logprobs(choice))) == [31, 32],
    "zero-tokens": lambda choice, _: tokens_and_logprobs(choice) == ([], []) and choice["finish_reason"] == "length",
    "wrong-finish-reason": lambda choice, _: choice["finish_reason"] == "finished",
    "stale-version": lambda choice, honest: choice["token_ids"] != honest["token_ids"],
}


@pytest.mark.parametrize("route", [GENERATE, COMPLETIONS])
@pytest.mark.parametrize("fault", EDITED)
async def test_edited_replies(fault, route):
    body = (generate_body if route == GENERATE else completion_body)(PROMPT, ignore_eos=True)
    async with running() as (_, session):
        honest = (await post(session, route, body))["choices"][0]
        assert not EDITED[fault](honest, honest)
        await post(session, "/mock/faults", {"active": {fault: 1}})
        faulty = (await post(session, route, body))["choices"][0]
        assert EDITED[fault](faulty, honest)
        assert (await get(session, "/mock/faults"))["fired"] == {fault: 1}
        await post(session, "/mock/faults", {"active": {}})
        assert (await post(session, route, body))["choices"][0] == honest


async def test_stale_weights_say_so():
    async with running(faults={"stale-version": 1}) as (_, session):
        choice = (await post(session, GENERATE, generate_body(PROMPT, ignore_eos=True)))["choices"][0]
        assert choice["weight_versions"] == [{"version": "stale", "start": 0, "end": 32}]
        stale = LanguageModel(version="stale")
        assert choice["token_ids"] == reference_response(PROMPT, 7, 32, ignore_eos=True, model=stale)[0]


@pytest.mark.parametrize("fault", ["duplicate-reply", "foreign-reply"])
async def test_repeated_replies(fault):
    async with running(faults={fault: 1}) as (_, session):
        first = await post(session, GENERATE, generate_body(PROMPT, request_id="1"))
        assert tuple(first["choices"][0]["token_ids"]) == tuple(reference_response(PROMPT, 7, 32)[0])
        second = await post(session, GENERATE, generate_body([*PROMPT, 9], request_id="2"))
        assert (second["choices"], second["usage"]) == (first["choices"], first["usage"])
        assert second["request_id"] == ("generate-tokens-2" if fault == "duplicate-reply" else "generate-tokens-1")


async def test_wrong_model():
    async with running(faults={"wrong-model": 1}) as (_, session):
        assert (await post(session, GENERATE, generate_body(PROMPT)))["model"] == "another-model"


ANSWERED = {
    "error-500": (500, {}, b"InternalServerError"),
    "error-503": (503, {}, b"ServiceUnavailableError"),
    "too-many-requests": (429, {"Retry-After": "1"}, b"TooManyRequests"),
    "redirect": (307, {"Location": "http://elsewhere.invalid/v1/completions"}, b""),
    "empty-reply": (200, {}, b""),
    "html-reply": (200, {"Content-Type": "text/html; charset=utf-8"}, b"<!doctype html>"),
}


@pytest.mark.parametrize("fault", ANSWERED)
async def test_answers_in_the_place_of_generation(fault):
    status, headers, content = ANSWERED[fault]
    async with (
        running(faults={fault: 1}) as (_, session),
        session.post(GENERATE, json=generate_body(PROMPT), allow_redirects=False) as response,
    ):
        assert response.status == status
        assert headers.items() <= dict(response.headers).items()
        body = await response.read()
        assert content in body
        assert bool(content) == bool(body)


async def test_truncated_json():
    async with running(faults={"truncated-json": 1}) as (_, session):
        async with session.post(GENERATE, json=generate_body(PROMPT)) as response:
            body = await response.read()
        assert body.startswith(b'{"request_id"')
        with pytest.raises(json.JSONDecodeError):
            json.loads(body)


async def test_reset_mid_body():
    async with running(faults={"reset-mid-body": 1}) as (_, session):
        with pytest.raises(aiohttp.ClientError):
            await post(session, GENERATE, generate_body(PROMPT))


@pytest.mark.parametrize("fault", ["hang", "slow-drip"])
async def test_answers_that_do_not_end(fault):
    async with running(faults={fault: 1}) as (_, session):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(post(session, GENERATE, generate_body(PROMPT)), 0.7)


async def test_a_slow_drip_does_begin():
    async with (
        running(faults={"slow-drip": 1}) as (_, session),
        session.post(GENERATE, json=generate_body(PROMPT)) as response,
    ):
        assert response.status == 200
        assert await response.content.readexactly(2) == b'{"'


async def test_latency_spike():
    async with running(faults={"latency-spike": 1}) as (_, session):
        began = asyncio.get_running_loop().time()
        assert await generate(session, PROMPT) == reference_response(PROMPT, 7, 32)
        assert asyncio.get_running_loop().time() - began > 1.9


async def test_gzip_bomb():
    async with running(faults={"gzip-bomb": 1}) as (_, session):
        async with session.post(GENERATE, json=generate_body(PROMPT)) as response:
            assert response.headers["Content-Encoding"] == "gzip"
            assert int(response.headers["Content-Length"]) < 2**21
            size = sum([len(part) async for part in response.content.iter_chunked(2**20)])
        assert size == 256 * 2**20


async def test_huge_body():
    async with running(faults={"huge-body": 1}) as (_, session):
        async with session.post(GENERATE, json=generate_body(PROMPT)) as response:
            assert int(response.headers["Content-Length"]) > 256 * 2**20
            size = sum([len(part) async for part in response.content.iter_chunked(2**20)])
        assert size == int(response.headers["Content-Length"])


def test_every_fault_has_a_test_and_a_description():
    source = Path(__file__).read_text(encoding="utf-8")
    assert len(DESCRIPTIONS) >= 24
    for name, description in DESCRIPTIONS.items():
        assert f'"{name}"' in source, name
        assert description.endswith(".")


async def test_a_fault_strikes_as_often_as_asked_and_the_same_calls_again():
    async def struck():
        async with running(faults={"error-500": 0.3}) as (_, session):
            statuses = []
            for n in range(200):
                async with session.post(GENERATE, json=generate_body([*PROMPT, n])) as response:
                    statuses.append(response.status)
            return statuses

    statuses = await struck()
    assert 30 < statuses.count(500) < 90
    assert statuses == await struck()


def test_fault_options():
    assert parse_fault("hang") == ("hang", 1.0)
    assert parse_fault("hang:0.25") == ("hang", 0.25)
    with pytest.raises(ConfigError, match="NAME:PROBABILITY"):
        parse_fault("hang:often")
