"""The Mooncake pool as one engine's API server sees it.

Sizes come from the master's HTTP port and count the whole pool, whoever uses it; counters come from this engine's own
Prometheus metrics; what the pool holds of a prefix is answered by the engine's worker, which asks the master with its
own keys. A master that is down leaves the sizes out and never delays a caller by more than `TIMEOUT_S` seconds.
"""

from __future__ import annotations

import hashlib
import http.client
import socket
import time
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

import zmq
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families
from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.store.protocol import LOOKUP_MSG, decode_lookup_response
from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.store.worker import get_zmq_rpc_path_lookup
from vllm.distributed.mooncake_store import MooncakeStoreConfig

from seer_servers.kvpool.view import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.config import VllmConfig

TIMEOUT_S = 1.0
MAX_AGE_S = 1.0  # of the master's numbers
MASTER_METRICS = {
    "blocks": "master_key_count",
    "bytes": "master_allocated_bytes",
    "capacity_bytes": "master_total_capacity_bytes",
    "spilled_bytes": "master_allocated_file_size_bytes",
    "evictions": "master_evicted_key_count",
}


class MooncakeView:
    """What the KV routes of one engine answer from; `master_http` is None where the engine was not told it."""

    kind = "mooncake"

    def __init__(self, pool: str, master_http: str | None, lookup_path: str, block_size: int) -> None:
        self._pool = pool
        self._master_http = master_http
        self._lookup_path = lookup_path
        self._block_size = block_size
        self._sizes: dict[str, int | str] = {}
        self._read_at = float("-inf")

    @classmethod
    def of(cls, config: VllmConfig) -> Self:
        """Return the view of the engine with this config and environment."""
        transfer = config.kv_transfer_config
        assert transfer is not None
        extra: dict[str, Any] = transfer.kv_connector_extra_config
        master = MooncakeStoreConfig.load_from_config().master_server_address
        pool = pool_id(master, str(extra.get("cache_prefix", "")))
        return cls(pool, extra.get("master_http"), get_zmq_rpc_path_lookup(config), config.cache_config.block_size)

    def stats(self) -> dict[str, int | str]:
        """Return the master's sizes, and this engine's counters since it started."""
        if time.monotonic() - self._read_at > MAX_AGE_S:
            self._sizes, self._read_at = self._ask_master(), time.monotonic()
        return {"kind": self.kind, "pool": self._pool, **self._sizes, **engine_counters()}

    def flush(self, run: str, weight_version: str | None) -> int:
        """Refuse: a run is not in a block's key.

        Raises:
            UnsupportedError: Always.
        """
        del run, weight_version
        raise UnsupportedError(
            "Mooncake's keys are hashes that name no run or weight version, so nothing can be flushed by them: "
            "other versions never match these blocks, and the master evicts the least used ones when it needs room."
        )

    def held(self, cache_salt: str, block_hashes: Sequence[bytes]) -> int:
        """Return how many leading blocks of a prefix the pool holds: 0 if the engine's worker does not answer.

        Asking counts as use: it renews the blocks' lease, like a request's own lookup.
        """
        del cache_salt  # is part of the first hash
        if not block_hashes:
            return 0
        # One token more than the blocks hold, or the connector leaves the last block out.
        tokens = len(block_hashes) * self._block_size + 1
        frames = (
            LOOKUP_MSG,
            tokens.to_bytes(4, "big"),
            len(block_hashes[0]).to_bytes(2, "big"),
            b"".join(block_hashes),
        )
        with zmq.Context() as context, context.socket(zmq.REQ) as question:
            question.setsockopt(zmq.LINGER, 0)
            question.setsockopt(zmq.RCVTIMEO, int(TIMEOUT_S * 1000))
            question.connect(self._lookup_path)
            question.send_multipart(frames)
            try:
                return int(decode_lookup_response(question.recv()).hit_length) // self._block_size
            except zmq.Again:
                return 0

    def _ask_master(self) -> dict[str, int | str]:
        if self._master_http is None:
            return {}
        try:
            return master_sizes(fetch(f"{self._master_http}/metrics"))
        except (OSError, ValueError, http.client.HTTPException):
            return {}


def pool_id(master: str, prefix: str) -> str:
    """Name a pool: equal for engines that share it. A master on the loopback interface is another one on each host."""
    host = socket.gethostname() if master.startswith(("127.", "localhost")) else ""
    return hashlib.blake2b(f"{master}|{host}|{prefix}".encode(), digest_size=6).hexdigest()


def fetch(url: str) -> str:
    """GET a small text without a proxy, redirects or patience."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=TIMEOUT_S)
    try:
        connection.request("GET", parts.path)
        reply = connection.getresponse()
        return reply.read().decode() if reply.status == http.HTTPStatus.OK else ""
    finally:
        connection.close()


def master_sizes(metrics: str) -> dict[str, int | str]:
    """Return a pool's sizes from its master's metrics."""
    values = {
        sample.name: sample.value for family in text_string_to_metric_families(metrics) for sample in family.samples
    }
    return {ours: int(values[theirs]) for ours, theirs in MASTER_METRICS.items() if theirs in values}


def engine_counters() -> dict[str, int | str]:
    """Return what this engine's connector did: tokens asked for and found, blocks and bytes moved, what failed."""

    def total(what: str, *operations: str) -> float:
        name = f"vllm:mooncake_store_operation_{what}"
        return sum(value for labels, value in samples(name) if labels["operation"] in operations)

    def count(what: str, *operations: str) -> int:
        return int(total(f"{what}_total", *operations))

    def nanoseconds(operation: str) -> int:
        return int(total("time_seconds_sum", operation) * 1e9)

    return {
        "queries": sum(int(value) for _, value in samples("vllm:external_prefix_cache_queries_total")),
        "hits": sum(int(value) for _, value in samples("vllm:external_prefix_cache_hits_total")),
        "loads": count("keys", "load_get") - count("failed_keys", "load_get"),
        "load_bytes": count("bytes", "load_get"),
        "load_ns": nanoseconds("load_get"),
        "saves": count("keys", "save_put") - count("failed_keys", "save_put"),
        "save_bytes": count("bytes", "save_put"),
        "save_ns": nanoseconds("save_put"),
        "failures": count("failed_keys", "load_get", "lookup_exists", "save_exists"),
        "refused": count("failed_keys", "save_put"),
    }


def samples(name: str) -> list[tuple[dict[str, str], float]]:
    """Return the labels and value of each sample of one of this process's metrics."""
    families = REGISTRY.restricted_registry([name]).collect()
    return [(each.labels, each.value) for family in families for each in family.samples if each.name == name]
