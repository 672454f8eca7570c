"""vime's hooks over `seer serve`, under a stand-in of vime that sends the requests that vime sends."""

from __future__ import annotations

import asyncio
import sys
from argparse import Namespace
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import httpx
import pytest

from seer_servers.mock import LanguageModel, reference_response
from seer_servers.trainers import vime
from tests.service.server import PROMPT, served

if TYPE_CHECKING:
    from tests.live.engines import MockProcess

PARAMS = {
    "max_tokens": 15_000,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": -1,
    "logprobs": 1,
    "skip_special_tokens": False,
}
"""As vime makes them of its arguments."""


class State:
    """vime's is a singleton, too."""

    aborted = False

    def __call__(self, _: Any) -> State:
        return self


async def generate(args: Namespace, sample: Any, sampling_params: dict[str, Any]) -> Any:
    url = f"http://{args.vllm_router_ip}:{args.vllm_router_port}/inference/v1/generate"
    body = {"model": args.hf_checkpoint, "token_ids": sample.tokens, "sampling_params": PARAMS | sampling_params}
    async with httpx.AsyncClient(timeout=None) as http:
        reply = await http.post(url, json=body, headers={"x-session-id": sample.session_id})
    choice = reply.raise_for_status().json()["choices"][0]
    sample.answer = choice["token_ids"]
    sample.logprobs = [item["logprob"] for item in choice["logprobs"]["content"]]
    sample.status = choice["finish_reason"]
    return sample


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch) -> State:
    package, rollout, module = ModuleType("vime"), ModuleType("vime.rollout"), ModuleType("vime.rollout.vllm_rollout")
    state = State()
    vars(module).update(generate=generate, GenerateState=state, generate_rollout=lambda *_, **more: more)
    vars(rollout)["vllm_rollout"] = module
    for each in (package, rollout, module):
        monkeypatch.setitem(sys.modules, each.__name__, each)
    return state


async def test_a_rollout(engines: list[MockProcess], state: State) -> None:
    """New weights have a name; an oversampled rollout ends when vime has enough, with what was sampled."""
    async with served(engines) as (service, http):
        args = Namespace(vllm_router_ip=http.base_url.host, vllm_router_port=http.base_url.port, hf_checkpoint="mock")
        for engine in engines:  # its engines register themselves
            reply = await http.post("/workers", json={"url": engine.url, "worker_type": "regular"})
            assert reply.status_code == 200
        assert [each["url"] for each in (await http.get("/workers")).json()["workers"]] == [e.url for e in engines]

        said = await asyncio.to_thread(vime.generate_rollout, args, 3, list, evaluation=False)
        assert said == {"evaluation": False}
        assert service.core.versions.current == "rollout-3"
        await asyncio.to_thread(vime.generate_rollout, args, 4, list, evaluation=True)
        assert service.core.versions.current == "rollout-3"

        samples = [SimpleNamespace(tokens=PROMPT, session_id=f"s{number}") for number in range(4)]
        short = {"seed": 1, "max_tokens": 40, "ignore_eos": True}
        tasks = [
            asyncio.create_task(vime.generate(args, sample, short if number == 0 else {"seed": 2, "ignore_eos": True}))
            for number, sample in enumerate(samples)
        ]
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        assert done == {tasks[0]}
        state.aborted = True
        async with asyncio.timeout(25):  # of the 30 s that they would take
            ended = await asyncio.gather(*tasks)
        assert [sample.status for sample in ended] == ["length", "abort", "abort", "abort"]
        model = LanguageModel(mean_length=60.0, version="rollout-3")
        for sample, seed in zip(ended, (1, 2, 2, 2), strict=True):
            tokens, logprobs, _ = reference_response(PROMPT, seed, len(sample.answer), model=model, ignore_eos=True)
            assert sample.answer == tokens and tokens
            assert sample.logprobs == pytest.approx(logprobs)
        assert not service.core.buffer.open

        reply = await http.delete(f"/workers/{quote(engines[0].url, safe='')}")
        assert reply.status_code == 200
