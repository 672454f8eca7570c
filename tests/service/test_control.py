"""The control plane over mock engine processes, as trainers use it."""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import httpx
import msgspec
import pytest
from aiohttp import web

from seer_async.config import resolve
from seer_async.errors import EngineError, FailureKind, FleetError
from seer_async.options import GroupOptions
from seer_async.sampling import Sampling
from seer_async.service import Service
from seer_async.tickets import Ticket, Work
from seer_async.types import Prompt
from seer_servers.mock import LanguageModel, reference_response
from seer_servers.ports import Ports
from seer_servers.service import pausing, weights
from seer_servers.service.control import Control
from seer_servers.service.errors import ApiError
from tests.live.engines import MockProcess, mock_engines, running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from seer_async.types import Sample

SPEED = ["--step-ms", "2", "--per-request-ms", "0.01", "--mean-length", "60"]
SIZES = (1, 2, 4)
SEED = 4  # with some others, all responses end before what a test does to them
OPTIONS = GroupOptions(sampling=Sampling(max_tokens=200), chunk_size=16)
LONG = GroupOptions(sampling=Sampling(max_tokens=400, ignore_eos=True), chunk_size=16)


@pytest.fixture
def engines() -> Iterator[list[MockProcess]]:
    """Three, of which those that a trainer uses are started."""
    ports = Ports(3)
    three = [MockProcess(port, *SPEED, "--world-size", str(size)) for port, size in zip(ports, SIZES, strict=True)]
    yield three
    for engine in three:
        engine.kill()


@web.middleware
async def errors(request: web.Request, handler: Any) -> web.StreamResponse:
    try:
        return await handler(request)
    except ApiError as error:
        return error.response()


class Trainer:
    """An HTTP client of the control plane, and the service behind it."""

    def __init__(self, service: Service, http: httpx.AsyncClient) -> None:
        self.service = service
        self.http = http

    async def post(self, path: str, body: Any = None, **query: Any) -> Any:
        reply = await self.http.post(path, json=body, params=query)
        assert reply.status_code == 200, reply.text
        return reply.json() if "json" in reply.headers.get("content-type", "") else reply.text

    async def get(self, path: str, **query: Any) -> Any:
        reply = await self.http.get(path, params=query)
        assert reply.status_code == 200, reply.text
        return reply.json()

    async def refused(self, method: str, path: str, body: Any = None, **query: Any) -> tuple[int, str]:
        reply = await self.http.request(method, path, json=body, params=query)
        error = reply.json()["error"]
        assert error["code"] == reply.status_code
        return reply.status_code, error["message"]

    async def states(self) -> dict[str, str]:
        return {each["name"]: each["state"] for each in (await self.get("/workers"))["workers"]}

    async def becomes(self, **states: str) -> None:
        wanted = {name.replace("_", "-"): state for name, state in states.items()}
        await eventually(lambda: self._has(wanted))

    async def _has(self, wanted: dict[str, str]) -> bool:
        return wanted.items() <= (await self.states()).items()

    async def update(self, version: str | None = None, info: Any = None) -> None:
        await self.post("/start_weight_update", {})
        await self.post("/update_weights", {"update_info": info or {}})
        await self.post("/finish_weight_update", {"weight_version": version} if version else {})

    def submit(self, number: int, n: int = 4, options: GroupOptions = OPTIONS) -> Ticket:
        rng = random.Random(number)
        prompt = [rng.randrange(3, 2000) for _ in range(rng.randrange(4, 40))]
        return self.service.submit(Work(prompt_token_ids=prompt, n=n, options=options))


@asynccontextmanager
async def trainer(engines: list[MockProcess], **engine: Any) -> AsyncIterator[Trainer]:
    for each in engines:
        each.launch()
    for each in engines:
        await asyncio.to_thread(each.wait_ready)
    engine = {"telemetry_s": 0.1, "probe_timeout_s": 60.0, "chunk_timeout_s": 20.0, "patience_s": 30.0} | engine
    config = resolve({"engine": engine, "sampling": {"seed": SEED}})
    async with Service(config, [each.url for each in engines]) as service:
        control = Control(service)
        app = web.Application(middlewares=[errors])
        for route in control.routes:
            app.router.add_route(route.method, route.path, route.handler)
        runner = web.AppRunner(app, handler_cancellation=True)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        await control.start()
        host, port = runner.addresses[0][:2]
        async with httpx.AsyncClient(base_url=f"http://{host}:{port}", timeout=60) as http:
            yield Trainer(service, http)
        await control.stop()
        await runner.cleanup()


