"""What the content of a KV block depends on besides tokens, salt and weight version.

Two engines may exchange blocks exactly if their fingerprints are equal. Weights that change while an engine runs are
not seen here: they are what the weight version in every request's `cache_salt` is for.
"""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vllm

from seer_servers.kvpool.shm.layers import in_order

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

_FORMAT = 2  # of our files and of the bytes in them


def fingerprint(config: VllmConfig, kv_cache: KVCacheConfig) -> bytes:
    """Return 32 bytes that stand for model, weights on disk, number formats, block layout and parallelism."""
    model, parallel, cache = config.model_config, config.parallel_config, config.cache_config
    facts: dict[str, Any] = {
        "format": _FORMAT,
        "seer": version("seer-async"),
        "vllm": vllm.__version__,
        "weights": _weights(model.model, model.revision, config.load_config.load_format),
        "architecture": model.hf_config.to_dict(),
        "seed": model.seed if str(config.load_config.load_format) == "dummy" else None,
        "dtype": str(model.dtype),
        "quantization": str(model.quantization),
        "cache_dtype": str(cache.cache_dtype),
        "layout": str(cache.kv_cache_layout),
        "device": str(config.device_config.device_type),
        "groups": [str(group.kv_cache_spec) for group in kv_cache.kv_cache_groups],
        "layers": [in_order(group.layer_names) for group in kv_cache.kv_cache_groups],
        "tensor_parallel": parallel.tensor_parallel_size,
        "decode_context_parallel": parallel.decode_context_parallel_size,
    }
    return hashlib.blake2b(json.dumps(facts, sort_keys=True, default=str).encode(), digest_size=32).digest()


def _weights(model: str, revision: str | None, load_format: object) -> list[Any]:
    """Identify weights: files of a local folder by name, size and time, a hub's by name and revision."""
    folder = Path(model)
    if not folder.is_dir():
        return [model, revision, str(load_format)]
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return [str(load_format), *((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files)]
