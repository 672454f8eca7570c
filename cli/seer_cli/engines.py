"""From the fleet section of a config to the engines that are started here."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seer_async.errors import FleetError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from seer_async.config import FleetConfig
    from seer_servers.fleet import EngineSpec
    from seer_servers.kvpool.pool import Pool

_HUB_NAME = re.compile(r"\w[\w.-]{0,95}(/\w[\w.-]{0,95})?")
_FOR_LOCAL = ("engines", "model", "kv_pool", "draft")


def refuse_unused(config: FleetConfig, options: Mapping[str, Any]) -> None:
    """Refuse options for engines that are started here where running ones are used; `options` are by config path.

    Raises:
        UsageError: Names the option.
    """
    if config.servers or config.file:
        for name in _FOR_LOCAL:
            if options.get(f"fleet.{name}") is not None:
                running = "--server" if config.servers else "--fleet"
                raise UsageError(
                    f"--{name.replace('_', '-')} is for engines that are started here, and {running} names running "
                    "ones: leave one of the two out"
                )


def require_model(model: str | None) -> None:
    """Tell before engines are started that they would find no model; None is the default one.

    Raises:
        UsageError: It is neither a model folder nor what a model on a hub may be called; says what to do.
    """
    if model is None or "://" in model:
        return
    path = Path(model)
    if path.is_dir() and not (path / "config.json").is_file():
        raise UsageError(f"--model {model}: that folder holds no config.json, so no model: name the folder that does")
    if not path.exists() and not _HUB_NAME.fullmatch(model):
        raise UsageError(
            f"--model {model}: there is no such folder; name one with config.json and weights, or a model on the hub, "
            "like Qwen/Qwen3-0.6B"
        )


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
