"""HTTP routes for the KV pool of an engine: its counters, flushing, and what it holds of a prefix.

Like the plug-in's other routes they lie under /v1, where vLLM's `--api-key` guards them.
"""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Request
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from pydantic import BaseModel, Field
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.request import Request as EngineRequest

from seer_servers.kvpool.view import PoolView, UnsupportedError

router = APIRouter(prefix="/v1/seer/kv")

_GAUGES = {"blocks", "bytes", "capacity_bytes", "spilled_blocks", "spilled_bytes"}


class FlushBody(BaseModel):
    """What to drop: all of a run, or one weight version of it."""

    run: Annotated[str, Field(min_length=1)]
    weight_version: str | None = None


class LookupBody(BaseModel):
    """A prefix, and the salt of the requests that would continue it."""

    token_ids: Annotated[list[int], Field(min_length=1)]
    cache_salt: Annotated[str, Field(min_length=1)]


def pool_view(config: VllmConfig) -> PoolView | None:
    """Return the view of an engine's pool, or None if it has none that we know."""
    transfer = config.kv_transfer_config
    if transfer is None:
        return None
    if transfer.kv_connector == "SeerShmConnector":
        from seer_servers.kvpool.shm.view import ShmView  # noqa: PLC0415 - only what this engine has

        return ShmView.of(config)
    if transfer.kv_connector == "MooncakeStoreConnector":
        from seer_servers.kvpool.mooncake_view import MooncakeView  # noqa: PLC0415 - as above

        return MooncakeView.of(config)
    return None


class PoolMetrics:
    """The pool's counters on the engine's own /metrics, as `seer:kv_pool_...`; a Prometheus collector."""

    def __init__(self, view: PoolView) -> None:
        self._view = view

    def describe(self) -> list[Any]:
        """Promise no names, so that registering does not ask the pool."""
        return []

    def collect(self) -> Any:
        """Yield one metric for each number."""
        for name, value in self._view.stats().items():
            if isinstance(value, str):
                continue
            kind = GaugeMetricFamily if name in _GAUGES else CounterMetricFamily
            yield kind(f"seer:kv_pool_{name}", f"KV pool: {name.replace('_', ' ')}", value=value)


def _view(request: Request) -> PoolView:
    view: PoolView | None = getattr(request.app.state, "seer_kv_pool", None)
    if view is None:
        raise HTTPException(404, "This engine has no KV pool: start it with --kv-transfer-config.")
    return view


@router.get("/stats")
async def stats(request: Request) -> dict[str, int | str]:
    """Sizes of the pool (blocks, bytes) and this engine's counters (tokens, blocks, bytes, nanoseconds)."""
    return await asyncio.to_thread(_view(request).stats)


@router.post("/flush")
async def flush(request: Request, body: FlushBody) -> dict[str, int]:
    """Drop blocks; this frees memory and is never needed for correctness."""
    try:
        return {"blocks": await asyncio.to_thread(_view(request).flush, body.run, body.weight_version)}
    except UnsupportedError as error:
        raise HTTPException(501, str(error)) from error


@router.post("/lookup")
async def lookup(request: Request, body: LookupBody) -> dict[str, int]:
    """Say how many tokens of a prefix the pool holds."""
    view, config = _view(request), request.app.state.seer_engine.client.vllm_config
    try:
        hashes = await asyncio.to_thread(block_hashes, config, body.token_ids, body.cache_salt)
        held = await asyncio.to_thread(view.held, body.cache_salt, hashes)
    except UnsupportedError as error:
        raise HTTPException(501, str(error)) from error
    return {"tokens": held * config.cache_config.block_size}


def block_hashes(config: VllmConfig, token_ids: list[int], cache_salt: str) -> list[bytes]:
    """Return the hashes of a prefix's full blocks, as the engine's scheduler computes them."""
    hash_function = get_hash_fn_by_name(config.cache_config.prefix_caching_hash_algo)
    init_none_hash(hash_function)
    request = EngineRequest(
        "seer-lookup",
        token_ids,
        SamplingParams(max_tokens=1),
        None,
        cache_salt=cache_salt,
        block_hasher=get_request_block_hasher(config.cache_config.block_size, hash_function),
    )
    return list(request.block_hashes)
