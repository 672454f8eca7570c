"""The shared-memory KV pool between two real engines: what it saves, and that nothing wrong ever comes out of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import signal
import uuid
from collections import Counter
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import pytest
import torch

from seer_async.dataset import default_dataset, read_dataset
from seer_async.engine import EngineClient, engine_session
from seer_async.wire import CallSpec
from seer_cli.kvbench import measure_pool
from seer_servers.kvpool.shm.pool import ShmPool
from tests.chisquare import p_value
from tests.runs import roll, samples

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from seer_async.rollout import Rollout
    from seer_async.types import ChunkReply
    from seer_servers.fleet import LocalFleet

pytestmark = pytest.mark.vllm

PROMPT, PREFIX, MORE = 50, 333, 24  # tokens; nothing is a multiple of a block


@pytest.fixture
async def engines(vllm_fleet: LocalFleet) -> AsyncIterator[list[EngineClient]]:
    async with engine_session() as session:
        clients = [EngineClient(url, session) for url in vllm_fleet.urls]
        for client in clients:
            await client.attach(timeout_s=30, trial_timeout_s=60)
        yield clients


@pytest.fixture
def pool(vllm_fleet: LocalFleet) -> ShmPool:
    assert isinstance(vllm_fleet.pool, ShmPool)
    return vllm_fleet.pool


class Case:
    """A prefix, and the salt under which it is used."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(seed)
        self.prefix = [rng.randrange(100, 40_000) for _ in range(PREFIX)]
        self.salt = f"run-{uuid.uuid4().hex}:v1"

    async def on(self, engine: EngineClient, salt: str | None = None, **how: bool) -> ChunkReply:
        assert engine.info
        params = {"max_tokens": MORE, "temperature": 0.0, "logprobs": 0, "ignore_eos": True}
        spec = CallSpec(
            request_id=uuid.uuid4().hex,
            model=engine.info.model,
            prefix=self.prefix,
            params=params | {"extra_args": {"seer_prompt_len": PROMPT}},
            cache_salt=salt or self.salt,
            max_tokens=MORE,
            **how,
        )
        return await engine.generate(spec, engine.info, timeout_s=300)


async def test_requests_that_move_lose_one_token_and_change_nothing(engines: list[EngineClient]) -> None:
    figures = await measure_pool(engines, tokens=400, rounds=3, requests=6, chunks=5, repeats=1, seed=3)
    assert figures.moves.equal == figures.moves.requests == 6
    assert figures.moves.moved_chunks > 5
    assert figures.moves.prefilled_most <= 1 + 8, "one token, and what the last step of a chunk drafted"
    assert figures.moves.pooled_share > 0.97
    assert figures.resume.speedup > 3, "the median of three rounds, of which one may have stood still"