async def eventually(true: Callable[[], Awaitable[bool]], seconds: float = 60) -> None:
    async with asyncio.timeout(seconds):
        while not await true():
            await asyncio.sleep(0.05)


async def at_work(engines: list[MockProcess], count: int) -> bool:
    """Whether the engines have so many requests."""
    return sum([await running(engine) for engine in engines]) == count


async def stopped(it: Trainer, mode: str) -> bool:
    return it.service.paused == mode


async def observed(it: Trainer, name: str) -> bool:
    """Whether its telemetry was read in this life."""
    return it.service.core.instances[name].stats is not None


async def receive(engines: list[MockProcess]) -> bool:
    """Whether all have begun to receive weights."""
    return all([await calls(engine, "/update_weights") for engine in engines])


async def calls(engine: MockProcess, *paths: str) -> list[dict[str, Any]]:
    async with httpx.AsyncClient(timeout=60) as client:
        said = (await client.get(f"{engine.url}/mock/calls")).json()["calls"]
    return [call for call in said if not paths or call["path"].partition("?")[0] in paths]


async def directly(engine: MockProcess, path: str, body: Any = None, method: str = "POST") -> Any:
    async with httpx.AsyncClient(timeout=60) as client:
        reply = await client.request(method, engine.url + path, json=body)
        assert reply.status_code == 200, reply.text
        return reply.json()


def assert_right(sample: Sample, version: str | None = None) -> None:
    assert not sample.error
    assert {chunk.weight_version for chunk in sample.chunks} == {sample.weight_version}
    model = LanguageModel(mean_length=60.0, version=sample.weight_version)
    tokens, logprobs, _ = reference_response(sample.prompt_token_ids, sample.seed, 200, model=model)
    assert sample.token_ids == tokens
    assert sample.logprobs == pytest.approx(logprobs)
    assert version in {None, sample.weight_version}


# Pause, resume, sleep


@pytest.mark.parametrize("mode", ["abort", "keep", "wait"])
async def test_pause_stops_all_and_resume_goes_on(engines: list[MockProcess], mode: str) -> None:
    async with trainer(engines[:2]) as it:
        tickets = [it.submit(number) for number in range(8)]
        await asyncio.sleep(0.1)
        assert await it.get("/is_paused") == {"is_paused": False}
        assert await it.post("/pause", mode=mode) == {"status": "paused"}
        assert await it.post("/pause", mode=mode) == {"status": "paused"}
        assert await it.get("/is_paused") == {"is_paused": True}
        assert await it.states() == {"engine-0": "PAUSED", "engine-1": "PAUSED"}
        await eventually(lambda: at_work(engines[:2], 0))
        assert all(ticket.done for ticket in tickets) == (mode != "keep")
        late = it.submit(100)
        await asyncio.sleep(1.2)  # a poll finds the engines paused
        assert not late.done
        assert await it.post("/resume") == {"status": "resumed"}
        assert await it.post("/resume") == {"status": "resumed"}
        for sample in await late.all():
            assert_right(sample)
        samples = [sample for ticket in tickets for sample in await ticket.all()]
        assert mode == "abort" or [assert_right(sample) for sample in samples]
        assert mode != "abort" or any(sample.finish_reason == "abort" for sample in samples)
        assert await it.states() == {"engine-0": "UP", "engine-1": "UP"}


async def test_a_pause_that_waits_does_not_wait_for_what_comes_in_meanwhile(engines: list[MockProcess]) -> None:
    async with trainer(engines[:1]) as it:
        before = it.submit(1, options=LONG)
        pause = asyncio.create_task(it.post("/pause", mode="wait"))
        await eventually(lambda: stopped(it, "wait"))
        during = it.submit(2)
        await pause
        assert before.done
        assert not during.done
        await it.post("/resume")
        for sample in await during.all():
            assert_right(sample)


async def test_what_a_pause_has_kept_ends_in_one_that_waits(engines: list[MockProcess]) -> None:
    async with trainer(engines[:1]) as it:
        ticket = it.submit(1)
        await it.post("/pause", mode="keep")
        assert not ticket.done
        await it.post("/pause", mode="wait")
        assert ticket.done
        assert await it.get("/is_paused") == {"is_paused": True}


async def test_resume_ends_a_pause_that_waits(engines: list[MockProcess]) -> None:
    async with trainer(engines[:1]) as it:
        ticket = it.submit(1, options=LONG)
        pause = asyncio.create_task(it.refused("POST", "/pause", mode="wait"))
        await eventually(lambda: stopped(it, "wait"))
        await it.post("/resume")
        status, said = await pause
        assert status == 409
        assert "running" in said
        assert all(not sample.error for sample in await ticket.all())
        assert await it.get("/is_paused") == {"is_paused": False}


