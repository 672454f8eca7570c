"""The control plane over real engines: what a trainer tells the fleet holds on every engine, and spoils no sample."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from seer_async.config import resolve
from seer_servers.model import ensure_default_model
from seer_servers.service import pausing
from seer_servers.service.serve import serving
from tests.vllm.putback import put_back

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from seer_async.service import Service
    from seer_async.types import EngineStats
    from seer_servers.fleet import LocalFleet

pytestmark = pytest.mark.vllm

PROMPT = [504, 3413, 314]
LENGTH, N = 48, 3


class Trainer:
    """The fleet behind `seer serve`, as a trainer sees it, and its engines as they see themselves."""

    def __init__(self, fleet: LocalFleet, service: Service, ours: httpx.AsyncClient) -> None:
        self.fleet = fleet
        self.service = service
        self.ours = ours

    async def post(self, path: str, body: Any = None, **query: Any) -> Any:
        reply = (await self.ours.post(path, json=body, params=query)).raise_for_status()
        return reply.json()

    async def get(self, path: str) -> Any:
        return (await self.ours.get(path)).raise_for_status().json()

    async def engines(self, path: str) -> list[Any]:
        """What every engine answers itself."""
        async with httpx.AsyncClient(timeout=60) as client:
            return [(await client.get(url + path)).raise_for_status().json() for url in self.fleet.urls]

    def ask(self, name: str = "mine", length: int = LENGTH) -> asyncio.Task[list[list[int]]]:
        """A seeded group, which is always the same, on its way."""
        body = {"prompt": PROMPT, "n": N, "seed": 11, "max_tokens": length, "ignore_eos": True}

        async def asked() -> list[list[int]]:
            reply = await self.ours.post(
                "/v1/completions", json=body | {"return_token_ids": True}, headers={"X-Request-Id": name}
            )
            return [choice["token_ids"] for choice in reply.raise_for_status().json()["choices"]]

        return asyncio.create_task(asked())

    async def under_way(self, length: int = LENGTH) -> asyncio.Task[list[list[int]]]:
        """The group, when some of each of its responses has been sampled."""
        task = self.ask(length=length)
        while sum(request.generated >= 8 for request in self.service.core.buffer.unfinished()) < N:
            await asyncio.sleep(0.01)
            assert not task.done()
        return task

    def told(self) -> dict[str, EngineStats]:
        """The latest accounts of themselves of the engines that work for us."""
        engines = self.service.core.instances
        return {name: each.stats for name, each in engines.items() if each.in_flight and each.stats}

    async def sampling(self) -> None:
        """Wait until the engines have sampled some of each response of a group, by their own account."""
        async with asyncio.timeout(60):
            while sum(stats.running for stats in self.told().values()) < N:
                await asyncio.sleep(0.01)
            wanted = {name: stats.generated_tokens + 8 for name, stats in self.told().items()}
            while any(stats.generated_tokens < wanted[name] for name, stats in self.told().items()):
                await asyncio.sleep(0.01)

    async def states(self) -> list[str]:
        return [worker["state"] for worker in (await self.get("/workers"))["workers"]]

    async def update(self, version: str) -> None:
        """The weights that the engines began with, under another name."""
        await self.post("/start_weight_update", {})
        await self.post("/update_weights", {"update_info": {"path": str(ensure_default_model())}})
        await self.post("/finish_weight_update", {"weight_version": version})

    async def eventually(self, true: Callable[[], Awaitable[bool]], seconds: float = 15) -> None:
        async with asyncio.timeout(seconds):
            while not await true():
                await asyncio.sleep(0.1)

    async def become(self, *states: str, seconds: float = 15) -> None:
        async def are() -> bool:
            return await self.states() == list(states)

        await self.eventually(are, seconds)

    async def has_it_all(self) -> bool:
        """Whether what engines have sampled is back with us: on busy cores it comes later than their word."""
        return not self.service.core.calls

    async def idle(self) -> bool:
        """Whether no engine works."""
        async with httpx.AsyncClient(timeout=10) as client:
            pages = [(await client.get(f"{url}/metrics")).text for url in self.fleet.urls]
        lines = [line for page in pages for line in page.splitlines()]
        return not sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running{"))


@asynccontextmanager
async def trainer(fleet: LocalFleet, chunk_size: int = 8) -> AsyncIterator[Trainer]:
    config = resolve({"serve": {"port": 0}, "rollout": {"chunk_size": chunk_size}, "engine": {"telemetry_s": 0.25}})
    async with serving(config, fleet.urls) as (service, url), httpx.AsyncClient(base_url=url, timeout=120) as ours:
        yield Trainer(fleet, service, ours)


async def test_pause_sleep_and_the_rest(vllm_fleet: LocalFleet) -> None:
    try:
        async with trainer(vllm_fleet) as it:
            whole = await it.ask()
            await _pauses(it, whole)
            await _others_pause(it, whole)
            await _sleeps(it, whole)
            await _caches_and_workers(it, whole)
    finally:
        await put_back(vllm_fleet)


async def test_requests_aborted_by_name_keep_what_was_sampled_of_their_one_chunk(
    vllm_fleet: LocalFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pausing, "HAND_BACK_S", 30.0)  # the one chunk is all that there is
    long = 8 * LENGTH
    async with trainer(vllm_fleet, chunk_size=long) as it:
        await it.eventually(it.idle)
        task = it.ask(length=long)
        await it.sampling()
        assert (await it.post("/abort_requests", {"request_ids": ["mine"]}))["aborted"] == N
        cut = await task
        assert all(0 < len(tokens) < long for tokens in cut)
        await it.eventually(it.idle)
        whole = await it.ask(length=max(map(len, cut)))
        assert all(tokens == right[: len(tokens)] for tokens, right in zip(cut, whole, strict=True))


async def _pauses(it: Trainer, whole: list[list[int]]) -> None:
    for mode in ("keep", "wait", "abort"):
        task = await it.under_way()
        assert await it.post("/pause", mode=mode) == {"status": "paused"}
        assert await it.get("/is_paused") == {"is_paused": True}
        assert await it.engines("/is_paused") == [{"is_paused": True}] * 2
        assert await it.idle()
        assert task.done() == (mode == "wait") or mode == "abort"
        late, before = it.ask(), it.service.core.responses.tokens
        await asyncio.sleep(0.5)
        assert (late.done(), it.service.core.responses.tokens) == (False, before)
        assert await it.post("/resume") == {"status": "resumed"}
        assert await it.engines("/is_paused") == [{"is_paused": False}] * 2
        assert await late == whole
        cut = await task
        assert cut == whole if mode != "abort" else any(len(tokens) < LENGTH for tokens in cut)
        assert all(tokens == right[: len(tokens)] for tokens, right in zip(cut, whole, strict=True))
    long = 8 * LENGTH  # one engine may be far ahead of the other
    task = await it.under_way(long)
    assert (await it.post("/abort_requests", {"request_ids": ["mine"]}))["aborted"] == N
    assert all(len(tokens) < long for tokens in await task)
    await it.eventually(it.idle)


async def _others_pause(it: Trainer, whole: list[list[int]]) -> None:
    """Engines that somebody pauses directly."""
    task = await it.under_way()
    async with httpx.AsyncClient(timeout=60) as client:
        (await client.post(f"{it.fleet.urls[0]}/pause?mode=keep")).raise_for_status()
        assert await task == whole
        await it.become("PAUSED", "UP")
        (await client.post(f"{it.fleet.urls[0]}/resume")).raise_for_status()
    await it.become("UP", "UP")


async def _sleeps(it: Trainer, whole: list[list[int]]) -> None:
    """CPU engines keep their memory when they sleep, but not their word: what they say of themselves is tested."""
    task = await it.under_way()
    assert await it.post("/sleep", level=1, mode="keep") == {"status": "sleeping", "level": 1}
    assert await it.engines("/is_sleeping") == [{"is_sleeping": True}] * 2
    assert await it.get("/is_sleeping") == {"is_sleeping": True}
    assert not task.done()
    assert (await it.post("/wake_up"))["status"] == "awake"
    assert await task == whole

    task = await it.under_way()
    await it.post("/sleep", level=2, mode="keep")
    assert (await it.post("/wake_up"))["status"] == "awake"
    assert await it.engines("/is_sleeping") == [{"is_sleeping": False}] * 2
    await it.become("STALE", "STALE")
    assert (await it.ours.get("/weight_info")).status_code == 409
    await it.eventually(it.has_it_all, 15)
    before = it.service.core.responses.tokens
    await asyncio.sleep(0.5)
    assert not task.done() and it.service.core.responses.tokens <= before
    await it.update("awake")
    assert await task == whole
    assert await it.get("/weight_info") == {"weight_version": "awake"}
    await it.become("UP", "UP")


async def _caches_and_workers(it: Trainer, whole: list[list[int]]) -> None:
    assert await it.post("/reset_prefix_cache") == {"success": True}
    said = (await it.post("/collective_rpc", {"method": "seer_support"}))["results"]
    assert len(said) == 2 == len({result["boot_id"] for result in said})
    assert (await it.ours.post("/collective_rpc", json={"method": "no_such_method"})).status_code == 424
    info = await it.get("/server_info?config_format=json")
    assert info["vllm_config"]["model_config"]["served_model_name"] == it.service.info.model
    assert (await it.ours.delete("/workers", params={"url": it.fleet.urls[1]})).status_code == 200
    before = it.service.core.instances["engine-0"].generated
    assert await it.ask() == whole
    assert it.service.core.instances["engine-0"].generated == before + N * LENGTH
    assert (await it.post("/workers", {"url": it.fleet.urls[1]}))["name"] == "engine-1"
    await it.become("UP", "UP")


async def test_an_engine_that_restarts_is_stale(vllm_fleet: LocalFleet) -> None:
    """It gets nothing, though it answers, until it has the weights that the fleet samples from."""
    try:
        async with trainer(vllm_fleet) as it:
            await it.update("default")  # a trainer may call them as engines do that know of none
            whole = await it.ask()
            engine = vllm_fleet.engines[1]
            task = await it.under_way()
            assert engine.pid is not None
            os.killpg(engine.pid, signal.SIGKILL)
            assert await task == whole
            await it.become("UP", "DOWN")
            await it.become("UP", "STALE", seconds=120)
            generated = it.service.core.instances["engine-1"].generated
            assert await it.ask() == whole
            assert it.service.core.instances["engine-1"].generated == generated
            await it.update("again")
            await it.become("UP", "UP")
            assert await it.ask() == whole
            assert it.service.core.instances["engine-1"].generated > generated
    finally:
        await put_back(vllm_fleet)
