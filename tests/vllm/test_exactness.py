"""Chunked sampling on real vLLM is undivided sampling, token for token, with every option that is accepted.

The engines run in float32, where a prefix computed in one prefill and one computed token by token agree closely enough
that greedy and seeded runs do not drift apart.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from seer_async.dataset import default_dataset, read_dataset
from tests.runs import roll, samples

if TYPE_CHECKING:
    from pathlib import Path

    from seer_servers.fleet import LocalFleet

pytestmark = pytest.mark.vllm

CHUNK_SIZES = (7, 16, 64, 0)
MAX_TOKENS = 66
SPECIAL = "greedy, allowed tokens, special ones shown"
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "greedy, penalties": {
        "temperature": 0.0,
        "presence_penalty": 0.7,
        "frequency_penalty": 0.4,
        "repetition_penalty": 1.1,
    },
    "greedy, stop strings": {"temperature": 0.0, "stop": [" the", "\n\n", "ion of"]},
    "greedy, stop string kept": {"temperature": 0.0, "stop": ["ing "], "include_stop_str_in_output": True},
    "greedy, min_tokens": {"temperature": 0.0, "min_tokens": 58},
    "greedy, no eos": {"temperature": 0.0, "ignore_eos": True},
    "greedy, bad words, bias": {
        "temperature": 0.0,
        "bad_words": [" the", " is a"],
        "logit_bias": {198: -5.0, 253: 2.0},
    },
    SPECIAL: {
        "temperature": 0.0,
        "allowed_token_ids": [*range(3, 17), 28, 30, 198],  # SmolLM2's special tokens but those that end it, and others
        "frequency_penalty": 1.0,
        "max_tokens": 40,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
    },
    "greedy, stop tokens, alternatives": {"temperature": 0.0, "stop_token_ids": [198, 30], "logprobs": 3},
    "seeded": {"temperature": 1.0, "seed": 11},
    "seeded, filtered": {"temperature": 0.8, "seed": 12, "top_p": 0.9, "top_k": 40, "min_p": 0.02},
    "seeded, penalties, stop": {
        "temperature": 1.0,
        "seed": 13,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
        "stop": ["\n\n"],
        "min_tokens": 10,
    },
}


Runs = dict[int, dict[str, Any]]  # samples by id, by chunk size


@pytest.fixture(scope="module")
def runs(vllm_fleet: LocalFleet, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Runs]:
    """Every option set at every chunk size, all at once: a full batch takes the engines a third of the time."""

    async def everything() -> list[Runs]:
        return await asyncio.gather(*(_sampled(vllm_fleet, tmp_path_factory.mktemp("run"), name) for name in OPTIONS))

    return dict(zip(OPTIONS, asyncio.run(everything()), strict=True))


async def _sampled(fleet: LocalFleet, folder: Path, name: str) -> Runs:
    prompts = read_dataset(default_dataset(), 3)

    async def chunked(size: int) -> dict[str, Any]:
        tree = {
            "rollout": {"n": 1, "chunk_size": size},
            "sampling": {"max_tokens": MAX_TOKENS, "seed": 5} | OPTIONS[name],
            "scheduler": {"affinity": 0.0, "pooled_affinity": 0.0},  # move as often as balance allows
            "engine": {"kv_pool": size != 16},  # the pool and computing again must agree, too
        }
        result = await roll(folder / str(size), fleet.urls, prompts, tree)
        assert result.exit_code == 0
        return samples(folder / str(size))

    return dict(zip(CHUNK_SIZES, await asyncio.gather(*map(chunked, CHUNK_SIZES)), strict=True))


@pytest.mark.parametrize("name", OPTIONS)
def test_chunk_size_does_not_matter(runs: dict[str, Runs], name: str) -> None:
    mine = runs[name]
    whole = mine[0]
    assert all(len(sample["chunks"]) == 1 for sample in whole.values())
    assert any(len(sample["chunks"]) > 3 for sample in mine[7].values())
    for size in CHUNK_SIZES[:-1]:
        for key, sample in mine[size].items():
            expected = whole[key]
            assert sample["token_ids"] == expected["token_ids"], f"{key} differs at chunk size {size}"
            assert sample["text"] == expected["text"]
            for field in ("finish_reason", "stop_reason"):
                assert sample[field] == expected[field]
            assert sample["logprobs"] == pytest.approx(expected["logprobs"], abs=2e-3)
            if sample["top_logprobs"]:
                assert [len(tops) for tops in sample["top_logprobs"]] == [3] * len(sample["token_ids"])


def test_special_tokens_were_shown(runs: dict[str, Runs]) -> None:
    assert any(
        "<" in sample["text"] and set(sample["token_ids"]) & set(range(3, 17)) for sample in runs[SPECIAL][7].values()
    )


def test_chunks_moved_and_were_loaded(runs: dict[str, Runs]) -> None:
    """What is compared above has really been on several engines, with KV that came from the pool."""
    chunks = [chunk for mine in runs.values() for sample in mine[7].values() for chunk in sample["chunks"]]
    assert len({chunk["engine"] for chunk in chunks}) == 2
    assert sum(chunk["pooled"] for chunk in chunks) > 0
    assert not any(chunk["pooled"] for mine in runs.values() for s in mine[16].values() for chunk in s["chunks"])


@pytest.mark.parametrize("name", ["greedy, stop strings", "greedy, penalties", "greedy, min_tokens", SPECIAL])
async def test_undivided_through_us_is_vllm_itself(vllm_fleet: LocalFleet, tmp_path: Path, name: str) -> None:
    """Text, tokens and finish reason are those of a plain /v1/completions call."""
    prompts = read_dataset(default_dataset(), 4)
    tree = {"rollout": {"n": 1, "chunk_size": 16}, "sampling": {"max_tokens": MAX_TOKENS} | OPTIONS[name]}
    await roll(tmp_path / "run", vllm_fleet.urls, prompts, tree)
    async with httpx.AsyncClient(base_url=vllm_fleet.urls[0], timeout=120) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]

        async def compare(sample: dict[str, Any]) -> None:
            body = {"model": model, "prompt": sample["prompt_token_ids"], "max_tokens": MAX_TOKENS}
            body["return_token_ids"] = True
            choice = (await client.post("/v1/completions", json=body | OPTIONS[name])).json()["choices"][0]
            assert sample["token_ids"] == choice["token_ids"]
            assert sample["text"] == choice["text"]
            assert sample["finish_reason"] == choice["finish_reason"]

        await asyncio.gather(*map(compare, samples(tmp_path / "run").values()))