async def test_a_pause_has_a_deadline(engines: list[MockProcess], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pausing, "WAIT_S", 0.1)
    async with trainer(engines[:1]) as it:
        it.submit(1, options=LONG)
        status, said = await it.refused("POST", "/pause", mode="wait")
        assert status == 504
        assert "4 requests are still open" in said


async def test_an_engine_that_cannot_pause_is_named(engines: list[MockProcess]) -> None:
    async with trainer(engines[:2], telemetry_s=60.0) as it:
        await eventually(lambda: observed(it, "engine-1"))
        engines[1].kill()  # unnoticed as yet
        status, said = await it.refused("POST", "/pause", mode="keep")
        assert status == 502
        assert said.startswith(f"engine-1 ({engines[1].url}): /pause")
        assert "engine-0" not in said
        assert "nothing is sent" in said


async def test_wrong_parameters(engines: list[MockProcess]) -> None:
    async with trainer(engines[:1]) as it:
        for path, query in (
            ("/pause", {"mode": "now"}),
            ("/pause", {"clear_cache": "perhaps"}),
            ("/sleep", {"level": 3}),
        ):
            status, said = await it.refused("POST", path, **query)
            assert status == 400
            assert "must be" in said
        assert (await it.refused("POST", "/update_weights", {"update_info": 3}))[0] == 400
        assert (await it.refused("POST", "/update_weights", {"update_info": {}}))[0] == 400
        assert (await it.refused("POST", "/finish_weight_update"))[0] == 400
        assert it.service.paused is None


async def test_sleep_and_wake_up(engines: list[MockProcess]) -> None:
    async with trainer(engines[:2]) as it:
        ticket = it.submit(1)
        assert await it.post("/sleep", level=1, mode="keep") == {"status": "sleeping", "level": 1}
        assert await it.get("/is_sleeping") == {"is_sleeping": True}
        assert (await it.post("/wake_up", tags="weights"))["status"] == "sleeping"
        assert not ticket.done
        await it.update("v2")  # as trainers do between the two
        assert not ticket.done
        assert (await it.post("/wake_up", tags="kv_cache"))["status"] == "awake"
        assert await it.get("/is_sleeping") == {"is_sleeping": False}
        samples = await ticket.all()
        for sample in samples:
            assert_right(sample)
        assert "v2" in {sample.weight_version for sample in samples}


async def test_nothing_is_sampled_after_a_sleep_that_discards_weights(engines: list[MockProcess]) -> None:
    """Until there are new ones: by an update while they sleep, or by another way that ends with a name for them."""
    async with trainer(engines[:2], patience_s=60.0) as it:
        ticket = it.submit(1, options=LONG)
        await asyncio.sleep(0.05)
        await it.post("/sleep", level=2, mode="keep")
        assert (await it.post("/wake_up"))["status"] == "awake"
        assert await it.states() == {"engine-0": "STALE", "engine-1": "STALE"}
        assert (await it.refused("GET", "/weight_info"))[0] == 409
        engines[1].kill()
        await engines[1].start()  # a new process has weights, but not those that are wanted
        await eventually(lambda: epoch(it, "engine-1", 2))
        await asyncio.sleep(0.5)
        assert not ticket.done
        assert await it.states() == {"engine-0": "STALE", "engine-1": "STALE"}
        await it.post("/update_weight_version", {"new_version": "v2"})
        for sample in await ticket.all():
            assert {chunk.weight_version for chunk in sample.chunks} == {sample.weight_version} == {"v2"}
        await it.becomes(engine_0="UP", engine_1="UP")

        await it.post("/sleep", level=2, mode="abort")
        assert (await it.post("/wake_up", tags="weights"))["status"] == "sleeping"
        await it.update("v3")
        ticket = it.submit(2)
        assert (await it.post("/wake_up", tags="kv_cache"))["status"] == "awake"
        for sample in await ticket.all():
            assert_right(sample, "v3")


async def test_what_waits_for_weights_in_vain_is_told_so(engines: list[MockProcess]) -> None:
    async with trainer(engines[:1], patience_s=3.0) as it:
        await it.post("/sleep", level=2)
        await it.post("/wake_up")
        (sample,) = await it.submit(3, n=1).all()
        assert "must get weight version none since sleep" in sample.error