async def test_what_is_sampled_after_a_move_is_the_policys(engines: list[EngineClient], vllm_fleet: LocalFleet) -> None:
    """Samples at T=1 on KV that another engine computed, against the probabilities where nothing was loaded."""
    draws, at_once = 640, 64
    asked = await engines[0].tokenize(read_dataset(default_dataset(), 1)[0], timeout_s=60)
    async with httpx.AsyncClient(timeout=300) as client:

        async def complete(number: int, prefix: list[int], salt: str, **params: Any) -> list[dict[str, Any]]:
            body = {"prompt": prefix, "cache_salt": salt, "return_token_ids": True} | params
            reply = await client.post(f"{vllm_fleet.urls[number]}/v1/completions", json=body)
            return list(reply.raise_for_status().json()["choices"])

        params = {"max_tokens": 100, "temperature": 0.0, "ignore_eos": True, "logprobs": 20}
        (begun,) = await complete(0, asked, "moved", **params)
        tops = [torch.tensor(list(top.values())).exp() for top in begun["logprobs"]["top_logprobs"]]
        cheap = [
            place for place in range(30, 100) if (len(asked) + place) % 32 in range(1, 5)
        ]  # little is computed again
        open_end = max(cheap, key=lambda place: float(torch.special.entr(tops[place]).sum()))
        prefix = asked + begun["token_ids"][:open_end]
        await complete(0, prefix, "moved", max_tokens=1)  # what is computed is in the pool
        before = await engines[1].pool_counters(timeout_s=30)
        batches = [
            await complete(1, prefix, "moved", max_tokens=1, n=at_once, temperature=1.0)
            for _ in range(draws // at_once)
        ]
        after = await engines[1].pool_counters(timeout_s=30)
        (alone,) = await complete(0, prefix, "alone", max_tokens=1, logprobs=20, return_tokens_as_token_ids=True)
    assert after["loads"] - before["loads"] >= len(prefix) // 32
    known = {int(key.rpartition(":")[2]): value for key, value in alone["logprobs"]["top_logprobs"][0].items()}
    drawn = Counter(choice["token_ids"][0] for batch in batches for choice in batch)
    counts = torch.tensor([drawn[token] for token in known] + [draws - sum(drawn[token] for token in known)])
    likely = torch.tensor(list(known.values())).double().exp()
    policy = torch.cat((likely, (1 - likely.sum()).clamp(min=0)[None]))
    assert p_value(counts, policy) > 1e-4
    colder = policy**1.5
    assert p_value(counts, colder / colder.sum()) < 1e-4, "the test would notice another temperature"


async def test_only_the_same_salt_hits(engines: list[EngineClient]) -> None:
    case = Case(1)
    here, there = engines
    first = await case.on(here)
    assert (first.cached, first.pooled) == (0, 0)
    other = await case.on(there, salt=case.salt.replace(":v1", ":v2"))
    assert (other.cached, other.pooled) == (0, 0)
    again = await case.on(there)
    assert again.cached + again.pooled >= PREFIX - PREFIX % 32
    assert again.pooled > 0
    assert first.token_ids == other.token_ids == again.token_ids


async def test_a_request_may_stay_out_of_the_pool(engines: list[EngineClient]) -> None:
    here, there = engines
    case = Case(2)
    await case.on(here, save=False)
    assert (await case.on(there)).pooled == 0
    case = Case(3)
    await case.on(here)
    assert (await case.on(there, load=False)).pooled == 0


@pytest.mark.parametrize(
    "spoil",
    [
        lambda file: file.write_bytes(bytes(reversed(file.read_bytes()))),
        lambda file: file.write_bytes(file.read_bytes()[:1000]),
        lambda file: file.write_bytes(file.read_bytes()[:-1] + b"x"),
        lambda file: file.unlink(),
    ],
    ids=["garbage", "cut short", "last byte", "gone"],
)
async def test_spoilt_blocks_are_computed_again(
    engines: list[EngineClient], pool: ShmPool, spoil: Callable[[Path], None]
) -> None:
    here, there = engines
    case = Case(4)
    first = await case.on(here)
    before = await there.pool_counters(timeout_s=30)
    files = blocks(pool, case)
    assert len(files) >= PREFIX // 32
    for file in files[len(files) // 2 :]:
        spoil(file)
    again = await case.on(there)
    after = await there.pool_counters(timeout_s=30)
    assert again.token_ids == first.token_ids
    assert again.logprobs == pytest.approx(first.logprobs, abs=2e-3)
    found = after["hits"] - before["hits"] >= PREFIX - PREFIX % 32
    assert (after["failures"] > before["failures"]) == found  # a block that is gone is not found to begin with
    healed = await case.on(here)
    assert healed.token_ids == first.token_ids


async def test_a_spoilt_block_leaves_no_garbage_in_the_engine(engines: list[EngineClient], pool: ShmPool) -> None:
    """What is behind a sequence's end has no weight in attention, but nought times what is not a number is none."""
    here, there = engines
    case, alone = Case(9), Case(9)
    first = await case.on(here)
    end = len(case.prefix) + len(first.token_ids) - 1  # where the tail ends; the last token's KV nobody has
    tails = [file for file in blocks(pool, case) if int(file.name.split(".")[1], 16) == end // 32]
    assert tails
    for file in tails:
        file.write_bytes(b"\xff" * file.stat().st_size)
    before = await there.pool_counters(timeout_s=30)
    for each in (case, alone):
        each.prefix += first.token_ids
    expected = await alone.on(there)
    again = await case.on(there)
    after = await there.pool_counters(timeout_s=30)
    assert after["failures"] > before["failures"]
    assert again.token_ids == expected.token_ids
    assert again.logprobs == pytest.approx(expected.logprobs, abs=2e-3)


def blocks(pool: ShmPool, case: Case) -> list[Path]:
    """The files of a case's blocks, first to last."""
    folders = [salt.parent for salt in (pool.root / "blocks").glob("*/SALT") if salt.read_text() == case.salt]
    files = [file for folder in folders for file in folder.iterdir() if file.name != "SALT"]
    return sorted(files, key=lambda file: int(file.name.split(".")[1], 16))


async def test_lookup_and_flush(engines: list[EngineClient], vllm_fleet: LocalFleet) -> None:
    here, there = engines
    case = Case(5)
    run = case.salt.split(":")[0]
    await case.on(here)
    async with httpx.AsyncClient(base_url=vllm_fleet.urls[1], timeout=60) as client:

        async def held(salt: str) -> int:
            body = {"token_ids": case.prefix, "cache_salt": salt}
            answer: dict[str, Any] = (await client.post("/v1/seer/kv/lookup", json=body)).json()
            return int(answer["tokens"])

        full = PREFIX - PREFIX % 32
        assert await held(case.salt) == full
        assert await held("another:v1") == 0
        flushed = await client.post("/v1/seer/kv/flush", json={"run": run, "weight_version": "v9"})
        assert flushed.json() == {"blocks": 0}
        flushed = await client.post("/v1/seer/kv/flush", json={"run": run, "weight_version": "v1"})
        assert flushed.json()["blocks"] >= full // 32
        assert await held(case.salt) == 0
        for body in ({}, {"run": ""}, {"run": 3}):
            assert (await client.post("/v1/seer/kv/flush", json=body)).status_code in {400, 422}
    assert (await case.on(there)).pooled == 0


async def test_the_pool_is_on_the_engines_metrics(engines: list[EngineClient]) -> None:
    stats = await engines[0].stats(timeout_s=30)
    assert stats.pool is not None
    assert stats.pool.capacity_bytes > 0
    assert engines[0].info
    assert engines[1].info
    assert engines[0].info.kv_pool == engines[1].info.kv_pool is not None


async def test_killed_janitors_are_replaced(engines: list[EngineClient], pool: ShmPool) -> None:
    killed = janitors(pool)
    assert killed
    for process in killed:
        process.send_signal(signal.SIGKILL)
    case = Case(6)
    first = await case.on(engines[0])
    for _ in range(40):  # engines look after their janitor while they work
        await Case(7).on(engines[0])
        if {process.pid for process in janitors(pool)} - {process.pid for process in killed}:
            break
    assert janitors(pool)
    assert (await case.on(engines[1])).token_ids == first.token_ids


def janitors(pool: ShmPool) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        command = process.info["cmdline"] or []
        if "seer_servers.kvpool.shm.janitor" in command and str(pool.root) in command:
            found.append(process)
    return found


async def test_a_sabotaged_pool_spoils_no_sample(vllm_fleet: LocalFleet, pool: ShmPool, tmp_path: Path) -> None:
    """While requests move, blocks are damaged, cut, removed and made expendable, and janitors are killed."""
    prompts = read_dataset(default_dataset(), 4)
    tree = {
        "rollout": {"n": 4, "chunk_size": 16},
        "sampling": {"max_tokens": 80, "temperature": 1.0, "seed": 4, "ignore_eos": True},
        "scheduler": {"affinity": 0.0, "pooled_affinity": 0.0},
    }
    await roll(tmp_path / "quiet", vllm_fleet.urls, prompts, tree | {"engine": {"kv_pool": False}})
    done = {"damaged": 0, "killed": 0}

    def sabotage(rollout: Rollout) -> None:
        rng = random.Random(1)

        def spoil(file: Path) -> None:
            how = rng.randrange(4)
            with contextlib.suppress(OSError):
                if how == 0:
                    file.unlink()
                elif how == 1:
                    os.truncate(file, rng.randrange(2000))
                else:
                    with file.open("r+b") as block:
                        block.seek(rng.randrange(file.stat().st_size))
                        block.write(b"\xff\x00\x7f" * how)
                done["damaged"] += 1

        async def work() -> None:
            while True:
                await asyncio.sleep(0.2)
                files = [f for f in (pool.root / "blocks").glob("*/*") if f.name != "SALT"]
                for file in rng.sample(files, min(len(files), 1 + len(files) // 5)):
                    spoil(file)
                if rng.random() < 0.1:
                    for process in janitors(pool):
                        process.kill()
                        done["killed"] += 1

        rollout.saboteur = asyncio.get_running_loop().create_task(work())  # type: ignore[attr-defined]

    result = await roll(tmp_path / "sabotaged", vllm_fleet.urls, prompts, tree, during=sabotage)
    assert result.exit_code == 0
    assert done["damaged"] > 50
    quiet, spoilt = samples(tmp_path / "quiet"), samples(tmp_path / "sabotaged")
    assert {k: s["token_ids"] for k, s in quiet.items()} == {k: s["token_ids"] for k, s in spoilt.items()}
    assert sum(c["pooled"] for s in spoilt.values() for c in s["chunks"]) > 0
    assert result.snapshot.pool is not None


async def test_a_pool_that_vanishes_costs_nothing_but_time(engines: list[EngineClient], pool: ShmPool) -> None:
    """Last of the file: the folder is put back, but what engines have open in it is another one."""
    case = Case(8)
    first = await case.on(engines[0])
    away = pool.root.with_name(pool.root.name + "-away")
    pool.root.rename(away)
    try:
        again = await asyncio.gather(*(case.on(engine) for engine in engines))
    finally:
        async with asyncio.timeout(30):
            while away.exists():  # janitors may have begun another, and write into it
                shutil.rmtree(pool.root, ignore_errors=True)
                with contextlib.suppress(OSError):
                    away.rename(pool.root)
                await asyncio.sleep(0.05)
    assert [reply.token_ids for reply in again] == [first.token_ids] * 2
    assert (await case.on(engines[1])).token_ids == first.token_ids
