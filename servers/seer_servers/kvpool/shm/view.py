"""The pool as one engine's API server sees it: the ledger's counters and the store's files; the engine is not asked."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Self

from seer_servers.kvpool.shm.ledger import Ledger, engine_tag
from seer_servers.kvpool.shm.settings import Settings
from seer_servers.kvpool.shm.store import BlockId, Store, block_key, salt_folder

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from vllm.config import VllmConfig


class ShmView:
    """What the KV routes of one engine answer from."""

    kind = "shm"

    def __init__(self, settings: Settings, engine: str, ranks: int) -> None:
        self._root = settings.root
        self._engine = engine
        self._ranks = ranks
        self._store = Store(settings.root, settings.spill)
        self._ledger = Ledger(settings.root)

    @classmethod
    def of(cls, config: VllmConfig) -> Self:
        """Return the view of the engine with this config."""
        transfer = config.kv_transfer_config
        assert transfer is not None
        return cls(Settings.of(transfer), str(transfer.engine_id), config.parallel_config.tensor_parallel_size)

    def stats(self) -> dict[str, int | str]:
        """Return sizes of the whole pool, and this engine's counters."""
        swept = self._ledger.janitor()
        pool = {name: swept[name] for name in ("blocks", "capacity_bytes", "evictions", "spilled_blocks")}
        return {
            "kind": self.kind,
            "pool": pool_id(self._root),
            "bytes": swept["used_bytes"],
            "spilled_bytes": swept["spilled_bytes"],
            **pool,
            **self._ledger.engine(self._engine),
        }

    def flush(self, run: str, weight_version: str | None) -> int:
        """Drop what was stored for a run, or for one weight version of it."""
        return self._store.flush(run, weight_version)

    def held(self, cache_salt: str, block_hashes: Sequence[bytes]) -> int:
        """Return how many leading blocks of a prefix the pool holds, for all ranks."""
        fingerprint = read_fingerprint(self._root, self._engine)
        salt = salt_folder(cache_salt)
        for depth, block_hash in enumerate(block_hashes):
            block = BlockId(salt, block_key(fingerprint, block_hash), depth)
            if any(self._store.tier(block._replace(rank=rank)) is None for rank in range(self._ranks)):
                return depth
        return len(block_hashes)


def pool_id(root: Path) -> str:
    """Name a pool: equal for engines that share it, and no path."""
    return hashlib.blake2b(str(root.resolve()).encode(), digest_size=6).hexdigest()


def publish_fingerprint(root: Path, engine: str, fingerprint: bytes) -> None:
    """Let the engine's API server, which cannot compute it, know the fingerprint."""
    folder = root / "engines"
    folder.mkdir(mode=0o700, exist_ok=True)
    (folder / f"{engine_tag(engine):x}").write_bytes(fingerprint)


def read_fingerprint(root: Path, engine: str) -> bytes:
    """Return what the engine published; a value that fits no block if it has not."""
    try:
        return (root / "engines" / f"{engine_tag(engine):x}").read_bytes() or b"none"
    except OSError:
        return b"none"
