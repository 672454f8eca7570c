"""HTTP routes for the orchestrator: what this engine is, and its tokenizer.

Both lie under /v1, so vLLM's `--api-key` guards them. What the workers can do is asked of the workers.
"""

import asyncio
import uuid
from argparse import Namespace
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import vllm
from fastapi import APIRouter, FastAPI, HTTPException, Request, Response
from fastapi.responses import FileResponse
from prometheus_client import REGISTRY
from starlette.datastructures import State
from vllm.engine.protocol import EngineClient
from vllm.logger import init_logger

from seer_servers.plugin import draft_routes, kv_routes
from seer_servers.plugin.recomputation import count_recomputation

logger = init_logger("vllm.seer")
router = APIRouter(prefix="/v1/seer")


@dataclass(frozen=True)
class Engine:
    """The engine behind the routes, and its workers' report (see `seer_servers.plugin.worker.support`)."""

    client: EngineClient
    support: dict[str, Any]


class SeerEndpoints:
    """The endpoint plug-in `seer`."""

    name = "seer"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes."""
        app.include_router(router)
        app.include_router(kv_routes.router)
        app.include_router(draft_routes.router)

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        """Ask the workers what they can do; that cannot change while they live."""
        del args
        if engine_client is not None:  # None on a server that only renders prompts
            state.seer_engine = Engine(engine_client, await workers_support(engine_client))
            state.seer_kv_pool = view = kv_routes.pool_view(engine_client.vllm_config)
            state.seer_kv_pool_name = None
            if view is not None:
                state.seer_kv_pool_name = f"{view.kind}:{(await asyncio.to_thread(view.stats))['pool']}"
                REGISTRY.register(kv_routes.PoolMetrics(view))
            state.seer_draft_client = draft_routes.draft_client(engine_client.vllm_config)
            REGISTRY.register(draft_routes.DraftMetrics())
            count_recomputation(engine_client)


async def workers_support(client: EngineClient) -> dict[str, Any]:
    """The first worker's report with the capabilities that all workers have: none, if they cannot be asked."""
    try:
        reports: list[dict[str, Any]] = await client.collective_rpc("seer_support")
        common = set.intersection(*(set(report["capabilities"]) for report in reports))
    except Exception as error:  # noqa: BLE001 - the engine serves all the same
        logger.warning("The workers run without the Seer plug-in, so no capability is advertised: %s", error)
        runner = "v2" if client.vllm_config.use_v2_model_runner else "v1"
        return {"boot_id": str(uuid.uuid4()), "runner": runner, "capabilities": []}
    return {**reports[0], "capabilities": sorted(common)}


def _engine(request: Request) -> Engine:
    engine: Engine | None = getattr(request.app.state, "seer_engine", None)
    if engine is None:
        raise HTTPException(503, "This server has no engine to describe.")
    return engine


@router.get("/info")
async def info(request: Request) -> dict[str, Any]:
    """Describe the engine. Lengths and `block_size` are in tokens; `num_blocks` sums data-parallel ranks.

    `kv_pool` is equal for engines that share a pool, and None without one.
    """
    engine = _engine(request)
    config = engine.client.vllm_config
    model, scheduler, cache = config.model_config, config.scheduler_config, config.cache_config
    names = model.served_model_name
    name, *aliases = [names] if isinstance(names, str) else names
    return {
        "seer": version("seer-async"),
        "vllm": vllm.__version__,
        "model": name,
        "aliases": aliases,
        "root": model.model,
        "max_model_len": model.max_model_len,
        "max_num_seqs": scheduler.max_num_seqs,
        "max_num_batched_tokens": scheduler.max_num_batched_tokens,
        "block_size": cache.block_size,
        # The engine core reports its block count when it starts, and vLLM's client stores it here.
        "num_blocks": cache.num_gpu_blocks,
        "dtype": str(model.dtype).removeprefix("torch."),
        "vocab_size": model.get_vocab_size(),
        "logprobs_mode": model.logprobs_mode,
        "max_logprobs": model.get_vocab_size() if model.max_logprobs < 0 else model.max_logprobs,
        "weight_version": await engine.client.get_weight_version(),
        "kv_pool": request.app.state.seer_kv_pool_name,
        **engine.support,
    }


@router.get("/tokenizer")
async def tokenizer(request: Request) -> Response:
    """The model's tokenizer.json; 404 if its tokenizer has no such form."""
    client = _engine(request).client
    model = client.vllm_config.model_config
    file = Path(model.tokenizer) / "tokenizer.json"
    if file.is_file():
        return FileResponse(file, media_type="application/json")
    backend = None if model.skip_tokenizer_init else getattr(client.get_tokenizer(), "backend_tokenizer", None)
    if backend is None:
        raise HTTPException(404, f"The tokenizer of {model.model} is not a fast one, so it has no tokenizer.json.")
    return Response(backend.to_str(), media_type="application/json")