async def test_abort_requests(engines: list[MockProcess]) -> None:
    async with trainer(engines[:2]) as it:
        first, second = it.submit(1, options=LONG), it.submit(2, options=LONG)
        await asyncio.sleep(0.05)
        assert (await it.post("/abort_requests", {"request_ids": first.requests}))["aborted"] == 4
        assert {sample.finish_reason for sample in await first.all()} == {"abort"}
        assert not second.done
        assert (await it.post("/abort_requests", {}))["aborted"] == 4
        assert second.done


@pytest.fixture
def hand_back_s(monkeypatch: pytest.MonkeyPatch) -> float:
    """Far more than engines need to hand back what they have."""
    monkeypatch.setattr(pausing, "HAND_BACK_S", 20.0)
    return 20.0


async def test_requests_aborted_by_name_keep_what_engines_have_sampled_of_the_chunk_in_flight(
    engines: list[MockProcess], hand_back_s: float
) -> None:
    """And only those end; the engine is not taken for a paused one."""
    options = GroupOptions(sampling=Sampling(max_tokens=5000, ignore_eos=True), chunk_size=5000)
    whole = GroupOptions(sampling=Sampling(max_tokens=5000, ignore_eos=True), indivisible=True)
    async with trainer(engines[:2]) as it:
        tickets = [it.submit(1, options=options), it.submit(2, options=whole), it.submit(3, options=options)]
        await eventually(lambda: at_work(engines[:2], 12))
        await asyncio.sleep(0.05)  # for the first tokens
        begun = time.monotonic()
        for ticket in tickets[:2]:
            assert (await it.post("/abort_requests", {"request_ids": ticket.requests}))["aborted"] == 4
            for sample in await ticket.all():
                assert sample.finish_reason == "abort"
                assert 0 < len(sample.token_ids) == len(sample.logprobs) < 5000
                assert [chunk.tokens for chunk in sample.chunks] == [len(sample.token_ids)]
        assert time.monotonic() - begun < hand_back_s
        assert not any(instance.closed_until for instance in it.service.core.instances.values())
        assert not tickets[2].done
        assert (await it.post("/abort_requests", {}))["aborted"] == 4
        assert all(sample.token_ids for sample in await tickets[2].all())


async def test_engines_that_cannot_hand_anything_back_keep_nobody_waiting(
    engines: list[MockProcess], hand_back_s: float
) -> None:
    options = GroupOptions(sampling=Sampling(max_tokens=5000, ignore_eos=True), chunk_size=5000)
    async with trainer(engines[:2]) as it:
        for name in it.service.fleet.clients:
            it.service.client(name).hand_back = _cannot  # type: ignore[method-assign]
        ticket = it.submit(1, options=options)
        await eventually(lambda: at_work(engines[:2], 4))
        begun = time.monotonic()
        assert (await it.post("/abort_requests", {"request_ids": ticket.requests}))["aborted"] == 4
        assert time.monotonic() - begun < hand_back_s
        assert [(sample.finish_reason, sample.token_ids) for sample in await ticket.all()] == [("abort", [])] * 4


async def _cannot(*_: Any, **__: Any) -> None:
    raise EngineError(FailureKind.REJECTED, "there is no such route")


@pytest.mark.usefixtures("hand_back_s")
async def test_an_abort_hands_back_what_engines_have_sampled(engines: list[MockProcess]) -> None:
    """In the middle of a chunk, and what waits for the resume ends with nothing."""
    options = GroupOptions(sampling=Sampling(max_tokens=5000, ignore_eos=True), chunk_size=5000)
    async with trainer(engines[:2]) as it:
        ticket = it.submit(1, options=options)
        await eventually(lambda: at_work(engines[:2], 4))
        await asyncio.sleep(0.05)  # for the first tokens
        await it.post("/pause", mode="abort")
        samples = await ticket.all()
        assert {sample.finish_reason for sample in samples} == {"abort"}
        assert all(0 < len(sample.token_ids) < 5000 for sample in samples)
        late, later = it.submit(2), it.submit(2)
        assert (await it.post("/abort_requests", {"request_ids": late.requests}))["aborted"] == 4
        assert [(sample.finish_reason, sample.token_ids) for sample in await late.all()] == [("abort", [])] * 4
        await it.post("/resume")
        for sample in await later.all():
            assert_right(sample)
        assert not it.service.core.buffer.open


# Behind our back


