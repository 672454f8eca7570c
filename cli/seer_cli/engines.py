"""From the fleet section of a config to the engines that are started here."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from seer_async.errors import FleetError

if TYPE_CHECKING:
    from pathlib import Path

    from seer_async.config import FleetConfig
    from seer_servers.fleet import EngineSpec
    from seer_servers.kvpool.pool import Pool


def require_vllm() -> None:
    """Tell early and clearly that engines cannot be started here.

    Raises:
        FleetError: vLLM is not installed; says what to do.
    """
    if importlib.util.find_spec("vllm") is None:
        raise FleetError("vLLM is not installed here; run `make setup`, or name running servers with --server URL")


def local_pool(config: FleetConfig, spec: EngineSpec, run_dir: Path) -> Pool | None:
    """What the local engines share KV through."""
    from seer_servers.kvpool.launch import make_pool  # noqa: PLC0415 - only where engines are started

    return make_pool(
        pool_kind(config.kv_pool),
        run_dir,
        capacity_gib=config.kv_pool_gib,
        disk_gib=config.kv_pool_disk_gib,
        spec=spec,
    )


def pool_kind(asked: str) -> str:
    """What "auto" means here: a pool where a prefill costs more than a copy, which on one GPU it seldom does."""
    from seer_servers.placement import visible_gpus  # noqa: PLC0415 - as above

    return asked if asked != "auto" else "none" if visible_gpus() else "shm"


def draft_kind(asked: str) -> str:
    """What "auto" means: no drafts yet, because in the middle of the batch sizes they may still lose a little."""
    return asked if asked != "auto" else "none"


def local_spec(config: FleetConfig) -> EngineSpec:
    """What each local engine serves; fetches the small default model when none is named."""
    from seer_servers.fleet import EngineSpec  # noqa: PLC0415 - only where engines are started
    from seer_servers.model import ensure_default_model  # noqa: PLC0415 - as above

    defaults = {} if config.model else {"served_name": "smollm2-135m-instruct", "max_model_len": 2048}
    chosen = {
        "dtype": config.dtype,
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "num_blocks": config.kv_blocks,
        "kv_cache_gib": config.kv_cache_gib,
        "draft": draft_kind(config.draft),
        "draft_tokens": config.draft_tokens,
    }
    options = defaults | {name: value for name, value in chosen.items() if value is not None}
    model = config.model or str(ensure_default_model())
    return EngineSpec(model=model, extra_args=tuple(config.vllm_args), **options)  # type: ignore[arg-type]  # checked by msgspec
