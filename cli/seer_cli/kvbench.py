"""What the KV pool does for a request that moves: measured on two or more live engines that share one.

Every comparison is interleaved. Prefixes are random token ids under a fresh `cache_salt`, so nothing is ever cached but
what the measurement itself has put there. Times are of whole calls that generate one token, seen by the client.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
import uuid
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from seer_async.errors import UsageError
from seer_async.wire import CallSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from seer_async.engine import EngineClient
    from seer_async.types import ChunkReply

_TIMEOUT_S = 600.0
_SETTLE_S = 0.5  # counters reach /metrics with the next step's statistics
_PROMPT = 64  # tokens


class Resume(msgspec.Struct, frozen=True, kw_only=True):
    """Continuing a prefix of `tokens` tokens on an engine that has never seen it. Medians of `rounds`; seconds."""

    tokens: int
    rounds: int
    prefill_s: float
    resume_s: float
    speedup: float  # median of the rounds' ratios
    load_gb_s: float  # by the engines' own clock, checksum included
    memcpy_gb_s: float  # a plain copy of as many bytes on this machine
    save_gb_s: float


class Moves(msgspec.Struct, frozen=True, kw_only=True):
    """Requests whose chunks run on engines drawn at random, against the same requests in one call."""

    requests: int
    equal: int  # responses that are token for token those of the undivided call
    moved_chunks: int
    moved_tokens: int  # tokens of the prefixes of chunks that moved
    pooled_share: float  # of those: loaded from the pool, or still in that engine's own cache
    prefilled_each: float  # tokens computed again for each chunk that moved, the mean
    prefilled_most: int
    refused: int  # blocks that the pool did not take
    evictions: int


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """Everything measured."""

    pool: str
    block_size: int
    resume: Resume
    moves: Moves


async def measure_pool(
    engines: Sequence[EngineClient], *, tokens: int, rounds: int, requests: int, chunks: int, repeats: int, seed: int
) -> Figures:
    """Measure a pool that all `engines`, which are attached, share.

    Raises:
        UsageError: There are fewer than two engines, or they do not share a pool.
    """
    infos = [engine.info for engine in engines if engine.info is not None]
    pools = {info.kv_pool for info in infos}
    if len(engines) < 2 or len(pools) != 1 or None in pools:  # noqa: PLR2004 - a move needs two
        raise UsageError("this needs at least two engines that share a KV pool: start them with --kv-pool shm")
    rng = random.Random(seed)  # noqa: S311 - a workload, not a secret
    return Figures(
        pool=str(pools.pop()).split(":")[0],
        block_size=infos[0].block_size,
        resume=await _resume(engines, tokens, rounds, rng),
        moves=await _moves(engines, requests, chunks, repeats, rng),
    )


async def _call(engine: EngineClient, prefix: list[int], prompt: int, salt: str, most: int) -> tuple[ChunkReply, float]:
    info = engine.info
    assert info is not None
    extra = {"seer_prompt_len": prompt}
    params = {"max_tokens": most, "temperature": 0.0, "logprobs": 0, "ignore_eos": True, "extra_args": extra}
    name = f"seer-bench-{uuid.uuid4().hex}"
    spec = CallSpec(request_id=name, model=info.model, prefix=prefix, params=params, cache_salt=salt, max_tokens=most)
    started = time.perf_counter()
    reply = await engine.generate(spec, info, timeout_s=_TIMEOUT_S)
    return reply, time.perf_counter() - started


def _random_prefix(engine: EngineClient, tokens: int, rng: random.Random) -> list[int]:
    vocab = engine.info.vocab_size if engine.info else None
    return [rng.randrange(100, (vocab or 10_000) - 100) for _ in range(tokens)]


# Resuming elsewhere


async def _resume(engines: Sequence[EngineClient], tokens: int, rounds: int, rng: random.Random) -> Resume:
    before = await _stats(engines)
    cold: list[float] = []
    warm: list[float] = []
    for number in range(rounds + 1):
        here, there = rng.sample(list(engines), 2)
        prefix = _random_prefix(here, tokens, rng)
        salt = f"bench-{uuid.uuid4().hex}:0"
        _, prefill_s = await _call(here, prefix, tokens, salt, 1)
        _, resume_s = await _call(there, prefix, tokens, salt, 1)
        if number:  # the first round warms both engines up
            cold.append(prefill_s)
            warm.append(resume_s)
    after = await _stats(engines)
    size = sum(a["load_bytes"] - b["load_bytes"] for a, b in zip(after, before, strict=True)) // (rounds + 1)
    return Resume(
        tokens=tokens,
        rounds=rounds,
        prefill_s=statistics.median(cold),
        resume_s=statistics.median(warm),
        speedup=statistics.median(c / w for c, w in zip(cold, warm, strict=True)),
        load_gb_s=_rate(before, after, "load"),
        memcpy_gb_s=_memcpy(size) if size else 0.0,
        save_gb_s=_rate(before, after, "save"),
    )


async def _stats(engines: Sequence[EngineClient]) -> list[dict[str, int]]:
    await asyncio.sleep(_SETTLE_S)
    return [await engine.pool_counters(timeout_s=30) for engine in engines]


def _rate(before: list[dict[str, int]], after: list[dict[str, int]], what: str) -> float:
    """Gigabytes a second; bytes a nanosecond are the same number."""
    size = sum(a[f"{what}_bytes"] - b[f"{what}_bytes"] for a, b in zip(after, before, strict=True))
    spent = sum(a[f"{what}_ns"] - b[f"{what}_ns"] for a, b in zip(after, before, strict=True))
    return size / spent if spent else 0.0


def _memcpy(size: int) -> float:
    source, target = np.ones(size, dtype=np.uint8), np.zeros(size, dtype=np.uint8)
    times = []
    for _ in range(5):
        started = time.perf_counter_ns()
        np.copyto(target, source)
        times.append(time.perf_counter_ns() - started)
    return size / statistics.median(times)


# Moving at every chunk


class _Tally:
    """What happened to the chunks that moved."""

    def __init__(self) -> None:
        self.prefilled: list[int] = []
        self.moved_tokens = 0
        self.equal = 0

    def moved(self, prefix: int, reply: ChunkReply) -> None:
        self.moved_tokens += prefix
        self.prefilled.append(prefix - reply.cached - reply.pooled)


async def _moves(
    engines: Sequence[EngineClient], requests: int, chunks: int, repeats: int, rng: random.Random
) -> Moves:
    size = 40  # not a multiple of any block size, so chunks end within blocks
    tally = _Tally()
    before = await _stats(engines)
    for _ in range(repeats):
        salt = f"bench-{uuid.uuid4().hex}"
        prompts = [_random_prefix(engines[0], _PROMPT + 7 * number, rng) for number in range(requests)]
        routes = [[rng.choice(list(engines)) for _ in range(chunks)] for _ in prompts]
        pairs = zip(prompts, routes, strict=True)
        whole, divided = await asyncio.gather(
            asyncio.gather(*(_call(engines[0], p, len(p), f"{salt}-whole:0", size * chunks) for p in prompts)),
            asyncio.gather(*(_divided(prompt, route, f"{salt}:0", size, tally) for prompt, route in pairs)),
        )
        tally.equal += sum(reply.token_ids == tokens for (reply, _), tokens in zip(whole, divided, strict=True))
    prefilled = tally.prefilled or [0]
    after = await _stats(engines)
    return Moves(
        requests=requests * repeats,
        equal=tally.equal,
        moved_chunks=len(tally.prefilled),
        moved_tokens=tally.moved_tokens,
        pooled_share=1 - sum(prefilled) / max(1, tally.moved_tokens),
        prefilled_each=statistics.mean(prefilled),
        prefilled_most=max(prefilled),
        refused=sum(a["refused"] - b["refused"] for a, b in zip(after, before, strict=True)),
        evictions=after[0].get("evictions", 0) - before[0].get("evictions", 0),
    )


async def _divided(prompt: list[int], route: Sequence[EngineClient], salt: str, size: int, tally: _Tally) -> list[int]:
    prefix = list(prompt)
    last = None
    for engine in route:
        reply, _ = await _call(engine, prefix, len(prompt), salt, size)
        if last is not None and engine is not last:
            tally.moved(len(prefix), reply)
        prefix += reply.token_ids
        last = engine
    return prefix[len(prompt) :]
