"""Ways for an engine to draft, by name, and what vLLM is told for each."""

from __future__ import annotations

import json
from typing import Any

from seer_async.errors import ConfigError

GROUPED = "grouped"

_CONFIGS: dict[str, dict[str, Any] | None] = {
    "none": None,
    GROUPED: {"method": "custom_class", "model": "seer_servers.plugin.drafter.GroupedDrafter"},
    # vLLM's own, to compare with: a suffix tree of each server (it needs arctic-inference), and a request's own past.
    "suffix": {"method": "suffix"},
    "ngram": {"method": "ngram", "prompt_lookup_min": 2, "prompt_lookup_max": 5},
}
KINDS = tuple(_CONFIGS)


def speculative_config(kind: str, tokens: int) -> str | None:
    """Return the value of vLLM's --speculative-config for drafts of at most `tokens`; None to draft nothing.

    Raises:
        ConfigError: There is no such kind.
    """
    if kind not in _CONFIGS:
        raise ConfigError(f"fleet.draft must be auto or one of {', '.join(KINDS)}, not {kind!r}")
    config = _CONFIGS[kind]
    return json.dumps(config | {"num_speculative_tokens": tokens}) if config else None
