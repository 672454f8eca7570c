"""Clients as they are: the `openai` package, and whatever schemathesis thinks of."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import jsonschema_rs
import msgspec
import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from openai import AsyncOpenAI
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.service.server import MESSAGES, PROMPT, reference, served

if TYPE_CHECKING:
    from tests.live.engines import MockProcess

EXAMPLES = 12  # of each operation
DESCRIBED = (status_code_conformance, content_type_conformance, response_schema_conformance)


async def test_openai(engines: list[MockProcess]) -> None:
    async with served(engines) as (_, http):
        client = AsyncOpenAI(base_url=f"{http.base_url}/v1", api_key="none", max_retries=0)
        assert [model.id async for model in await client.models.list()] == ["mock"]

        extra = {"return_token_ids": True}
        whole = await client.completions.create(
            model="mock", prompt=[PROMPT, [5, 6, 7]], n=2, seed=1, max_tokens=30, logprobs=1, extra_body=extra
        )
        assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
        for number, choice in enumerate(whole.choices):
            tokens, _, _ = reference([PROMPT, [5, 6, 7]][number // 2], 1 + number % 2, 30)
            assert choice.model_extra and choice.model_extra["token_ids"] == tokens
            assert choice.logprobs and choice.logprobs.token_logprobs
            assert len(choice.logprobs.token_logprobs) == len(tokens)

        chat = await client.chat.completions.create(
            model="mock", messages=MESSAGES, n=2, seed=1, max_tokens=30, logprobs=True, top_logprobs=2
        )
        texts = [choice.message.content for choice in chat.choices]
        assert all(choice.logprobs and choice.logprobs.content for choice in chat.choices)
        stream = await client.chat.completions.create(
            model="mock", messages=MESSAGES, n=2, seed=1, max_tokens=30, stream=True,
            stream_options={"include_usage": True},
        )  # fmt: skip
        streamed, usage = ["", ""], None
        async for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                streamed[choice.index] += choice.delta.content or ""
        assert streamed == texts
        assert usage == chat.usage

        pieces = await client.completions.create(model="mock", prompt=PROMPT, seed=1, max_tokens=30, stream=True)
        assert "".join([chunk.choices[0].text async for chunk in pieces]) == whole.choices[0].text

        with pytest.raises(openai.BadRequestError, match="echo"):
            await client.completions.create(model="mock", prompt="x", echo=True)
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            await client.chat.completions.create(model="other", messages=MESSAGES)


async def test_no_request_breaks_it(engines: list[MockProcess]) -> None:
    """Generated from the OpenAPI document, right and wrong: never a 5xx, and the answer is one that it describes."""
    async with served(engines) as (service, http):
        schema = await asyncio.to_thread(schemathesis.openapi.from_url, f"{http.base_url}/openapi.json")
        seen: list[int] = []

        def check() -> None:
            for result in schema.get_all_operations():
                operation = result.ok()

                @settings(
                    max_examples=EXAMPLES,
                    deadline=None,
                    database=None,
                    phases=[Phase.generate],
                    derandomize=True,
                    suppress_health_check=list(HealthCheck),
                )
                @given(operation.as_strategy(GenerationMode.POSITIVE) | operation.as_strategy(GenerationMode.NEGATIVE))
                def one(case: schemathesis.Case) -> None:
                    response = case.call(base_url=str(http.base_url), timeout=60)
                    seen.append(response.status_code)
                    assert response.status_code < 500, (case.method, case.path, case.body, response.text)
                    case.validate_response(response, checks=[*DESCRIBED])

                one()

        await asyncio.to_thread(check)
        assert len(seen) > 50 and {200, 400, 404} <= set(seen)
        async with asyncio.timeout(60):  # a job that was just cancelled waits for what its engines have sampled
            while service.core.buffer.open:
                await asyncio.sleep(0.05)


async def test_the_streams_of_rollouts_are_described(engines: list[MockProcess]) -> None:
    """What the document says of a line or an event holds for those that are sent."""
    async with served(engines) as (_, http):
        document = (await http.get("/openapi.json")).json()
        begin, read = document["paths"]["/v1/rollouts"]["post"], document["paths"]["/v1/rollouts/{id}/samples"]["get"]
        assert list(begin["requestBody"]["content"]) == ["application/json", "application/x-ndjson"]
        assert {status: list(answer["content"]) for status, answer in begin["responses"].items()} == {
            "200": ["application/x-ndjson"],
            "202": ["application/json"],
            "4XX": ["application/json"],
            "5XX": ["application/json"],
        }

        def right(answer: dict[str, Any], media: str) -> jsonschema_rs.Validator:
            schema = answer["content"][media]["schema"]
            return jsonschema_rs.validator_for(schema | {"components": document["components"]})

        asked = {"prompts": [{"prompt_token_ids": PROMPT}], "n": 3, "sampling": {"max_tokens": 20, "logprobs": 2}}
        begun = await http.post("/v1/rollouts", json=asked)
        assert begun.status_code == 202
        assert right(begin["responses"]["202"], "application/json").is_valid(begun.json())
        streamed = await http.post("/v1/rollouts", json=asked | {"stream": True})
        lines = [msgspec.json.decode(line) for line in streamed.text.splitlines() if line]
        assert len(lines) == 3 and all(map(right(begin["responses"]["200"], "application/x-ndjson").is_valid, lines))
        for by, count in (("sample", 4), ("group", 2)):
            events = await http.get(
                begun.headers["Location"] + "/samples", params={"by": by}, headers={"Accept": "text/event-stream"}
            )
            said = [msgspec.json.decode(line[6:]) for line in events.text.splitlines() if line.startswith("data: ")]
            valid = right(read["responses"]["200"], "text/event-stream").is_valid
            assert len(said) == count and all(map(valid, said)) and not valid({})
