"""The Mooncake pool between two real engines: what it saves, and what is left of it when its daemons are killed."""

from __future__ import annotations

import asyncio
import itertools
import random
import re
import signal
import time
import uuid
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from seer_async.engine import EngineClient, engine_session
from seer_async.wire import CallSpec
from seer_servers.fleet import EngineSpec, LocalFleet
from seer_servers.kvpool import mooncake
from seer_servers.kvpool.mooncake import MooncakePool, model_namespace
from seer_servers.model import ensure_default_model
from tests.test_mooncake import mooncake_installed  # noqa: F401 - a fixture

if TYPE_CHECKING:
    from pathlib import Path

    import aiohttp

    from seer_servers.kvpool.mooncake import Service

pytestmark = pytest.mark.vllm

# Tokens. The first chunk does not end on a block border: there it is a race whether the last token is computed.
BLOCK, PROMPT, FIRST, SECOND = 32, 288, 40, 8
RUN = uuid.uuid4().hex


class Engine:
    """One engine's URL, with what this test asks of it."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self.url = url
        self._session = session
        self._client = EngineClient(url, session)

    async def attach(self) -> None:
        await self._client.attach(timeout_s=30, trial_timeout_s=60)

    async def go_on(self, prefix: list[int], count: int, version: str) -> list[int]:
        """Return the next `count` greedy tokens."""
        info = self._client.info
        assert info
        extra = {"seer_prompt_len": min(PROMPT, len(prefix))}
        params = {"temperature": 0.0, "logprobs": 0, "ignore_eos": True, "extra_args": extra}
        spec = CallSpec(
            request_id=uuid.uuid4().hex,
            model=info.model,
            prefix=prefix,
            params=params | {"max_tokens": count},
            cache_salt=f"{RUN}:{version}",
            max_tokens=count,
        )
        return list((await self._client.generate(spec, info, timeout_s=120)).token_ids)

    async def computed(self) -> int:
        """Prompt tokens that this engine had to compute."""
        async with self._session.get(f"{self.url}/metrics") as reply:
            pattern = r'^vllm:prompt_tokens_by_source_total\{[^}]*source="local_compute"[^}]*\} (\S+)$'
            return sum(int(float(value)) for value in re.findall(pattern, await reply.text(), re.MULTILINE))

    async def stats(self) -> dict[str, Any]:
        async with self._session.get(f"{self.url}/v1/seer/kv/stats") as reply:
            assert reply.ok
            return await reply.json()

    async def held(self, prefix: list[int], version: str) -> int:
        body = {"token_ids": prefix, "cache_salt": f"{RUN}:{version}"}
        async with self._session.post(f"{self.url}/v1/seer/kv/lookup", json=body) as reply:
            assert reply.ok
            return (await reply.json())["tokens"]

    async def flush(self) -> tuple[int, str]:
        async with self._session.post(f"{self.url}/v1/seer/kv/flush", json={"run": RUN}) as reply:
            return reply.status, await reply.text()

    async def until_held(self, prefix: list[int], version: str) -> None:
        """Wait until the pool holds all that an engine saves of a prefix; what is generated is saved a step later."""
        wanted = (len(prefix) - 1) // BLOCK * BLOCK
        async with asyncio.timeout(30):
            while await self.held(prefix, version) < wanted:
                await asyncio.sleep(0.1)


def prompt(seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(100, 40_000) for _ in range(PROMPT)]


def kill(service: Service) -> None:
    (daemon,) = psutil.Process(service.process.pid).children()
    daemon.send_signal(signal.SIGKILL)


async def pool_works(there: Engine, here: Engine, seed: int) -> None:
    """Wait until what one engine stores can be found by the other, with prompts that were never used before."""
    async with asyncio.timeout(60):
        for attempt in itertools.count():
            fresh = prompt(seed * 1000 + attempt)[: 2 * BLOCK + 1]
            await here.go_on(fresh, 1, "v1")
            await asyncio.sleep(0.5)
            if await there.held(fresh, "v1"):
                return


async def test_two_engines_and_killed_daemons(
    vllm_installed: None,
    mooncake_installed: None,  # noqa: F811 - a fixture
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Busy cores stall a daemon for seconds; a store that is killed is believed in for that long, too.
    monkeypatch.setattr(mooncake, "CLIENT_TTL_S", 10)
    monkeypatch.setattr(mooncake, "RPC_TIMEOUT_MS", 10_000)
    model = str(ensure_default_model())
    spec = EngineSpec(model=model, dtype="float32", max_model_len=2048, block_size=BLOCK, kv_cache_gib=0.5)
    pool = MooncakePool(tmp_path, 1 << 30, namespace=model_namespace(model, "float32"))
    async with LocalFleet(spec, 2, tmp_path, pool=pool) as fleet, engine_session() as session:
        here, there = [Engine(url, session) for url in fleet.urls]
        await asyncio.gather(here.attach(), there.attach())
        await moves_without_prefill(here, there)
        await refuses_to_flush(here)
        await survives(pool.master, here, there, seed=2)
        await survives(pool.store, here, there, seed=3)


async def moves_without_prefill(here: Engine, there: Engine) -> None:
    start = prompt(1)
    undivided, first = await asyncio.gather(
        there.go_on(start, FIRST + SECOND, "undivided"), here.go_on(start, FIRST, "v1")
    )
    assert first == undivided[:FIRST]
    await there.until_held(start + first, "v1")
    before = await there.computed()
    assert first + await there.go_on(start + first, SECOND, "v1") == undivided
    assert 0 < await there.computed() - before <= BLOCK

    assert await there.held(start + first, "v2") == 0
    before = await there.computed()
    assert first + await there.go_on(start + first, SECOND, "v2") == undivided
    assert await there.computed() - before == PROMPT + FIRST, "another weight version finds nothing"

    mine, theirs = await here.stats(), await there.stats()
    assert mine["pool"] == theirs["pool"]
    assert mine["kind"] == "mooncake"
    assert mine["capacity_bytes"] == 1 << 30
    assert 0 < mine["bytes"] <= 1 << 30
    assert mine["saves"] >= (PROMPT + FIRST) // BLOCK
    assert theirs["loads"] == (PROMPT + FIRST) // BLOCK
    assert theirs["hits"] == (PROMPT + FIRST) // BLOCK * BLOCK
    assert theirs["load_bytes"] * mine["blocks"] == mine["bytes"] * theirs["loads"], "every block has the same size"
    assert theirs["failures"] == theirs["refused"] == 0


async def refuses_to_flush(here: Engine) -> None:
    status, text = await here.flush()
    assert status == 501
    assert "name no run" in text


async def survives(service: Service, here: Engine, there: Engine, seed: int) -> None:
    """Kill a daemon between two chunks: the second is answered, right, and the pool works again by itself."""
    await pool_works(there, here, seed)
    start = prompt(seed)
    undivided, first = await asyncio.gather(
        there.go_on(start, FIRST + SECOND, "undivided"), here.go_on(start, FIRST, "v1")
    )
    await there.until_held(start + first, "v1")
    kill(service)
    started = time.monotonic()
    assert first + await there.go_on(start + first, SECOND, "v1") == undivided
    took = time.monotonic() - started
    print(f"{service.name} killed: answered in {took:.1f} s")
    assert took < 30
    started = time.monotonic()
    await pool_works(there, here, seed + 10)
    print(f"{service.name} killed: pool works again {time.monotonic() - started:.1f} s after the answer")
