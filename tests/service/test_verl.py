"""verl's server seam over `seer serve`: what its clients and replicas call, with abort and resume."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from seer_async.errors import SeerError
from seer_servers.mock import LanguageModel, reference_response
from seer_servers.trainers.verl import Router, Server
from tests.service.server import MODEL, PROMPT, reference, served

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from seer_async.service import Service
    from seer_servers.trainers.verl import TokenOutput
    from tests.live.engines import MockProcess

MOST = 2000
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "repetition_penalty": 1.0, "logprobs": True, "seed": 3}
"""As verl's agent loops make them of its config, and a seed."""
LONG = SAMPLING | {"ignore_eos": True, "max_tokens": MOST}


@asynccontextmanager
async def seamed(engines: list[MockProcess]) -> AsyncIterator[tuple[Service, Server]]:
    async with served(engines) as (service, http):
        yield service, Server(str(http.base_url), response_length=60, prompt_length=20)


async def under_way(service: Service) -> None:
    while service.core.responses.tokens < 64:
        await asyncio.sleep(0.01)


async def resumed(server: Server, prompt: list[int], sampling: dict[str, Any]) -> tuple[list[TokenOutput], list[int]]:
    """As verl's client for partial rollouts: what was aborted goes on, with its tokens behind the prompt."""
    outputs, tokens = [], list[int]()
    while True:
        left = sampling | {"max_tokens": sampling["max_tokens"] - len(tokens)}
        outputs.append(await server.generate(prompt + tokens, left, f"turn-{len(outputs)}"))
        tokens += outputs[-1].token_ids
        if outputs[-1].stop_reason != "aborted" or len(tokens) >= sampling["max_tokens"]:
            return outputs, tokens


async def test_generate(engines: list[MockProcess]) -> None:
    async with seamed(engines) as (_, server):
        asked = dict(SAMPLING)
        output = await server.generate(PROMPT, asked, "r")
        assert asked == SAMPLING, "the caller's parameters are its own"
        tokens, logprobs, _ = reference(PROMPT, 3, 60)
        assert output.token_ids == tokens
        assert output.log_probs == pytest.approx(logprobs)
        assert output.stop_reason == "completed"
        assert output.extra_fields["global_steps"] is None
        bare = await server.generate(
            PROMPT, LONG | {"logprobs": False, "max_tokens": None} | {"max_new_tokens": 7}, "r"
        )
        assert bare.log_probs is None
        full = await server.generate([5] * 30, SAMPLING | {"ignore_eos": True}, "r")
        assert len(full.token_ids) == 50, "what the config leaves of prompt and response length"
        with pytest.raises(SeerError, match="images"):
            await server.generate(PROMPT, SAMPLING, "r", image_data=["x"])
        with pytest.raises(SeerError, match="vocabulary"):
            await server.generate([10**6], SAMPLING, "r")


async def test_abort_and_resume(engines: list[MockProcess]) -> None:
    """A partial rollout: aborted in the middle, held while paused, gone on with after the resume."""
    async with seamed(engines) as (service, server):
        task = asyncio.create_task(resumed(server, PROMPT, LONG))
        await under_way(service)
        await server.abort_all_requests()
        await asyncio.sleep(0.2)
        assert not task.done(), "the rest waits for the resume"
        await server.resume_generation()
        async with asyncio.timeout(120):
            outputs, tokens = await task
        first, second = outputs
        assert (first.stop_reason, second.stop_reason) == ("aborted", "completed")
        whole, logprobs, _ = reference_response(PROMPT, 3, MOST, model=MODEL, ignore_eos=True)
        begun = len(first.token_ids)
        assert 16 < begun < MOST and first.token_ids == whole[:begun]
        assert first.log_probs == pytest.approx(logprobs[:begun])
        rest, _, _ = reference_response(PROMPT + first.token_ids, 3, MOST - begun, model=MODEL, ignore_eos=True)
        assert second.token_ids == rest and len(tokens) == MOST
        assert not service.core.buffer.open


async def test_a_server_that_leaves_rejects(engines: list[MockProcess]) -> None:
    async with seamed(engines) as (_, server):
        await server.abort_all_requests(reject_request=True)
        output = await server.generate(PROMPT, SAMPLING, "r")
        assert (output.token_ids, output.stop_reason) == ([], "aborted")
        await server.resume_generation()
        assert (await server.generate(PROMPT, SAMPLING, "r")).stop_reason == "completed"


async def test_one_request_is_aborted(engines: list[MockProcess]) -> None:
    async with seamed(engines) as (service, server):
        one, other = (asyncio.create_task(server.generate(PROMPT, LONG, name)) for name in ("one", "other"))
        await under_way(service)
        assert await server.abort_request("one") == {"aborted": True, "request_id": "one"}
        assert await server.abort_request("nobody") == {"aborted": False, "request_id": "nobody"}
        assert (await one).stop_reason == "aborted"
        assert (await other).stop_reason == "completed"


async def test_weights(engines: list[MockProcess]) -> None:
    """Between abort and resume the engines get new weights; no response mixes two steps."""
    async with seamed(engines) as (service, server):
        await server.set_global_steps(1)
        task = asyncio.create_task(resumed(server, PROMPT, LONG))
        await under_way(service)
        await server.abort_all_requests()
        await server.clear_kv_cache()
        await server.sleep()
        await server.wake_up(["weights"])
        await server.wake_up(["kv_cache"])
        await server.set_global_steps(2)
        await server.resume_generation()
        async with asyncio.timeout(120):
            (first, second), _ = await task
        assert service.core.versions.current == "step-2"
        assert first.extra_fields == {"global_steps": 1, "min_global_steps": 1, "max_global_steps": 1}
        assert second.extra_fields == {"global_steps": 2, "min_global_steps": 2, "max_global_steps": 2}
        prompt, left = PROMPT + first.token_ids, MOST - len(first.token_ids)
        new = LanguageModel(mean_length=60.0, version="step-2")
        assert second.token_ids == reference_response(prompt, 3, left, model=new, ignore_eos=True)[0]


def test_the_router_names_one_server() -> None:
    router = Router({"10.0.0.1:1": "a", "10.0.0.2:2": "b"}, {"seer_url": "http://x"}, server="seer's actor")
    assert router.require_acquire_fields() == router.require_release_fields() == []
    assert {router.acquire_server(f"r{number}") for number in range(3)} == {("seer", "seer's actor")}
    router.release_server("seer", request_id="r0")
    assert router.get_total_inflight() == 2 == router.get_status()["total_inflight"]
    router.add_servers({"10.0.0.3:3": "c"})
    router.remove_servers(["10.0.0.1:1"])
    assert router.get_all_servers() == ["10.0.0.2:2", "10.0.0.3:3"]
    assert router.clear_sticky_cache()["server_loads"] == {"seer": 2}