async def test_an_engine_paused_by_others_gets_nothing(engines: list[MockProcess]) -> None:
    async with trainer(engines[:2]) as it:
        await directly(engines[0], "/pause?mode=keep")
        tickets = [it.submit(number) for number in range(6)]
        for ticket in tickets:
            for sample in await ticket.all():
                assert_right(sample)
        await it.becomes(engine_0="PAUSED", engine_1="UP")
        more = it.submit(50)
        await eventually(lambda: held(it, "engine-0"))
        for sample in await it.submit(51).all() + await more.all():
            assert_right(sample)
        assert it.service.core.instances["engine-0"].ejections == 0
        await directly(engines[0], "/resume")
        await it.becomes(engine_0="UP")


async def held(it: Trainer, name: str) -> bool:
    it.submit(random.randrange(10**6), n=1)
    return it.service.core.instances[name].held


async def test_when_all_engines_are_paused_by_others_requests_wait(engines: list[MockProcess]) -> None:
    async with trainer(engines[:2], patience_s=3.0) as it:
        for engine in engines[:2]:
            await directly(engine, "/sleep?mode=keep")
        ticket = it.submit(1)
        await asyncio.sleep(4)  # longer than patience with engines that are gone
        assert not ticket.done
        assert await it.states() == {"engine-0": "PAUSED", "engine-1": "PAUSED"}
        for engine in engines[:2]:
            await directly(engine, "/wake_up")
        for sample in await ticket.all():
            assert_right(sample)


# Weights


async def test_one_group_of_all_workers(engines: list[MockProcess]) -> None:
    async with trainer(engines) as it:
        size = (await it.get("/get_world_size", include_dp="true"))["world_size"]
        assert size == sum(SIZES)
        info = {"master_address": "127.0.0.1", "master_port": 51216, "rank_offset": 1, "world_size": size + 1}
        assert await it.post("/init_weight_transfer_engine", {"init_info": info})
        groups = [(await directly(engine, "/mock/calls", method="GET"))["group"] for engine in engines]
        assert groups == [info | {"rank_offset": offset} for offset in (1, 2, 4)]
        status, said = await it.refused("POST", "/init_weight_transfer_engine", {"init_info": info | {"world_size": 6}})
        assert status == 400
        assert "ask again" in said
        await it.post("/init_weight_transfer_engine", {"init_info": {"backend": "ipc"}})
        await it.post("/start_weight_update")
        await it.post("/update_weights", {"update_info": [{"worker": number} for number in range(size)]})
        parts = [msgspec.json.decode((await calls(engine, "/update_weights"))[-1]["body"]) for engine in engines]
        assert [[each["worker"] for each in part["update_info"]] for part in parts] == [[0], [1, 2], [3, 4, 5, 6]]
        assert (await it.refused("POST", "/update_weights", {"update_info": [{}]}))[0] == 400


async def test_an_update_while_sampling_mixes_nothing(engines: list[MockProcess]) -> None:
    async with trainer(engines) as it:
        samples = []
        for step in range(4):
            tickets = [it.submit(10 * step + number) for number in range(6)]
            await asyncio.sleep(0.15)
            await it.update(f"step-{step}", {"seconds": 0.1})
            assert await it.get("/weight_info") == {"weight_version": f"step-{step}"}
            assert it.service.paused is None
            samples += [sample for ticket in tickets for sample in await ticket.all()]
        for sample in samples:
            assert_right(sample)
        assert "step-3" in {sample.weight_version for sample in samples}
        for engine in engines:
            seen = [call["path"].partition("?")[0] for call in await calls(engine)]
            assert seen[:5] == ["/pause", "/start_weight_update", "/update_weights", "/finish_weight_update", "/resume"]
            assert len(seen) == 20


async def test_all_engines_receive_at_the_same_time(engines: list[MockProcess]) -> None:
    async with trainer(engines) as it:
        await it.post("/pause", mode="keep")
        await it.update("v2", {"seconds": 3})
        received = [(await calls(engine, "/update_weights"))[0] for engine in engines]
        assert max(call["begun"] for call in received) < min(call["ended"] for call in received)
        assert it.service.paused == "keep"  # the trainer's own pause outlives the update
        assert len(await calls(engines[0], "/pause")) == 1
        ticket = it.submit(1)
        await it.post("/resume")
        for sample in await ticket.all():
            assert_right(sample, "v2")


