"""The service over mock engine processes: groups come and go, engines too, and every sample is right."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import httpx
import msgspec
import pytest

from seer_async import service as service_module
from seer_async.config import resolve
from seer_async.errors import BusyError, RefusedError
from seer_async.options import GroupOptions
from seer_async.sampling import Sampling
from seer_async.service import Service
from seer_async.tickets import Work
from seer_servers.mock import LanguageModel, reference_response
from tests.live.engines import MockProcess, mock_engines

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from seer_async.types import Sample

MODEL = LanguageModel(mean_length=60.0)
SPEED = ["--step-ms", "2", "--per-request-ms", "0.01", "--mean-length", "60"]
MAX_TOKENS = 200
SEED = 5  # with some others, all responses end before what a test does to them
OPTIONS = GroupOptions(sampling=Sampling(max_tokens=MAX_TOKENS), chunk_size=16)


@pytest.fixture
def engines() -> Iterator[list[MockProcess]]:
    with mock_engines(SPEED, SPEED, SPEED) as three:
        yield three


@asynccontextmanager
async def serving(engines: list[MockProcess], **tree: Any) -> AsyncIterator[Service]:
    engine = {"telemetry_s": 0.1, "probe_timeout_s": 60.0, "chunk_timeout_s": 5.0, "patience_s": 15.0}
    config = resolve({"engine": engine, "sampling": {"seed": SEED}} | tree)
    async with Service(config, [each.url for each in engines]) as service:
        yield service


def work(number: int, n: int = 1, **options: Any) -> Work:
    rng = random.Random(number)
    prompt = [rng.randrange(3, 2000) for _ in range(rng.randrange(4, 40))]
    return Work(prompt_token_ids=prompt, n=n, options=msgspec.structs.replace(OPTIONS, **options))


def assert_right(sample: Sample, max_tokens: int = MAX_TOKENS) -> None:
    assert not sample.error
    model = msgspec.structs.replace(MODEL, version=sample.weight_version)
    tokens, logprobs, reason = reference_response(sample.prompt_token_ids, sample.seed, max_tokens, model=model)
    assert sample.token_ids == tokens
    assert sample.logprobs == pytest.approx(logprobs)
    assert sample.finish_reason == reason


async def test_groups_come_and_go(engines: list[MockProcess]) -> None:
    async with serving(engines[:2]) as service:

        async def one(number: int) -> list[Sample]:
            await asyncio.sleep(0.01 * number)
            return await service.submit(work(number, n=1 + number % 4)).all()

        answers = await asyncio.gather(*map(one, range(60)))
        for number, samples in enumerate(answers):
            assert len(samples) == 1 + number % 4
            assert len({sample.seed for sample in samples}) == len(samples)
            for sample in samples:
                assert_right(sample)
        assert not service.core.buffer.groups
        assert service.snapshot().done == sum(1 + number % 4 for number in range(60))


async def test_requests_with_equal_prompts_are_siblings(engines: list[MockProcess]) -> None:
    async with serving(engines[:1]) as service:
        tickets = [service.submit(work(1)) for _ in range(4)]
        other = service.submit(work(1, salt="another"))
        named = service.submit(msgspec.structs.replace(work(1), group="named"))
        groups = [{request.rpartition("/")[0] for request in ticket.requests} for ticket in (*tickets, other, named)]
        assert groups[0] == groups[1] == groups[2] == groups[3]
        assert len({frozenset(group) for group in groups}) == 3
        samples = [sample for ticket in tickets for sample in await ticket.all()]
        assert len({tuple(sample.token_ids) for sample in samples}) > 1
        again = service.submit(work(1))
        assert again.requests[0] not in [request for ticket in tickets for request in ticket.requests]


@pytest.mark.parametrize("paused", [False, True])
async def test_a_prompt_that_is_always_asked_for_is_forgotten_in_parts(
    engines: list[MockProcess], monkeypatch: pytest.MonkeyPatch, paused: bool
) -> None:
    monkeypatch.setattr(service_module, "_MOST_SIBLINGS", 4)
    async with serving(engines[:1]) as service:
        if paused:
            await service.pause("keep")
        tickets = [service.submit(work(1)) for _ in range(10)]
        groups = Counter(ticket.requests[0].rpartition("/")[0] for ticket in tickets)
        assert list(groups.values()) == [4, 4, 2]
        large = service.submit(work(2, n=9))
        assert len({request.rpartition("/")[0] for request in large.requests}) == 1
        if paused:
            service.resume()
        first, *others = tickets
        service.cancel(first)
        for ticket in others[:3]:
            await ticket.all()
        assert next(iter(groups)) not in service.core.buffer.groups
        for ticket in others[3:]:
            assert_right((await ticket.all())[0])


async def test_what_comes_in_during_a_pause_counts_as_open(engines: list[MockProcess]) -> None:
    async with serving(engines[:1], serve={"max_requests": 8}) as service:
        before = service.submit(work(1, n=2))
        await service.pause("keep")
        held = [service.submit(work(number, n=2)) for number in (2, 3, 4)]
        with pytest.raises(BusyError, match="8 requests are open, of 8"):
            service.submit(work(5))
        service.cancel(held[0])
        await service.abort(held[1].requests, 0.1)
        held[:2] = [service.submit(work(5, n=4))]
        with pytest.raises(BusyError):
            service.submit(work(6))
        service.resume()
        for ticket in (before, *held):
            for sample in await ticket.all():
                assert_right(sample)
        assert service.core.buffer.open == 0


async def test_options_are_the_groups_own(engines: list[MockProcess]) -> None:
    async with serving(engines[:2]) as service:
        whole = service.submit(work(2, n=2, chunk_size=0))
        short = service.submit(work(2, n=2, sampling=Sampling(max_tokens=5)))
        seeded = [service.submit(msgspec.structs.replace(work(3), seeds=(7,), group=name)) for name in "ab"]
        assert all(len(sample.chunks) == 1 for sample in await whole.all())
        assert all(len(sample.token_ids) <= 5 for sample in await short.all())
        first, second = [(await ticket.all())[0] for ticket in seeded]
        assert first.token_ids == second.token_ids


async def test_pieces_are_the_sample(engines: list[MockProcess]) -> None:
    async with serving(engines[:2]) as service:
        tokens: dict[int, list[int]] = {0: [], 1: []}
        async for piece in service.submit(work(4, n=2)).pieces():
            if piece.sample is None:
                tokens[piece.index] += piece.token_ids
            else:
                assert piece.sample.token_ids == tokens[piece.index]


async def test_what_nobody_wants_any_more_frees_the_engines(engines: list[MockProcess]) -> None:
    async with serving(engines[:1]) as service, httpx.AsyncClient(timeout=60) as client:
        ticket = service.submit(work(5, n=32, sampling=Sampling(max_tokens=MAX_TOKENS, ignore_eos=True)))
        keep = service.submit(work(6))
        await asyncio.sleep(0.1)
        service.cancel(ticket)
        assert service.core.buffer.open <= 1
        assert_right((await keep.all())[0])
        async with asyncio.timeout(60):
            while "vllm:num_requests_running" in (page := (await client.get(f"{engines[0].url}/metrics")).text):
                if all(line.endswith(" 0.0") for line in page.splitlines() if line.startswith("vllm:num_requests_r")):
                    break
                await asyncio.sleep(0.05)


async def test_refusals(engines: list[MockProcess]) -> None:
    async with serving(engines[:1], serve={"max_requests": 4}) as service:
        for wrong in ([], [10**6], [-1], [5] * 20_000):
            with pytest.raises(RefusedError):
                service.submit(Work(prompt_token_ids=wrong, options=OPTIONS))
        service.submit(work(1, n=4))
        with pytest.raises(BusyError):
            service.submit(work(2))


@pytest.mark.parametrize("mode", ["abort", "wait", "keep"])
async def test_pause(engines: list[MockProcess], mode: str) -> None:
    async with serving(engines[:2]) as service:
        before = service.submit(work(7, n=4))
        async with asyncio.timeout(60):
            while not service.core.calls:  # of several chunks each; none has ended yet
                await asyncio.sleep(0)
        await service.pause(mode)
        if mode == "abort":
            await service.end(2.0)
        during = [service.submit(work(7)), service.submit(work(7)), service.submit(work(8))]
        unwanted = service.submit(work(7, n=2))
        service.cancel(unwanted)
        async with asyncio.timeout(60):  # "keep" lets chunks in flight end
            while service.core.calls:
                await asyncio.sleep(0.02)
        await asyncio.sleep(0.1)
        assert not any(ticket.done for ticket in during)
        assert service.core.calls == {}
        assert before.done == (mode != "keep")
        service.resume()
        for ticket in during:
            assert_right((await ticket.all())[0])
        samples = await before.all()
        if mode == "abort":
            assert "abort" in {sample.finish_reason for sample in samples}
        else:
            for sample in samples:
                assert_right(sample)


async def test_engines_come_and_go(engines: list[MockProcess]) -> None:
    async with serving(engines[:2]) as service:
        tickets = [service.submit(work(number, n=4)) for number in range(10)]
        await asyncio.sleep(0.05)
        engines[0].kill()
        name = service.add_engine(engines[2].url)
        async with asyncio.timeout(60):
            while not service.core.instances[name].up:
                await asyncio.sleep(0.05)
        service.remove_engine("engine-1")
        tickets.append(service.submit(work(10, n=4)))  # only the new engine can take it
        samples = [sample for ticket in tickets for sample in await ticket.all()]
        for sample in samples:
            assert_right(sample)
        assert name == "engine-2"
        assert name in {chunk.engine for sample in samples for chunk in sample.chunks}


async def test_one_weight_version_at_a_time(engines: list[MockProcess]) -> None:
    """New weights behind our back: what was begun begins again; a restarted engine with the old ones gets nothing."""
    async with serving(engines[:2]) as service, httpx.AsyncClient(timeout=60) as client:
        tickets = [service.submit(work(number, n=4)) for number in range(10)]
        await asyncio.sleep(0.1)
        for engine in engines[:2]:
            reply = await client.post(f"{engine.url}/update_weight_version", json={"new_version": "v2"})
            reply.raise_for_status()
        samples = [sample for ticket in tickets for sample in await ticket.all()]
        for sample in samples:
            assert_right(sample)
            assert len({chunk.weight_version for chunk in sample.chunks}) == 1
        assert "v2" in {sample.weight_version for sample in samples}
        engines[0].kill()
        await engines[0].start()  # with the weights of the beginning
        await asyncio.sleep(2.5)
        more = [sample for number in range(10) for sample in await service.submit(work(100 + number)).all()]
        assert {sample.weight_version for sample in more} == {"v2"}
        assert {chunk.engine for sample in more for chunk in sample.chunks} == {"engine-1"}
        engines[1].kill()
        (lost,) = await service.submit(work(200)).all()
        assert "no usable engine" in lost.error
        assert "engine-0 must get weight version v2" in lost.error
        reply = await client.post(f"{engines[0].url}/update_weight_version", json={"new_version": "v2"})
        assert_right((await service.submit(work(201)).all())[0])


async def test_a_service_that_ends_leaves_nobody_waiting(engines: list[MockProcess]) -> None:
    async with serving(engines[:1]) as service:
        ticket = service.submit(work(9, n=4))
    samples = await asyncio.wait_for(ticket.all(), 60)
    assert {sample.finish_reason for sample in samples} <= {"error", "abort", "stop", "length"}
