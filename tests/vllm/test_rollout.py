"""The main job on real vLLM: complete, moving between engines, losing nothing when an engine is killed."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING

import httpx
import pytest

from seer_async.dataset import default_dataset, read_dataset
from seer_async.types import Prompt
from tests.runs import resume, roll, samples

if TYPE_CHECKING:
    from pathlib import Path

    from seer_async.rollout import Rollout
    from seer_servers.fleet import LocalFleet

pytestmark = pytest.mark.vllm


async def test_the_main_job(vllm_fleet: LocalFleet, tmp_path: Path) -> None:
    """8 prompts x 8 responses at T=1 over two engines."""
    prompts = read_dataset(default_dataset(), 8)
    tree = {
        "rollout": {"n": 8, "chunk_size": 32},
        "sampling": {"max_tokens": 96, "logprobs": 1, "seed": 2},
        "output": {"trace": True},
    }
    result = await roll(tmp_path / "run", vllm_fleet.urls, prompts, tree)
    assert result.exit_code == 0
    assert result.snapshot.preemptions == 0
    assert result.snapshot.migrations > 0
    by_id = samples(tmp_path / "run")
    assert len(by_id) == 64
    assert {chunk["engine"] for sample in by_id.values() for chunk in sample["chunks"]} == {"engine-0", "engine-1"}
    for sample in by_id.values():
        assert sample["finish_reason"] in {"stop", "length"}
        assert len(sample["token_ids"]) == len(sample["logprobs"]) == sum(c["tokens"] for c in sample["chunks"])
        assert all(c["weight_version"] == "default" for c in sample["chunks"])
        assert sample["text"]
    texts = [sample["text"] for sample in by_id.values() if len(sample["token_ids"]) > 20]
    assert len(set(texts)) > 0.8 * len(texts), "samples must be independent; some questions have one short answer"


async def test_interrupted_and_resumed_is_the_same_run(vllm_fleet: LocalFleet, tmp_path: Path) -> None:
    """Aborting leaves nothing running on the engines; resuming continues each response from its last chunk."""
    prompts = read_dataset(default_dataset(), 4)
    tree = {
        "rollout": {"n": 4, "chunk_size": 16},
        "sampling": {"max_tokens": 96, "temperature": 1.0, "seed": 8, "ignore_eos": True},
    }
    await roll(tmp_path / "whole", vllm_fleet.urls, prompts, tree)

    def abort_halfway(rollout: Rollout) -> None:
        async def abort() -> None:
            while sum(i.generated for i in rollout.core.instances.values()) < 600:
                await asyncio.sleep(0.02)
            rollout.abort()

        rollout.aborter = asyncio.get_running_loop().create_task(abort())  # type: ignore[attr-defined]

    cut = await roll(tmp_path / "cut", vllm_fleet.urls, prompts, tree, during=abort_halfway)
    assert (cut.reason, cut.exit_code) == ("aborted", 130)
    await _until_idle(vllm_fleet.urls)
    redone = await resume(tmp_path / "cut", vllm_fleet.urls)
    assert redone.exit_code == 0
    assert sum(view.generated for view in redone.snapshot.engines) < 16 * 96, "resuming must not start over"
    whole, cut_samples = samples(tmp_path / "whole"), samples(tmp_path / "cut")
    assert {k: s["token_ids"] for k, s in whole.items()} == {k: s["token_ids"] for k, s in cut_samples.items()}


async def _until_idle(urls: list[str]) -> None:
    async with httpx.AsyncClient(timeout=10) as client:
        for _ in range(40):
            pages = [(await client.get(f"{url}/metrics")).text for url in urls]
            lines = [line for page in pages for line in page.splitlines()]
            running = [line for line in lines if line.startswith("vllm:num_requests_running{")]
            if all(float(line.rsplit(" ", 1)[1]) == 0 for line in running):
                return
            await asyncio.sleep(0.25)
    raise AssertionError("an aborted run left work on the engines")


async def test_bad_prompts_are_named_before_anything_is_sampled(vllm_fleet: LocalFleet, tmp_path: Path) -> None:
    for prompt, says in [
        (Prompt(id="long", line=3, token_ids=[5] * 2048), "line 3 .*2048 tokens.*context ends at 2048"),
        (Prompt(id="foreign", line=4, token_ids=[10**6]), "line 4 .*outside the model's vocabulary"),
    ]:
        with pytest.raises(Exception, match=says):
            await roll(tmp_path / prompt.id, vllm_fleet.urls, [prompt], {})
        assert not (tmp_path / prompt.id).exists()


async def test_weights_that_change_in_the_middle_restart_what_would_be_mixed(
    vllm_fleet: LocalFleet, tmp_path: Path
) -> None:
    prompts = read_dataset(default_dataset(), 4)
    tree = {"rollout": {"n": 2, "chunk_size": 16}, "sampling": {"max_tokens": 80, "ignore_eos": True}}

    def change_weights(rollout: Rollout) -> None:
        async def change() -> None:
            while sum(i.generated for i in rollout.core.instances.values()) < 200:
                await asyncio.sleep(0.02)
            async with httpx.AsyncClient(timeout=30) as client:
                for url in vllm_fleet.urls:
                    await client.post(f"{url}/update_weight_version", json={"new_version": "step-1"})

        rollout.changer = asyncio.get_running_loop().create_task(change())  # type: ignore[attr-defined]

    try:
        result = await roll(tmp_path / "run", vllm_fleet.urls, prompts, tree, during=change_weights)
    finally:
        async with httpx.AsyncClient(timeout=30) as client:
            for url in vllm_fleet.urls:
                await client.post(f"{url}/update_weight_version", json={"new_version": "default"})
    assert result.snapshot.restarts > 0
    for sample in samples(tmp_path / "run").values():
        assert len({chunk["weight_version"] for chunk in sample["chunks"]}) == 1
        assert sample["on_policy"]
        assert len(sample["token_ids"]) == 80


async def test_a_killed_engine_costs_its_chunks_in_flight_only(vllm_fleet: LocalFleet, tmp_path: Path) -> None:
    """Last of the file: nobody waits until the engine is back."""
    prompts = read_dataset(default_dataset(), 6)
    tree = {
        "rollout": {"n": 4, "chunk_size": 24},
        "sampling": {"max_tokens": 96, "temperature": 1.0, "seed": 3, "ignore_eos": True},
    }
    await roll(tmp_path / "quiet", vllm_fleet.urls, prompts, tree)

    def kill_later(rollout: Rollout) -> None:
        async def kill() -> None:
            while rollout.core.instances["engine-1"].generated < 300:
                await asyncio.sleep(0.05)
            os.killpg(vllm_fleet.engines[1].process.pid, signal.SIGKILL)

        rollout.killer = asyncio.get_running_loop().create_task(kill())  # type: ignore[attr-defined]

    result = await roll(tmp_path / "killed", vllm_fleet.urls, prompts, tree, during=kill_later)
    assert result.exit_code == 0
    quiet, killed = samples(tmp_path / "quiet"), samples(tmp_path / "killed")
    assert {k: s["token_ids"] for k, s in quiet.items()} == {k: s["token_ids"] for k, s in killed.items()}