async def test_no_two_updates_have_the_same_version_whatever_the_trainer_calls_them(engines: list[MockProcess]) -> None:
    async with trainer(engines[:2]) as it:
        versions = []
        for name in (None, None, "step-1", "default", "step-1"):
            ticket = it.submit(1, n=16)  # in flight, with tokens of the old weights
            await asyncio.sleep(0.05)
            await it.update(name)
            versions.append((await it.get("/weight_info"))["weight_version"])
            for sample in await ticket.all():
                assert_right(sample)
            for sample in await it.submit(2).all():
                assert_right(sample, versions[-1])
        assert versions[2:] == ["step-1", "default#2", "step-1#2"]
        assert len({"default", *versions}) == 6
        assert (await it.post("/update_weight_version", {"new_version": "step-1#2"}))["new_version"] == "step-1#2"
        assert (await it.post("/update_weight_version", {"new_version": "step-1"}))["new_version"] == "step-1#3"


async def test_an_update_in_one_call(engines: list[MockProcess]) -> None:
    """As prime-rl asks for it: pause, a folder of weights, resume."""
    async with trainer(engines[:2]) as it:
        tickets = [it.submit(number) for number in range(4)]
        await asyncio.sleep(0.1)
        await it.post("/pause", mode="keep", clear_cache="false")
        await it.post("/update_weights", {"weight_dir": "/broadcasts/step_7"})
        assert await it.get("/is_paused") == {"is_paused": True}
        await it.post("/resume")
        for ticket in tickets:
            for sample in await ticket.all():
                assert_right(sample)
        assert it.service.core.versions.current == "step_7"
        for engine in engines[:2]:
            (call,) = await calls(engine, "/update_weights")
            assert msgspec.json.decode(call["body"]) == {"update_info": {"path": "/broadcasts/step_7"}}
        assert (await it.refused("POST", "/update_weights", {}))[0] == 400


async def test_a_repeated_finish_changes_nothing_and_an_overlap_is_refused(engines: list[MockProcess]) -> None:
    async with trainer(engines[:2]) as it:
        await it.post("/start_weight_update")
        assert (await it.refused("POST", "/resume"))[0] == 409
        assert (await it.get("/workers"))["updating"]
        update = asyncio.create_task(it.post("/update_weights", {"update_info": {"seconds": 3}}))
        await eventually(lambda: receive(engines[:2]))
        status, said = await it.refused("POST", "/update_weights", {"update_info": {}})
        assert status == 409
        assert "/update_weights is under way" in said
        await update
        await it.post("/start_weight_update")  # a trainer that was restarted begins again
        await it.post("/finish_weight_update", {"weight_version": "v2"})
        await it.post("/finish_weight_update", {"weight_version": "v2"})
        for sample in await it.submit(1).all():
            assert_right(sample, "v2")


async def test_a_client_that_hangs_up_leaves_no_half_update(engines: list[MockProcess]) -> None:
    async with trainer(engines[:2]) as it:
        await it.post("/start_weight_update")
        update = asyncio.create_task(it.post("/update_weights", {"update_info": {"seconds": 3}}))
        await eventually(lambda: receive(engines[:2]))
        update.cancel()
        await asyncio.wait([update])
        assert (await it.refused("POST", "/finish_weight_update"))[0] == 409
        await eventually(lambda: finished(it, "v2"))
        await it.becomes(engine_0="UP", engine_1="UP")


async def finished(it: Trainer, version: str) -> bool:
    """End the update, if no other call is under way."""
    reply = await it.http.post("/finish_weight_update", json={"weight_version": version})
    assert reply.status_code in {200, 409}, reply.text
    return reply.status_code == 200


async def test_an_engine_killed_in_an_update_is_named_and_the_others_go_on(engines: list[MockProcess]) -> None:
    async with trainer(engines) as it:
        tickets = [it.submit(number) for number in range(6)]
        await it.post("/start_weight_update")
        update = asyncio.create_task(it.refused("POST", "/update_weights", {"update_info": {"seconds": 5}}))
        await eventually(lambda: receive(engines))
        engines[1].kill()
        status, said = await update
        (other,) = await calls(engines[0], "/update_weights")
        assert other["ended"] is None, "it is said at once, not when the others have ended"
        assert status == 424
        assert said.startswith(f"engine-1 ({engines[1].url}): /update_weights")
        assert "engine-0" not in said
        await it.post("/finish_weight_update", {"weight_version": "v2"})
        for ticket in tickets:
            for sample in await ticket.all():
                assert_right(sample)
                assert "engine-1" not in {chunk.engine for chunk in sample.chunks if chunk.weight_version == "v2"}
        await it.becomes(engine_0="UP", engine_1="DOWN", engine_2="UP")
        await engines[1].start()
        await it.becomes(engine_1="STALE")
        assert await it.get("/weight_info") == {
            "weight_version": "v2",
            "others": {f"engine-1 ({engines[1].url})": "default"},
        }
        await it.update("v3")
        await it.becomes(engine_0="UP", engine_1="UP", engine_2="UP")


