"""Rollouts as jobs over mock engine processes: what was begun is read whole, whoever goes away meanwhile."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import stat
from typing import TYPE_CHECKING, Any

import httpx
import msgspec
import pytest

from seer_async.sampling import response_seed
from seer_servers.mock import LanguageModel, reference_response
from tests.live.engines import running
from tests.service.serving import FAST, SLOW, mock_engines, prompts, served

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from tests.live.engines import MockProcess

MODEL = LanguageModel(mean_length=60.0)


@pytest.fixture(scope="module")
def fast() -> Iterator[list[MockProcess]]:
    with mock_engines(FAST, FAST) as engines:
        yield engines


@pytest.fixture(scope="module")
def slow() -> Iterator[list[MockProcess]]:
    with mock_engines(SLOW) as engines:
        yield engines


def http(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, timeout=30)


async def begin(client: httpx.AsyncClient, count: int, n: int, **fields: Any) -> dict[str, Any]:
    reply = await client.post("/v1/rollouts", json={"prompts": prompts(count), "n": n} | fields)
    assert reply.status_code == 202, reply.text
    return reply.json()


async def read(client: httpx.AsyncClient, job: str, query: str = "") -> list[dict[str, Any]]:
    reply = await client.get(f"/v1/rollouts/{job}/samples{query}")
    assert reply.status_code == 200, reply.text
    return [json.loads(line) for line in reply.content.split(b"\n") if line]


async def look(client: httpx.AsyncClient, job: str) -> dict[str, Any]:
    return (await client.get(f"/v1/rollouts/{job}")).json()


async def until(client: httpx.AsyncClient, job: str, **fields: Any) -> dict[str, Any]:
    async with asyncio.timeout(60):
        while not fields.items() <= (status := await look(client, job)).items():
            await asyncio.sleep(0.05)
    return status


def files(folder: Path, pattern: str) -> list[Path]:
    return [path for path in folder.glob(pattern) if path.is_file()]


def assert_right(sample: dict[str, Any], model: LanguageModel = MODEL) -> None:
    model = msgspec.structs.replace(model, version=sample["weight_version"])
    tokens, _, reason = reference_response(sample["prompt_token_ids"], sample["seed"], 200, model=model)
    assert (sample["token_ids"], sample["finish_reason"]) == (tokens, reason)


async def test_every_sample_is_there_and_right(fast: list[MockProcess], tmp_path: Path) -> None:
    async with served(fast, tmp_path) as app, http(app.url) as client:
        job = await begin(client, 12, 4, sampling={"seed": 5})
        assert job["groups"] == 12 and job["samples"] == 48
        found = await read(client, job["id"])
        assert sorted(sample["id"] for sample in found) == sorted(f"p{g}/{i}" for g in range(12) for i in range(4))
        for sample in found:
            assert_right(sample)
            assert sample["seed"] == response_seed(5, sample["group"], sample["index"])  # as in `seer rollout`
        status = await look(client, job["id"])
        assert status["status"] == "done" and status["done"] == 48 and status["eta_s"] == 0
        assert status["tokens"] == sum(len(sample["token_ids"]) for sample in found)
        again = await begin(client, 12, 4, sampling={"seed": 5})
        tokens = {sample["id"]: sample["token_ids"] for sample in found}
        assert {sample["id"]: sample["token_ids"] for sample in await read(client, again["id"])} == tokens
        assert [each["id"] for each in (await client.get("/v1/rollouts")).json()["rollouts"]] == [
            again["id"],
            job["id"],
        ]


async def test_token_ids_are_keys_in_json(fast: list[MockProcess], tmp_path: Path) -> None:
    async with served(fast, tmp_path) as app, http(app.url) as client:
        job = await begin(client, 1, 2, sampling={"logit_bias": {"5": 1.0}})
        assert len(await read(client, job["id"])) == 2


async def test_groups_are_whole_and_in_order(fast: list[MockProcess], tmp_path: Path) -> None:
    async with served(fast, tmp_path) as app, http(app.url) as client:
        job = await begin(client, 10, 5)
        groups = await read(client, job["id"], "?by=group")
        assert {group["group"] for group in groups} == {f"p{number}" for number in range(10)}
        for group in groups:
            assert [sample["id"] for sample in group["samples"]] == [f"{group['group']}/{index}" for index in range(5)]
        finished: dict[str, int] = {}
        for number, sample in enumerate(await read(client, job["id"])):
            finished[sample["group"]] = number  # of its last sample
        assert [group["group"] for group in groups] == sorted(finished, key=lambda group: finished[group])
        assert await read(client, job["id"], "?by=group&after=7") == groups[7:]


async def test_reading_on_loses_and_repeats_nothing(slow: list[MockProcess], tmp_path: Path) -> None:
    """The connection is dropped after every few samples, as NDJSON and as events."""
    async with served(slow, tmp_path) as app, http(app.url) as client:
        job = await begin(client, 6, 6)
        found: list[bytes] = []
        drops = 0
        while len(found) < 36:
            drops += 1
            async for line in _lines(client, job["id"], {"after": str(len(found))}, {}):
                found.append(line)
                if len(found) % 5 == 0:
                    break
        assert drops > 5
        events: dict[int, bytes] = {}
        last = "0"
        while len(events) < 36:
            headers = {"Accept": "text/event-stream", "Last-Event-ID": last}
            async for line in _lines(client, job["id"], {}, headers):
                if line.startswith(b"id: "):
                    last = line[4:].decode()
                    assert int(last) not in events
                elif line.startswith(b"data: ") and int(last) not in events:
                    events[int(last)] = line[6:]
                    if int(last) % 7 == 0:
                        break
        assert list(events) == list(range(1, 37))
        assert list(events.values()) == found
        assert len({json.loads(line)["id"] for line in found}) == 36
        reply = await client.get(f"/v1/rollouts/{job['id']}/samples?after=36", headers={"Accept": "text/event-stream"})
        assert reply.text == 'event: end\ndata: {"status":"done","error":""}\n\n'


async def _lines(
    client: httpx.AsyncClient, job: str, params: dict[str, str], headers: dict[str, str]
) -> AsyncIterator[bytes]:
    async with client.stream("GET", f"/v1/rollouts/{job}/samples", params=params, headers=headers) as reply:
        rest = b""
        async for part in reply.aiter_bytes():
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                if line:
                    yield line


async def test_a_key_begins_one_rollout(fast: list[MockProcess], tmp_path: Path) -> None:
    async with served(fast, tmp_path) as app, http(app.url) as client:
        body = {"prompts": [{"prompt": f"text {number}"} for number in range(40)], "n": 2}
        headers = {"Idempotency-Key": "once"}
        replies = await asyncio.gather(*(client.post("/v1/rollouts", json=body, headers=headers) for _ in range(5)))
        assert {reply.status_code for reply in replies} == {202}
        assert len({reply.json()["id"] for reply in replies}) == 1
        other = await client.post("/v1/rollouts", json=body | {"n": 3}, headers=headers)
        assert other.status_code == 409 and "Idempotency-Key" in other.json()["error"]["message"]
        fresh = await client.post("/v1/rollouts", json=body, headers={"Idempotency-Key": "twice"})
        assert fresh.json()["id"] != replies[0].json()["id"]
        assert len(await read(client, fresh.json()["id"])) == 80


async def test_cancelling_frees_the_engines(slow: list[MockProcess], tmp_path: Path) -> None:
    async with served(slow, tmp_path) as app, http(app.url) as client:
        job = await begin(client, 8, 8, sampling={"ignore_eos": True, "max_tokens": 900}, chunk_size=0)
        keep = await begin(client, 1, 2)
        async with asyncio.timeout(60):
            while await running(slow[0]) < 60:
                await asyncio.sleep(0.05)
        reading = asyncio.create_task(read(client, job["id"]))
        status = (await client.delete(f"/v1/rollouts/{job['id']}")).json()
        assert (status["status"], status["open"], status["waiting"]) == ("cancelled", 0, 0)
        assert await asyncio.wait_for(reading, 60) == []
        assert len(await read(client, keep["id"])) == 2
        async with asyncio.timeout(60):
            while await running(slow[0]):
                await asyncio.sleep(0.05)
        assert not app.service.core.buffer.groups
        assert (await client.delete(f"/v1/rollouts/{job['id']}")).json()["status"] == "cancelled"


async def test_a_rollout_larger_than_the_room(fast: list[MockProcess], tmp_path: Path) -> None:
    """Two rollouts of 160 responses over a service that takes 16, others among them: all take turns."""
    most = 0
    async with served(fast, tmp_path, serve={"max_requests": 16}) as app, http(app.url) as client:
        jobs = [await begin(client, 40, 4), await begin(client, 40, 4)]

        async def watch() -> None:
            nonlocal most
            while True:
                most = max(most, app.service.core.buffer.open)
                await asyncio.sleep(0)

        watching = asyncio.create_task(watch())
        async with asyncio.timeout(60):
            statuses: list[dict[str, Any]] = []
            while not statuses or not all(status["done"] for status in statuses):
                statuses = [await look(client, job["id"]) for job in jobs]
        assert all(status["waiting"] > 0 for status in statuses)
        assert all(status["tokens_left"] > 0 and status["eta_s"] > 0 for status in statuses)
        found = [await read(client, job["id"]) for job in jobs]
        watching.cancel()
        assert [len({sample["id"] for sample in samples}) for samples in found] == [160, 160]
        assert 4 <= most <= 8
        wrong = await client.post("/v1/rollouts", json={"prompts": prompts(1), "n": 17})
        assert wrong.status_code == 400 and "serve.max_requests" in wrong.text


async def test_too_many_rollouts(slow: list[MockProcess], tmp_path: Path) -> None:
    async with served(slow, tmp_path, jobs={"max_open": 2}) as app, http(app.url) as client:
        jobs = [await begin(client, 2, 8) for _ in range(2)]
        refused = await client.post("/v1/rollouts", json={"prompts": prompts(1)})
        assert refused.status_code == 429 and int(refused.headers["Retry-After"]) >= 1
        await client.delete(f"/v1/rollouts/{jobs[0]['id']}")
        await begin(client, 1, 1)


async def test_a_dataset(fast: list[MockProcess], tmp_path: Path) -> None:
    lines = [
        '{"prompt": "hi", "answer": 4}',
        "",
        '{"id": 7, "messages": [{"role": "user", "content": "yo"}]}',
    ]
    headers = {"Content-Type": "application/x-ndjson"}
    query = {"n": "3", "chunk_size": "8", "sampling": '{"max_tokens": 20}', "stream": "true"}
    async with served(fast, tmp_path) as app, http(app.url) as client:
        reply = await client.post("/v1/rollouts", content="\n".join(lines), headers=headers, params=query)
        found = [json.loads(line) for line in reply.text.splitlines() if line]
        assert sorted(sample["id"] for sample in found) == sorted(f"{g}/{i}" for g in ("line-1", "7") for i in range(3))
        first = next(sample for sample in found if sample["group"] == "line-1")
        assert (first["prompt"], first["extra"], first["run"]) == (
            "hi",
            {"answer": 4},
            reply.headers["X-Seer-Rollout"],
        )
        assert all(len(sample["token_ids"]) <= 20 for sample in found)
        bad = await client.post("/v1/rollouts", content="\n".join([*lines, "{}"]), headers=headers)
        assert bad.status_code == 400 and "dataset:4" in bad.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"prompts": []}, "no prompts"),
        ({"prompts": [{"prompt": "a"}, {"prompt": ""}]}, "prompts:2"),
        ({"prompts": [{"id": "a", "prompt": "x"}, {"id": "a", "prompt": "y"}]}, "already on line 1"),
        ({"prompts": [{"prompt_token_ids": [10**6]}]}, "line 1"),
        ({"prompts": [{"prompt_token_ids": [5] * 20_000}]}, "context"),
        ({"prompts": [{"prompt": "x"}], "n": 0}, "n must"),
        ({"prompts": [{"prompt": "x"}], "chunk_size": -1}, "chunk_size"),
        ({"prompts": [{"prompt": "x"}], "sampling": {"best_of": 2}}, "best_of"),
        ({"prompts": [{"prompt": "x"}], "sampling": {"top_p": 7}}, "top_p"),
        ({"prompts": [{"prompt": "x"}], "sampling": {"tempo": 1}}, "tempo"),
        ({"prompts": [{"prompt": "x"}], "priority": 1}, "priority"),
        ({"prompts": "x"}, "prompts"),
        ([], "object"),
    ],
)
async def test_what_is_wrong_is_named(fast: list[MockProcess], tmp_path: Path, body: Any, says: str) -> None:
    async with served(fast, tmp_path) as app, http(app.url) as client:
        reply = await client.post("/v1/rollouts", json=body)
        assert reply.status_code == 400 and says in reply.json()["error"]["message"]
        assert (await client.get("/v1/rollouts")).json() == {"rollouts": []}


async def test_wrong_readers(fast: list[MockProcess], tmp_path: Path) -> None:
    async with served(fast, tmp_path) as app, http(app.url) as client:
        job = (await begin(client, 1, 1))["id"]
        for query in ("after=-1", "after=x", "after=²", "after=" + "9" * 30, "by=token"):
            assert (await client.get(f"/v1/rollouts/{job}/samples?{query}")).status_code == 400
        for name in ("nobody", "..%2f..%2fetc", "%00"):
            for call in (client.get(f"/v1/rollouts/{name}"), client.get(f"/v1/rollouts/{name}/samples")):
                assert (await call).status_code == 404


async def test_hostile_ids(fast: list[MockProcess], tmp_path: Path) -> None:
    """Names travel as they are, and nothing else happens."""
    names = [
        "../../etc/passwd",
        "a\nid: 99\ndata: {}\n\n",
        "<img src=x onerror=alert(1)>",
        "\u2028\u2029\x85",
        "\x00",
        "/",
        "é" * 300,
    ]
    given = [{"id": name, "prompt_token_ids": [5, 6, 7 + number]} for number, name in enumerate(names)]
    async with served(fast, tmp_path) as app, http(app.url) as client:
        job = (await client.post("/v1/rollouts", json={"prompts": given, "n": 2})).json()["id"]
        found = await read(client, job)
        assert sorted(sample["id"] for sample in found) == sorted(f"{name}/{i}" for name in names for i in range(2))
        reply = await client.get(f"/v1/rollouts/{job}/samples", headers={"Accept": "text/event-stream"})
        datas = [line for line in reply.content.split(b"\n") if line.startswith(b"data: ")]
        assert [json.loads(data[6:]) for data in datas[:-1]] == found
        assert {group["group"] for group in await read(client, job, "?by=group")} == set(names)
    written = files(tmp_path, "**/*")
    assert {path.name for path in written} == {"lock", "job.json", "prompts.jsonl", "samples.jsonl", "index"}
    for path in written:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


async def test_a_restarted_server(slow: list[MockProcess], tmp_path: Path) -> None:
    """What ran is lost, what had finished of it is not; what was done is as it was. The living are left alone."""
    async with served(slow, tmp_path) as app, http(app.url) as client:
        done = await begin(client, 1, 2)
        before = await read(client, done["id"])
        lost = await begin(client, 4, 8)
        await until(client, done["id"], status="done")
        async with asyncio.timeout(60):
            while (await look(client, lost["id"]))["spooled"] < 5:
                await asyncio.sleep(0.02)
        async with served(slow, tmp_path) as neighbour, http(neighbour.url) as other:
            assert (await other.get("/v1/rollouts")).json() == {"rollouts": []}
    torn = files(tmp_path, f"*/{lost['id']}/index")[0].parent
    with (torn / "index").open("ab") as index, (torn / "samples.jsonl").open("ab") as samples:
        index.write(b"torn")  # as a crash in the middle leaves them
        samples.write(b'{"id": "half')
    async with served(slow, tmp_path) as app, http(app.url) as client:
        statuses = {each["id"]: each for each in (await client.get("/v1/rollouts")).json()["rollouts"]}
        assert statuses[done["id"]]["status"] == "done"
        assert await read(client, done["id"]) == before
        status = statuses[lost["id"]]
        assert status["status"] == "lost" and "server" in status["error"]
        found = await read(client, lost["id"])
        assert 5 <= len(found) == status["spooled"] == len({sample["id"] for sample in found})
        for sample in found:
            assert_right(sample, LanguageModel(mean_length=200.0))


async def test_old_rollouts_go(fast: list[MockProcess], tmp_path: Path) -> None:
    async with served(fast, tmp_path, jobs={"keep_s": 0.2}) as app, http(app.url) as client:
        job = (await begin(client, 2, 2))["id"]
        assert len(await read(client, job)) == 4
        async with asyncio.timeout(60):
            while (await client.get(f"/v1/rollouts/{job}")).status_code != 404:
                await asyncio.sleep(0.1)
    assert not files(tmp_path, "*/*/samples.jsonl")


async def test_room_is_made_by_dropping_the_oldest(fast: list[MockProcess], tmp_path: Path) -> None:
    async with served(fast, tmp_path, jobs={"spool_gib": 100_000 / (1 << 30)}) as app, http(app.url) as client:
        jobs = []
        for _ in range(12):
            jobs.append((await begin(client, 2, 4))["id"])
            assert len(await read(client, jobs[-1])) == 8
        kept = [each["id"] for each in (await client.get("/v1/rollouts")).json()["rollouts"]]
        assert 0 < len(kept) < 12
        assert kept == jobs[::-1][: len(kept)]
        too_big = await begin(client, 40, 8)
        status = await until(client, too_big["id"], status="failed")
        assert "spool_gib" in status["error"]
        assert app.service.core.buffer.open == 0
        small = await begin(client, 1, 1)  # the failed one makes room
        assert len(await read(client, small["id"])) == 1


async def test_a_full_disk_ends_the_rollout_only(fast: list[MockProcess], tmp_path: Path) -> None:
    async with served(fast, tmp_path) as app, http(app.url) as client:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
        try:
            job = (await begin(client, 40, 8))["id"]
            status = await until(client, job, status="failed")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "cannot be written" in status["error"] and os.strerror(27) in status["error"]
        found = await read(client, job)
        assert 0 < len(found) == status["spooled"] < 320
        assert app.service.core.buffer.open == 0
        assert len(await read(client, (await begin(client, 4, 4))["id"])) == 16
