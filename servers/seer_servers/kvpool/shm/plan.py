"""What the scheduler side tells the worker side at each step: blocks to load before and to save after the forward."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata

if TYPE_CHECKING:
    from seer_servers.kvpool.shm.store import BlockId


@dataclass(frozen=True, slots=True)
class Load:
    """Blocks of one request that begin to be loaded, first to last; each with its place in the engine's KV cache."""

    request: str
    blocks: list[tuple[int, BlockId]]


@dataclass(frozen=True, slots=True)
class Save:
    """Blocks of one request that this step fills; each with its place in the engine's KV cache."""

    cache_salt: str
    blocks: list[tuple[int, BlockId]]


@dataclass(slots=True)
class Plan(KVConnectorMetadata):  # type: ignore[misc]  # vLLM is not typed
    """One step's work."""

    loads: list[Load] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)