async def test_an_engine_that_fails_in_an_update_gets_nothing(engines: list[MockProcess]) -> None:
    async with trainer(engines[:2]) as it:
        await it.post("/init_weight_transfer_engine", {"init_info": {}})
        await it.post("/start_weight_update")
        infos = [{}, {"fail": "out of memory"}, {}]  # for one worker of engine-0 and two of engine-1
        status, said = await it.refused("POST", "/update_weights", {"update_info": infos})
        assert status == 424
        assert "engine-1" in said and "out of memory" in said
        await it.post("/finish_weight_update", {"weight_version": "default"})
        worker = await it.get("/workers/engine-1")
        assert worker["state"] == "STALE"
        assert worker["weight_version"] == "default"
        samples = [sample for number in range(8) for sample in await it.submit(number).all()]
        assert {chunk.engine for sample in samples for chunk in sample.chunks} == {"engine-0"}
        await it.update("default")
        await it.becomes(engine_1="UP")


async def test_stragglers_have_a_deadline(engines: list[MockProcess], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "GRACE_S", 0.2)
    async with trainer(engines[:2]) as it:
        await it.post("/start_weight_update")
        infos = [{"seconds": 5}, {"fail": "broken"}, {}]
        assert (await it.refused("POST", "/update_weights", {"update_info": infos}))[0] == 424
        status, said = await it.refused("POST", "/finish_weight_update")
        assert status == 424
        assert "no engine has the whole update" in said
        await it.becomes(engine_0="STALE", engine_1="STALE")


async def test_a_restarted_engine_is_stale_even_if_the_trainer_uses_its_name(engines: list[MockProcess]) -> None:
    async with trainer(engines[:2]) as it:
        await it.update("default")
        engines[0].kill()
        await engines[0].start()
        await it.becomes(engine_0="STALE", engine_1="UP")
        samples = [sample for number in range(8) for sample in await it.submit(number).all()]
        assert {chunk.engine for sample in samples for chunk in sample.chunks} == {"engine-1"}
        assert "version default, the fleet default#2" in (await it.get("/workers/engine-0"))["reason"]
        await it.post("/update_weight_version", {"new_version": "v2"})  # a name does not give it the weights
        await it.becomes(engine_0="STALE")
        assert (await it.get("/weight_info"))["weight_version"] == "v2"
        await it.update("v3")
        await it.becomes(engine_0="UP")
        engines[0].kill()
        await engines[0].start()
        await it.becomes(engine_0="STALE")
        await directly(engines[0], "/update_weight_version", {"new_version": "v3"})  # somebody has seen to it
        await it.becomes(engine_0="UP")


async def test_a_transfer_group_that_has_lost_a_member_is_not_used_silently(engines: list[MockProcess]) -> None:
    async with trainer(engines[:2]) as it:
        info = {"rank_offset": 1, "world_size": 4}
        await it.post("/init_weight_transfer_engine", {"init_info": info})
        engines[0].kill()
        await engines[0].start()
        await eventually(lambda: epoch(it, "engine-0", 2))
        status, said = await it.refused("POST", "/start_weight_update")
        assert status == 424
        assert f"engine-0 ({engines[0].url})" in said
        await it.post("/finish_weight_update", {"weight_version": "v2"})
        await it.becomes(engine_0="STALE", engine_1="UP")
        await it.post("/init_weight_transfer_engine", {"init_info": info})
        await it.update("v3")
        await it.becomes(engine_0="UP", engine_1="UP")


async def epoch(it: Trainer, name: str, number: int) -> bool:
    return it.service.core.instances[name].epoch == number


async def test_a_refused_start_lets_the_fleet_go_on(engines: list[MockProcess]) -> None:
    async with trainer(engines[:1], telemetry_s=60.0) as it:
        await eventually(lambda: observed(it, "engine-0"))
        engines[0].kill()  # unnoticed as yet
        status, said = await it.refused("POST", "/start_weight_update")
        assert status == 424
        assert "engine-0" in said
        assert it.service.paused is None


async def test_an_update_that_was_left_open_does_not_stop_the_next(engines: list[MockProcess]) -> None:
    async with trainer(engines[:2]) as it:
        await directly(engines[0], "/start_weight_update")  # by a trainer that has died
        await it.update("v2")
        for sample in await it.submit(1).all():
            assert_right(sample, "v2")
        await it.becomes(engine_0="UP", engine_1="UP")


