"""A real engine with LoRA adapters behind `seer serve`: each answer is the engine's own with the adapter it names."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import torch
from anyio.from_thread import start_blocking_portal
from safetensors.torch import save_file

from seer_async.config import resolve
from seer_servers.fleet import EngineSpec, LocalFleet
from seer_servers.kvpool.shm.pool import ShmPool
from seer_servers.model import ensure_default_model
from seer_servers.service.serve import serving
from tests.conftest import ONE_THREAD

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.vllm

RANK = 8
SLOTS = 3  # one stays empty: on CPUs, vLLM applies the last slot to rows without an adapter that share a batch
PROMPT = [504, 3413, 314]
CHUNK = 8  # tokens
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
GREEDY: dict[str, Any] = {"prompt": PROMPT, "temperature": 0, "max_tokens": 40, "return_token_ids": True, "logprobs": 1}


@pytest.fixture(scope="module")
def engine(vllm_installed: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of one engine that takes adapters, in float32, with a KV pool."""
    folder = tmp_path_factory.mktemp("lora")
    spec = EngineSpec(
        model=str(ensure_default_model()),
        dtype="float32",
        max_model_len=512,
        extra_args=("--enable-lora", "--max-lora-rank", str(RANK), "--max-loras", str(SLOTS)),
        extra_env={"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"} | ONE_THREAD,
    )
    fleet = LocalFleet(spec, 1, folder, pool=ShmPool(folder, 1 << 28))
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(fleet):
        yield fleet.urls[0]


def adapter(folder: Path, seed: int) -> str:
    """A random adapter in PEFT's format that changes what the model says."""
    model = json.loads((ensure_default_model() / "config.json").read_text())
    size, heads = model["hidden_size"], model["num_attention_heads"]
    values = size // heads * model["num_key_value_heads"]
    noise = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(model["num_hidden_layers"]):
        for name, width in (("q_proj", size), ("v_proj", values)):
            at = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{at}.lora_A.weight"] = torch.randn(RANK, size, generator=noise) / size**0.5
            weights[f"{at}.lora_B.weight"] = torch.randn(width, RANK, generator=noise) / RANK**0.5
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK, "lora_dropout": 0.0}
    config |= {"bias": "none", "target_modules": ["q_proj", "v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.timeout(1200)  # an engine of its own, and all that is asked of it
async def test_adapters(engine: str, tmp_path: Path) -> None:
    paths = [await asyncio.to_thread(adapter, tmp_path / f"a{seed}", seed) for seed in range(3)]
    config = resolve({"serve": {"port": 0, "stream_chunk_size": CHUNK}, "rollout": {"chunk_size": CHUNK}})
    async with (
        serving(config, [engine]) as (service, url),
        httpx.AsyncClient(base_url=url, timeout=300) as ours,
        httpx.AsyncClient(base_url=engine, timeout=300) as theirs,
    ):

        async def said(client: httpx.AsyncClient, model: str, **more: Any) -> tuple[list[int], list[float]]:
            reply = await client.post("/v1/completions", json=GREEDY | {"model": model} | more)
            assert reply.status_code == 200 and reply.json()["model"] == model, reply.text
            (choice,) = reply.json()["choices"]
            return choice["token_ids"], choice["logprobs"]["token_logprobs"]

        base = service.info.model
        for name, path in zip(("one", "two"), paths, strict=False):
            (await ours.post(LOAD, json={"lora_name": name, "lora_path": path})).raise_for_status()
        models = (await ours.get("/v1/models")).json()["data"]
        assert [card["id"] for card in models] == [base, "one", "two"]

        names = (base, "one", "two")
        right = [await said(theirs, name, cache_salt="theirs") for name in names]
        assert len({tuple(tokens) for tokens, _ in right}) == 3, "adapters matter"
        # Twice and at the same time: equal prompts, and what is in the engine's cache, belong to one adapter.
        for _ in range(2):
            for (tokens, logprobs), (known, truth) in zip(
                await asyncio.gather(*(said(ours, name) for name in names)), right, strict=True
            ):
                assert tokens == known
                assert logprobs == pytest.approx(truth, abs=2e-3)
        assert (await ours.post("/v1/completions", json=GREEDY | {"model": "three"})).status_code == 404

        # The pool gives an adapter its own KV back, and nobody else's.
        prefix, salt = PROMPT * 40, "pool"
        await said(theirs, "one", prompt=prefix, cache_salt=salt, max_tokens=1)
        for name, found in (("two", False), (base, False), ("one", True)):
            (await theirs.post("/reset_prefix_cache")).raise_for_status()
            before = await loaded(theirs)
            pooled = await said(theirs, name, prompt=prefix, cache_salt=salt)
            assert (await loaded(theirs) > before) == found, name
            fresh = await said(theirs, name, prompt=prefix, cache_salt=f"fresh {name}")
            assert pooled[0] == fresh[0]

        # A replaced one takes over at once, also in a response that the one before had begun.
        long = asyncio.create_task(said(ours, "one", max_tokens=120, ignore_eos=True))
        while service.core.responses.tokens < 7 * 40 + 2 * CHUNK:
            await asyncio.sleep(0.01)
            assert not long.done()
        new = {"lora_name": "one", "lora_path": paths[2], "load_inplace": True}
        (await ours.post(LOAD, json=new)).raise_for_status()
        tokens, _ = await long
        assert service.core.responses.restarts == 1
        known, _ = await said(theirs, "one", max_tokens=120, ignore_eos=True, cache_salt="new")
        assert tokens == known
        assert known[:40] != right[1][0]

        for name in ("one", "two"):
            (await ours.post(UNLOAD, json={"lora_name": name})).raise_for_status()
        assert (await ours.post("/v1/completions", json=GREEDY | {"model": "one"})).status_code == 404


async def loaded(engine: httpx.AsyncClient) -> int:
    """Blocks that came out of the pool so far."""
    return int((await engine.get("/v1/seer/kv/stats")).json()["loads"])
