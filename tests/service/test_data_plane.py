"""Requests in, answers out: every token is the mock model's, every field where a trainer looks for it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from seer_servers.mock.tokenizer import byte_tokenizer
from tests.service.server import (
    CHAT,
    COMPLETIONS,
    GENERATE,
    MESSAGES,
    PROMPT,
    events,
    long_seed,
    post,
    reference,
    served,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.live.engines import MockProcess

TOKENIZER = byte_tokenizer(32_000)


def joined(parts: Iterable[list[Any]]) -> list[Any]:
    return [each for part in parts for each in part]


async def test_completions_are_prompt_major(engines: list[MockProcess]) -> None:
    prompts = [PROMPT, [5, 6, 7], PROMPT]
    async with served(engines) as (_, client):
        reply = await post(
            client, COMPLETIONS, model="mock", prompt=prompts, n=3, seed=11, max_tokens=90, logprobs=0,
            return_token_ids=True, return_tokens_as_token_ids=True,
        )  # fmt: skip
    assert [choice["index"] for choice in reply["choices"]] == list(range(9))
    generated = 0
    for number, choice in enumerate(reply["choices"]):
        prompt = prompts[number // 3]
        tokens, logprobs, reason = reference(prompt, 11 + number % 3, 90)
        generated += len(tokens)
        assert choice["prompt_token_ids"] == prompt
        assert choice["token_ids"] == tokens
        assert choice["finish_reason"] == reason
        assert choice["text"] == TOKENIZER.decode(tokens)
        assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in tokens]
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(logprobs)
        assert [list(top) for top in choice["logprobs"]["top_logprobs"]] == [[f"token_id:{t}"] for t in tokens]
    sizes = {"prompt_tokens": 13, "completion_tokens": generated, "total_tokens": 13 + generated}
    assert sizes.items() <= reply["usage"].items()
    assert reply["object"] == "text_completion" and reply["id"].startswith("cmpl-")


async def test_the_forms_of_logprobs(engines: list[MockProcess]) -> None:
    """Of two asked for, completions give the sampled token and two more, chat and generate two in all."""
    seed = long_seed(PROMPT, 5)
    tokens, _, _ = reference(PROMPT, seed, 4)
    asked = {"model": "mock", "seed": seed, "max_tokens": 4}
    async with served(engines) as (_, client):
        words = await post(client, COMPLETIONS, prompt=PROMPT, logprobs=2, **asked)
        params = {"seed": seed, "max_tokens": 4, "logprobs": 2}
        generate = await post(client, GENERATE, token_ids=PROMPT, model="mock", sampling_params=params)
        chat = await post(client, CHAT, messages=MESSAGES, logprobs=True, top_logprobs=2, **asked)
        by_id = await post(
            client, CHAT, messages=MESSAGES, logprobs=True, top_logprobs=2, return_tokens_as_token_ids=True,
            return_token_ids=True, **asked,
        )  # fmt: skip
    logprobs = words["choices"][0]["logprobs"]
    named = [TOKENIZER.decode([token]) for token in tokens]
    assert logprobs["tokens"] == named
    assert logprobs["text_offset"] == [sum(map(len, named[:number])) for number in range(4)]
    assert [next(iter(top)) for top in logprobs["top_logprobs"]] == named
    assert {len(top) for top in logprobs["top_logprobs"]} == {2}  # the mock's sampled token is its most likely one
    content = generate["choices"][0]["logprobs"]["content"]
    assert [position["token_id"] for position in content] == tokens
    assert [position["top_logprobs"][0]["token_id"] for position in content] == tokens
    assert {len(position["top_logprobs"]) for position in content} == {2}
    content, ids = chat["choices"][0]["logprobs"]["content"], by_id["choices"][0]["logprobs"]["content"]
    assert {len(position["top_logprobs"]) for position in content} == {2}
    assert [position["top_logprobs"][0]["token"] for position in content] == [each["token"] for each in content]
    assert [position["token"] for position in ids] == [f"token_id:{t}" for t in by_id["choices"][0]["token_ids"]]
    assert [position["bytes"] for position in ids] == [position["bytes"] for position in content]


async def test_chat(engines: list[MockProcess]) -> None:
    async with served(engines) as (_, client):
        reply = await post(
            client, CHAT, model="mock", messages=MESSAGES, n=2, seed=5, max_tokens=70, return_token_ids=True
        )
    prompt = TOKENIZER.encode("user: Say it\nassistant: ").ids
    assert reply["prompt_token_ids"] == prompt
    assert reply["usage"]["prompt_tokens"] == len(prompt)
    for number, choice in enumerate(reply["choices"]):
        tokens, _, reason = reference(prompt, 5 + number, 70)
        assert choice["token_ids"] == tokens
        assert choice["message"]["content"] == TOKENIZER.decode(tokens)
        assert (choice["message"]["role"], choice["finish_reason"]) == ("assistant", reason)


async def test_limits_of_vllm_where_none_is_given(engines: list[MockProcess]) -> None:
    """16 tokens for a completion, for the others what the context has left; and 16 is a limit like any other."""
    async with served(engines) as (service, client):
        prompt = PROMPT * (service.info.max_model_len // len(PROMPT) - 5)
        left = service.info.max_model_len - len(prompt)
        words = [{"role": "user", "content": "a" * (service.info.max_model_len - 60)}]
        for path, body, limits, expected in [
            (COMPLETIONS, {"prompt": prompt}, {}, 16),
            (COMPLETIONS, {"prompt": prompt}, {"max_tokens": 16}, 16),
            (COMPLETIONS, {"prompt": prompt}, {"max_tokens": 17}, 17),
            (CHAT, {"messages": MESSAGES}, {"max_completion_tokens": 16}, 16),
            (CHAT, {"messages": words}, {}, None),
            (GENERATE, {"token_ids": prompt}, {"max_tokens": 16}, 16),
            (GENERATE, {"token_ids": prompt}, {}, left),
        ]:
            options = {"ignore_eos": True} | limits
            asked = body | ({"sampling_params": options} if path == GENERATE else options)
            usage = (await post(client, path, **asked))["usage"]
            assert usage["completion_tokens"] == (expected or service.info.max_model_len - usage["prompt_tokens"]), path


async def test_generate_names_the_weights(engines: list[MockProcess]) -> None:
    params = {"n": 2, "seed": 8, "max_tokens": 100, "logprobs": 1, "temperature": 1.0}
    async with served(engines) as (_, client):
        reply = await post(client, GENERATE, token_ids=PROMPT, sampling_params=params, request_id="mine")
    assert reply["request_id"] == "generate-tokens-mine"
    for number, choice in enumerate(reply["choices"]):
        tokens, logprobs, reason = reference(PROMPT, 8 + number, 100)
        assert (choice["token_ids"], choice["finish_reason"]) == (tokens, reason)
        assert [position["logprob"] for position in choice["logprobs"]["content"]] == pytest.approx(logprobs)
        assert choice["weight_versions"] == [{"version": "default", "start": 0, "end": len(tokens)}]


async def test_stop_strings(engines: list[MockProcess]) -> None:
    """A stop string that two chunks share ends the text before it, in every form, and never shows in a stream."""
    async with served(engines) as (_, client):
        chat_prompt = TOKENIZER.encode("user: Say it\nassistant: ").ids
        tokens, _, _ = reference(PROMPT, seed := long_seed(PROMPT, 22), 60)
        text = TOKENIZER.decode(tokens)
        stop = TOKENIZER.decode(tokens[14:18])[1:-1]  # across the border at 16, ending within a word
        asked = {"model": "mock", "seed": seed, "max_tokens": 60, "stop": [stop], "return_token_ids": True}
        whole = (await post(client, COMPLETIONS, prompt=PROMPT, **asked))["choices"][0]
        assert whole["text"] == text[: text.index(stop)]
        assert (whole["finish_reason"], whole["stop_reason"]) == ("stop", stop)
        assert whole["token_ids"] == tokens[:18]
        pieces = await events(client, COMPLETIONS, prompt=PROMPT, **asked)
        assert len(pieces) > 1
        assert "".join(event["choices"][0]["text"] for event in pieces) == whole["text"]
        assert joined(event["choices"][0]["token_ids"] for event in pieces) == tokens[:18]

        ids, _, _ = reference(chat_prompt, seed := long_seed(chat_prompt, 22), 60)
        asked["seed"] = seed
        stop = TOKENIZER.decode(ids[14:18])[1:-1]
        asked["stop"] = stop
        chat = (await post(client, CHAT, messages=MESSAGES, **asked))["choices"][0]
        full = TOKENIZER.decode(ids)
        assert chat["message"]["content"] == full[: full.index(stop)]
        assert chat["stop_reason"] == stop
        pieces = [event["choices"][0] for event in await events(client, CHAT, messages=MESSAGES, **asked)]
        assert len(pieces) > 2
        assert "".join(piece["delta"].get("content", "") for piece in pieces) == chat["message"]["content"]
        assert joined(piece.get("token_ids") or [] for piece in pieces) == chat["token_ids"]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, GENERATE])
async def test_a_stream_is_the_answer(engines: list[MockProcess], path: str) -> None:
    sampling = {"n": 3, "seed": 21, "max_tokens": 50, "logprobs": 1}
    body = {
        COMPLETIONS: sampling | {"prompt": [PROMPT], "return_token_ids": True},
        CHAT: sampling | {"messages": MESSAGES, "return_token_ids": True, "logprobs": True, "top_logprobs": 1},
        GENERATE: {"token_ids": PROMPT, "sampling_params": sampling},
    }[path]
    async with served(engines) as (_, client):
        whole = await post(client, path, **body)
        said = await events(client, path, **body, stream_options={"include_usage": True})
    assert said[-1]["choices"] == []
    counted = [[answer["usage"][f"{kind}_tokens"] for kind in ("prompt", "completion")] for answer in (said[-1], whole)]
    assert counted[0] == counted[1]
    for choice in whole["choices"]:
        pieces = [c for event in said for c in event["choices"] if c["index"] == choice["index"]]
        assert joined(piece.get("token_ids") or [] for piece in pieces) == choice["token_ids"]
        assert [p["finish_reason"] for p in pieces if p["finish_reason"]] == [choice["finish_reason"]]
        logprobs = [piece["logprobs"] for piece in pieces if piece["logprobs"]]
        for name, values in choice["logprobs"].items():
            assert joined(part[name] for part in logprobs) == values, name
        if path == GENERATE:
            assert pieces[-1]["weight_versions"] == choice["weight_versions"]
        if path == CHAT:
            assert pieces[0]["delta"] == {"role": "assistant", "content": ""}


async def test_the_words_of_many_responses(engines: list[MockProcess]) -> None:
    """More than engines are asked about in one call, some of them of the end token alone."""
    async with served(engines) as (_, client):
        reply = await post(client, COMPLETIONS, prompt=PROMPT, n=150, max_tokens=4, logprobs=0, return_token_ids=True)
    for choice in reply["choices"]:
        words = [TOKENIZER.decode([token], skip_special_tokens=False) for token in choice["token_ids"]]
        assert choice["logprobs"]["tokens"] == words


async def test_what_makes_a_group(engines: list[MockProcess]) -> None:
    async def ask(prompt: list[int], **headers: str) -> None:
        params = {"max_tokens": 600, "ignore_eos": True}
        reply = await client.post(GENERATE, json={"token_ids": prompt, "sampling_params": params}, headers=headers)
        assert reply.status_code == 200

    async with served(engines) as (service, client):
        other = {"X-Seer-Group": "b", "X-Seer-Group-Size": "2", "X-Session-ID": "s"}
        asks = [ask(PROMPT), ask(PROMPT), ask(PROMPT, **other), ask(PROMPT, **other), ask([9, 9])]
        tasks = [asyncio.create_task(each) for each in asks]
        async with asyncio.timeout(60):
            while service.core.buffer.open < 5:
                await asyncio.sleep(0.005)
        assert sorted(len(group.requests) for group in service.core.buffer.groups.values()) == [1, 2, 2]
        await asyncio.gather(*tasks)
        assert (await client.post("/finish_session", json={"session_id": "s"})).status_code == 200


async def test_what_does_not_survive_a_border_is_one_call(engines: list[MockProcess]) -> None:
    samples = []
    async with served(engines) as (service, client):
        emit = service._desk.emit
        service._desk.emit = lambda sample: (samples.append(sample), emit(sample))  # type: ignore[method-assign]
        asked = {"prompt": PROMPT, "max_tokens": 60, "ignore_eos": True}
        await post(client, COMPLETIONS, **asked)
        await post(client, COMPLETIONS, **asked, structured_outputs={"regex": "a+"})
    cut, whole = (len(sample.chunks) for sample in samples)
    assert cut >= 4
    assert whole == 1


async def test_names_are_echoed(engines: list[MockProcess]) -> None:
    async with served(engines) as (_, client):
        for stream in (False, True):
            reply = await client.post(
                COMPLETIONS,
                json={"prompt": "x", "max_tokens": 2, "stream": stream},
                headers={"X-Request-Id": "abc"},
            )
            assert reply.headers["X-Request-Id"] == "abc"
            assert '"cmpl-abc"' in reply.text


async def test_an_engine_is_asked_the_very_same_question(engines: list[MockProcess]) -> None:
    async with served(engines) as (_, client), httpx.AsyncClient(base_url=engines[0].url) as engine:
        rendered = [
            await post(each, "/v1/completions/render", model="mock", prompt=PROMPT) for each in (client, engine)
        ]
    for each in rendered:
        each[0].pop("request_id")
    assert rendered[0] == rendered[1]


async def test_clients_abort_requests_by_the_names_that_they_know(engines: list[MockProcess]) -> None:
    sampling = {"max_tokens": 10_000, "ignore_eos": True}
    async with served(engines) as (service, client):

        async def ask(path: str, name: str, **body: Any) -> tuple[str, list[str]]:
            reply = (await client.post(path, json=body, headers={"X-Request-Id": name})).json()
            return reply.get("id") or reply["request_id"], [choice["finish_reason"] for choice in reply["choices"]]

        tasks = [
            asyncio.create_task(each)
            for each in (
                ask(COMPLETIONS, "a", prompt=[PROMPT, PROMPT], n=2, **sampling),
                ask(CHAT, "a-b", messages=MESSAGES, **sampling),
                ask(GENERATE, "c", token_ids=PROMPT, sampling_params=sampling),
                ask(GENERATE, "d", token_ids=PROMPT, sampling_params=sampling | {"max_tokens": 2000}),
            )
        ]
        async with asyncio.timeout(60):
            while service.core.buffer.open < 7:
                await asyncio.sleep(0.01)
        for names, count in ((["cmpl-a-1"], 2), (["chatcmpl-a-b", "c", "unknown"], 2), (["a"], 2)):
            assert (await post(client, "/abort_requests", request_ids=names))["aborted"] == count
        assert await asyncio.gather(*tasks) == [
            ("cmpl-a", ["abort"] * 4),
            ("chatcmpl-a-b", ["abort"]),
            ("generate-tokens-c", ["abort"]),
            ("generate-tokens-d", ["length"]),
        ]