# Adapters, caches, workers


async def test_adapters_are_loaded_into_engines_that_come_later(engines: list[MockProcess]) -> None:
    async with trainer(engines[:2]) as it:
        body = {"lora_name": "tiny", "lora_path": "/adapters/tiny"}
        assert "added" in await it.post("/v1/load_lora_adapter", body)
        assert "added" in await it.post("/v1/load_lora_adapter", body)  # a repetition is no mistake
        other = body | {"lora_path": "/elsewhere"}
        status, said = await it.refused("POST", "/v1/load_lora_adapter", other)
        assert status == 400
        assert "already been loaded" in said
        engines[0].kill()
        await engines[0].start()
        await eventually(lambda: epoch(it, "engine-0", 2))
        await it.becomes(engine_0="UP")
        assert await adapters(engines[0]) == {"tiny": "/adapters/tiny"}
        await engines[2].start()
        await it.post("/workers", {"url": engines[2].url})
        await it.becomes(engine_2="UP")
        assert await adapters(engines[2]) == {"tiny": "/adapters/tiny"}
        assert "removed" in await it.post("/v1/unload_lora_adapter", {"lora_name": "tiny"})
        assert not any([await adapters(engine) for engine in engines])
        assert (await it.refused("POST", "/v1/unload_lora_adapter", {"lora_name": "tiny"}))[0] == 404


async def adapters(engine: MockProcess) -> dict[str, str]:
    return {card["id"]: card["root"] for card in (await directly(engine, "/v1/models", method="GET"))["data"][1:]}


async def test_caches_and_worker_methods(engines: list[MockProcess]) -> None:
    async with trainer(engines) as it:
        assert await it.post("/reset_prefix_cache", reset_external="true") == {"success": True}
        assert (await calls(engines[2]))[-1]["path"] == "/reset_prefix_cache?reset_external=true"
        await it.post("/reset_mm_cache")
        await it.post("/reset_encoder_cache")
        assert await it.post("/collective_rpc", {"method": "name"}) == {"results": ["name"] * sum(SIZES)}
        assert (await it.refused("POST", "/collective_rpc", {}))[0] == 400
        assert (await it.refused("POST", "/collective_rpc", {"method": "name", "timeout": -5}))[0] == 400


async def test_workers_come_and_go(engines: list[MockProcess]) -> None:
    with mock_engines([*SPEED, "--model", "another"]) as (foreign,):
        async with trainer(engines[:2]) as it:
            await engines[2].start()
            tickets = [it.submit(number) for number in range(10)]
            await asyncio.sleep(0.1)
            added = await it.post("/workers", {"url": engines[2].url + "/"})
            assert added["name"] == "engine-2"
            assert (await it.post("/workers", {"url": engines[2].url}))["name"] == "engine-2"
            assert (await it.http.delete("/workers/engine-0")).status_code == 200
            assert (await it.http.delete("/workers", params={"url": engines[1].url})).status_code == 200
            assert list(await it.states()) == ["engine-2"]
            for ticket in tickets:
                for sample in await ticket.all():
                    assert_right(sample)
            assert (await it.refused("DELETE", "/workers/engine-0"))[0] == 404
            assert (await it.refused("GET", "/workers/engine-9"))[0] == 404
            for url, why in (
                (foreign.url, "it needs one model"),
                ("http://127.0.0.1:1", "no vLLM server"),
                ("file:///etc/passwd", "is no URL"),
            ):
                status, said = await it.refused("POST", "/workers", {"url": url})
                assert status == 400
                assert why in said
            assert (await it.get("/workers"))["weight_version"] == "default"
            assert (await it.http.delete("/workers/engine-2")).status_code == 200
            with pytest.raises(FleetError, match="has no engine"):
                await it.service.fleet.tokenise([Prompt(id="p", text="nobody reads this")])


async def test_workers_are_removed_as_routers_do_it(engines: list[MockProcess]) -> None:
    async with trainer(engines[:2]) as it:
        reply = await it.http.delete(f"/workers/{quote(engines[0].url, safe='')}")
        assert reply.status_code == 200 and reply.json()["url"] == engines[0].url
        assert list(await it.states()) == ["engine-1"]


async def test_an_engine_added_after_an_update_is_stale(engines: list[MockProcess]) -> None:
    async with trainer(engines[:2]) as it:
        await engines[2].start()
        await it.update("default")
        await it.post("/workers", {"url": engines[2].url})
        await it.becomes(engine_2="STALE")
        await it.update("default")
        await it.becomes(engine_2="UP")
