"""Ways for an engine to draft, by name, and what vLLM is told for each."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

from seer_async.errors import ConfigError

GROUPED, SUFFIX = "grouped", "suffix"

_CONFIGS: dict[str, dict[str, Any] | None] = {
    "none": None,
    GROUPED: {"method": "custom_class", "model": "seer_servers.plugin.drafter.GroupedDrafter"},
    # vLLM's own, to compare with: a suffix tree of each server (it needs arctic-inference), and a request's own past.
    SUFFIX: {"method": "suffix"},
    "ngram": {"method": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 5},
}
KINDS = tuple(_CONFIGS)


# On a GPU drafts from siblings are found on it, by a drafter that takes this one's place (plugin/gpu_drafting.py).
_ON_GPU: dict[str, Any] = {
    "method": "ngram_gpu",
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 16,
    "enable_adaptive_verification": True,
}


def draft_options(kind: str, tokens: int, *, gpu: bool) -> dict[str, str]:
    """Return vLLM's options for drafts of at most `tokens`, on a GPU or a CPU; none to draft nothing.

    Raises:
        ConfigError: There is no such kind, or it needs a package that is not there.
    """
    if kind not in _CONFIGS:
        raise ConfigError(f"fleet.draft must be auto or one of {', '.join(KINDS)}, not {kind!r}")
    if kind == SUFFIX and importlib.util.find_spec("arctic_inference") is None:
        raise ConfigError("drafts of the kind suffix need the package arctic-inference, which is not installed")
    config = _CONFIGS[kind]
    if config is None:
        return {}
    ours = gpu and kind == GROUPED
    speculative = (_ON_GPU if ours else config) | {"num_speculative_tokens": tokens}
    additional = {"--additional-config": json.dumps({"seer_drafts": True})} if ours else {}
    return {"--speculative-config": json.dumps(speculative)} | additional
