"""LoRA adapters by the name of their model: whose tokens a response has, and that nothing of two is mixed."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from seer_servers.mock import reference_response
from tests.live.engines import mock_engines
from tests.service.server import CHAT, COMPLETIONS, GENERATE, MESSAGES, MODEL, PROMPT, SPEED, events, post, served

if TYPE_CHECKING:
    import httpx

    from tests.live.engines import MockProcess

SLOWER = ["--step-ms", "40", "--per-request-ms", "0.01", "--mean-length", "60"]
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
MOST = 60


def expected(path: str, seed: int = 3, **options: Any) -> list[int]:
    """Tokens of the model with the adapter from `path`."""
    return reference_response(PROMPT, seed, MOST, model=MODEL.adapted(path), **options)[0]


def asked(model: str, **options: Any) -> dict[str, Any]:
    return {"model": model, "prompt": PROMPT, "seed": 3, "max_tokens": MOST, "return_token_ids": True} | options


async def load(client: httpx.AsyncClient, path: str, name: str = "tiny", **options: Any) -> None:
    reply = await client.post(LOAD, json={"lora_name": name, "lora_path": path} | options)
    assert reply.status_code == 200, reply.text


async def test_a_request_is_sampled_with_the_adapter_that_it_names(engines: list[MockProcess]) -> None:
    params = {"seed": 3, "max_tokens": MOST}
    async with served(engines) as (_, client):
        await load(client, "/one")
        await load(client, "/two", "other")
        assert [card["id"] for card in (await client.get("/v1/models")).json()["data"]] == ["mock", "tiny", "other"]
        for model, path in (("tiny", "/one"), ("other", "/two"), ("mock", "")):
            tokens = expected(path)
            whole = await post(client, COMPLETIONS, **asked(model))
            assert (whole["model"], whole["choices"][0]["token_ids"]) == (model, tokens)
            pieces = await events(client, COMPLETIONS, **asked(model))
            assert [piece["model"] for piece in pieces] == [model] * len(pieces)
            assert [token for piece in pieces for token in piece["choices"][0]["token_ids"]] == tokens
            bare = await post(client, GENERATE, model=model, token_ids=PROMPT, sampling_params=params)
            assert (bare["model"], bare["choices"][0]["token_ids"]) == (model, tokens)
            chat = await post(client, CHAT, model=model, messages=MESSAGES, return_token_ids=True, **params)
            prompt, ids = chat["prompt_token_ids"], chat["choices"][0]["token_ids"]
            assert (chat["model"], ids) == (model, reference_response(prompt, 3, MOST, model=MODEL.adapted(path))[0])
            rollout = {"model": model, "prompts": [{"prompt_token_ids": PROMPT}], "n": 2, "stream": True}
            reply = await client.post("/v1/rollouts", json=rollout | {"sampling": {"max_tokens": MOST}})
            for sample in reply.text.splitlines():
                line = msgspec.json.decode(sample)
                assert line["token_ids"] == expected(path, line["seed"])
    for name in ("tiny", "other"):
        async with served(engines) as (_, client):
            await client.post(UNLOAD, json={"lora_name": name})


async def test_an_unknown_model_is_not_found(engines: list[MockProcess]) -> None:
    async with served(engines) as (service, client):
        bodies: list[tuple[str, dict[str, Any]]] = [
            (COMPLETIONS, {"prompt": "x"}),
            (CHAT, {"messages": MESSAGES}),
            (GENERATE, {"token_ids": [5], "sampling_params": {}}),
            ("/v1/rollouts", {"prompts": [{"prompt": "x"}]}),
        ]
        for path, body in bodies:
            error = (await post(client, path, 404, model="tiny", **body))["error"]
            assert error == {
                "message": "The model `tiny` does not exist. Valid aliases: mock.",
                "type": "NotFoundError",
                "param": "model",
                "code": 404,
            }
        assert service.core.buffer.total == 0
        service._info = msgspec.structs.replace(service.info, aliases=("alias",))
        reply = await post(client, GENERATE, model="alias", token_ids=[5], sampling_params={"max_tokens": 1})
        assert reply["model"] == "mock"


async def test_adapters_do_not_share_a_group(engines: list[MockProcess]) -> None:
    async with served(engines) as (service, client):
        await load(client, "/one")
        dispatched = []
        dispatch = service._shell._dispatch
        service._shell._dispatch = lambda call, now: (dispatched.append(call), dispatch(call, now))  # type: ignore[method-assign]
        paths = {"mock": "", "tiny": "/one"}
        asks = [post(client, COMPLETIONS, **asked(model, ignore_eos=True)) for model in (*paths, *paths)]
        for model, reply in zip((*paths, *paths), await asyncio.gather(*asks), strict=True):
            assert reply["choices"][0]["token_ids"] == expected(paths[model], ignore_eos=True)
        kinds = {(call.request.partition("/")[0], call.model, call.salt) for call in dispatched}
        assert sorted(kind[1:] for kind in kinds) == [("", ""), ("tiny", "@tiny#0")], "two groups of two"
        await client.post(UNLOAD, json={"lora_name": "tiny"})


async def test_an_adapter_that_is_replaced_mixes_nothing() -> None:
    """Also with a plain request under way, which goes on with the tokens that it has."""
    with mock_engines(SLOWER, SLOWER) as engines:
        async with served(engines) as (service, client):
            await load(client, "/old")
            options = {"ignore_eos": True}
            tasks = [
                asyncio.create_task(post(client, COMPLETIONS, **asked(model, **options))) for model in ("tiny", "mock")
            ]
            while sum(request.generated > 0 for request in service.core.buffer.unfinished()) < 2:
                await asyncio.sleep(0.01)
            assert (await post(client, LOAD, 400, lora_name="tiny", lora_path="/new"))["error"]["code"] == 400
            await load(client, "/new", load_inplace=True)
            tiny, plain = [task["choices"][0]["token_ids"] for task in await asyncio.gather(*tasks)]
            assert tiny == expected("/new", **options) != expected("/old", **options)
            assert plain == expected("", **options)
            assert service.core.responses.restarts == 1
            assert service.paused is None


async def test_an_adapter_that_is_unloaded_ends_what_is_open_with_it() -> None:
    with mock_engines(SLOWER, SLOWER) as engines:
        async with served(engines) as (service, client):
            await load(client, "/one")
            task = asyncio.create_task(client.post(COMPLETIONS, json=asked("tiny", ignore_eos=True)))
            while service.core.responses.tokens < 16:
                await asyncio.sleep(0.01)
            assert (await client.post(UNLOAD, json={"lora_name": "tiny"})).status_code == 200
            reply = await task
            assert (reply.status_code, reply.json()["error"]["param"]) == (404, "model")
            await post(client, COMPLETIONS, 404, **asked("tiny"))


@pytest.mark.parametrize("inplace", [False, True])
async def test_an_engine_that_cannot_load_it_gets_nothing(inplace: bool) -> None:
    """Whether it lacks the adapter or has the one before: it is brought to it when it can be."""
    with mock_engines(SPEED, SPEED) as engines:
        async with served(engines) as (service, client):
            if inplace:
                await load(client, "/old")
            await client.post(f"{engines[1].url}/mock/refuse", json={"path": LOAD, "times": 2})
            body = {"lora_name": "tiny", "lora_path": "/new", "load_inplace": inplace}
            reply = await client.post(LOAD, json=body)
            assert reply.status_code == 502
            assert "engine-1" in reply.json()["error"]["message"]
            workers = (await client.get("/workers")).json()["workers"]
            assert [worker["state"] for worker in workers] == ["UP", "STALE"]
            for seed in range(6):
                said = await post(client, COMPLETIONS, **asked("tiny", seed=seed))
                assert said["choices"][0]["token_ids"] == expected("/new", seed)
            async with asyncio.timeout(60):
                while (await client.get("/workers/engine-1")).json()["state"] != "UP":
                    await asyncio.sleep(0.1)
            assert service.objection("engine-1", service.client("engine-1").info) is None  # type: ignore[arg-type]
