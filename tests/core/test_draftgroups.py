"""Acceptance by group, gathered from engines: each count once, and a bounded number of groups."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import aiohttp

from seer_async.draftgroups import MOST, DraftGroups
from seer_async.engine import EngineClient
from seer_async.report import read_run, report_on
from seer_async.runfolder import RunInfo
from seer_async.types import Prompt
from seer_servers.mock import LanguageModel, MockConfig, MockServer, Speed
from tests.runs import resume, roll

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

A, B = ("a", "1"), ("b", "1")  # engines that started in the same moment


def run_info(**more: Any) -> RunInfo:
    return RunInfo(
        run="r", seer="0", seed=1, config={}, dataset="d", groups=1, samples=1, command=[], started=0.0, **more
    )


def test_counts_are_added_once() -> None:
    info = run_info()
    groups = DraftGroups(info, {})
    groups.hear(A, {"r/g": (2, 8, 4), "other/g": (9, 9, 9)})
    groups.hear(A, {"r/g": (3, 12, 5)})
    groups.hear(B, {"r/g": (1, 4, 1), "r/x/y": (1, 2, 0)})
    assert info.draft_groups == {"g": (4, 16, 6), "x/y": (1, 2, 0)}


def test_a_group_that_an_engine_had_forgotten_goes_on() -> None:
    info = run_info()
    groups = DraftGroups(info, {})
    groups.hear(A, {"r/g": (5, 20, 10)})
    groups.hear(A, {"r/g": (1, 4, 3)})
    assert info.draft_groups == {"g": (6, 24, 13)}


def test_a_resumed_run_goes_on_where_it_was() -> None:
    """On an engine that stayed up, the first page repeats what run.json has; a new engine's is all new."""
    info = run_info(
        draft_groups={"g": (5, 20, 10)}, engines=[{"url": "a", "info": {"boot": "1"}}, {"url": "c", "info": None}]
    )
    groups = DraftGroups(info, {})
    groups.hear(A, {"r/g": (5, 20, 10)})
    groups.hear(A, {"r/g": (6, 24, 11), "r/h": (1, 4, 4)})
    groups.hear(B, {"r/g": (1, 1, 1)})
    assert info.draft_groups == {"g": (7, 25, 12), "h": (1, 4, 4)}


def test_groups_that_were_heard_of_last_are_kept() -> None:
    info = run_info()
    groups = DraftGroups(info, {})
    groups.hear(A, {f"r/{i}": (1, 1, 1) for i in range(MOST)})
    groups.hear(A, {"r/0": (2, 2, 2), "r/new": (1, 1, 1)})
    assert len(info.draft_groups) == MOST
    assert {"0", "new"} <= info.draft_groups.keys()
    assert "1" not in info.draft_groups


async def test_engines_are_asked_and_read() -> None:
    """The mock's counts arrive by engine, position and group, and add up."""
    config = MockConfig(draft_acceptance=0.8, speed=Speed(time_scale=0), model=LanguageModel(sigma=0))
    runner, url = await MockServer(config).start()
    body: dict[str, Any] = {"token_ids": [5, 6, 7], "sampling_params": {"max_tokens": 300, "ignore_eos": True}}
    try:
        async with aiohttp.ClientSession() as session:
            for group in ("r/g", "r/h", "other/g"):
                body["sampling_params"]["extra_args"] = {"seer_group": group}
                async with session.post(f"{url}/inference/v1/generate", json=body) as reply:
                    assert reply.status == 200
            client = EngineClient(url, session)
            await client.attach(timeout_s=5, trial_timeout_s=5)
            info = run_info()
            await DraftGroups(info, {"engine-0": client, "never-attached": EngineClient(url, session)}).ask()
            drafts = (await client.stats(timeout_s=5)).drafts
    finally:
        await runner.cleanup()
    assert drafts is not None
    assert info.draft_groups.keys() == {"g", "h"}
    assert all(60 < verified < 300 and drafted == 4 * verified for verified, drafted, _ in info.draft_groups.values())
    assert drafts.generated == 901  # and the token of the trial
    assert drafts.drafted_at == [drafts.verified] * 4
    assert sum(drafts.accepted_at) == drafts.accepted > sum(counts[2] for counts in info.draft_groups.values()) > 100
    assert drafts.accepted_at == sorted(drafts.accepted_at, reverse=True)


async def test_a_run_that_is_resumed_has_each_count_once(tmp_path: Path) -> None:
    """Engines stay up; run.json ends with what they have counted for the run, in both of its parts."""
    config = MockConfig(draft_acceptance=0.8, speed=Speed(step_ms=2), model=LanguageModel(sigma=0))
    servers = [MockServer(config) for _ in range(2)]
    started = [await server.start() for server in servers]
    prompts = [Prompt(id=f"g{i}", token_ids=[5 + i, 6, 7]) for i in range(3)]
    tree = {"rollout": {"n": 4, "chunk_size": 32}, "sampling": {"max_tokens": 150}}
    urls = [url for _, url in started]
    path = tmp_path / "run"
    try:
        drained = await roll(
            path, urls, prompts, tree, during=lambda it: asyncio.get_running_loop().call_later(0.15, it.drain)
        )
        first = json.loads((path / "run.json").read_text())
        done = await resume(path, urls)
        second = json.loads((path / "run.json").read_text())
    finally:
        for runner, _ in started:
            await runner.cleanup()
    assert (drained.reason, done.reason) == ("drained", "done")
    pages = [server.engine.drafts.page()["by_group"] for server in servers if server.engine.drafts]
    truth = {}
    for prompt in prompts:
        said = [page.get(f"{second['run']}/{prompt.id}", [0, 0, 0]) for page in pages]
        truth[prompt.id] = [sum(counts) for counts in zip(*said, strict=True)]
    assert second["draft_groups"] == truth
    assert all(0 < first["draft_groups"][group][0] < truth[group][0] for group in truth)
    report = report_on(read_run(path))
    assert report.drafts is not None
    assert {group.id for group in report.drafts.groups} == truth.keys()
    assert [len(engine.acceptance) for engine in report.drafts.engines] == [4, 4]
