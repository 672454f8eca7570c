"""The embedded pool for the launcher: every engine brings a janitor, so there is only a folder to make and remove."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

from seer_async.errors import FleetError
from seer_servers.kvpool.shm.ledger import Ledger
from seer_servers.kvpool.shm.settings import GIB, Settings
from seer_servers.kvpool.shm.store import own_folder

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - the kernel's shared memory, in a folder of mode 700
LINGER_S = 900.0  # an engine that died alone should find its blocks when it is back; stop() does not wait
LEFTOVER_S = 300.0  # a pool younger than this may still be waiting for its first engine
MODULE = "seer_servers.kvpool.shm.connector"


class ShmPool:
    """One fleet's pool in shared memory; what does not fit `capacity_bytes` goes to `spill`, if there is one."""

    kind = "shm"

    def __init__(
        self, folder: Path, capacity_bytes: int, *, spill_bytes: int = 0, memory: Path = SHARED_MEMORY
    ) -> None:
        self._capacity = capacity_bytes
        self._spill = folder / "kv-spill" if spill_bytes else None
        self._spill_bytes = spill_bytes
        self._memory = memory
        self._root: Path | None = None

    @property
    def root(self) -> Path:
        """The pool's folder; known from the start on."""
        assert self._root is not None, "start() comes first"
        return self._root

    async def start(self) -> None:
        """Make the pool's folder.

        Raises:
            FleetError: There is no shared memory, or too little of it.
        """
        try:
            free = shutil.disk_usage(self._memory).free
            if free < self._capacity:
                raise FleetError(
                    f"{self._memory} has {free / GIB:.1f} GiB free, less than the KV pool's {self._capacity / GIB:.1f} "
                    "GiB: choose a smaller --kv-pool-gib, mount more shared memory, or use --kv-pool none"
                )
            remove_leftovers(self._memory)
            self._root = Path(tempfile.mkdtemp(prefix=_prefix(), dir=self._memory))
            if self._spill is not None:
                own_folder(self._spill)
        except OSError as error:
            raise FleetError(
                f"the KV pool cannot use {self._memory}: {error.strerror}; use --kv-pool none to go without"
            ) from error

    async def stop(self) -> None:
        """Take the folders away; engines that still run compute what they miss."""
        for folder in (self._root, self._spill):
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)

    def arguments(self, index: int) -> list[str]:
        """Return the connector's configuration, the same for every engine."""
        del index
        settings = Settings(
            root=self.root,
            capacity_bytes=self._capacity,
            spill=self._spill,
            spill_bytes=self._spill_bytes,
            linger_s=LINGER_S,
        )
        return ["--kv-transfer-config", json.dumps(transfer_config(settings))]

    def env(self, index: int) -> dict[str, str]:
        """Nothing is needed."""
        del index
        return {}


def remove_leftovers(memory: Path) -> None:
    """Remove this user's pools whose engines and janitors are all gone, as after a crash that took everything."""
    for root in memory.glob(f"{_prefix()}*"):
        with contextlib.suppress(OSError):
            if root.stat().st_uid == os.geteuid() and time.time() - root.stat().st_mtime > LEFTOVER_S:
                ledger = Ledger(root)
                if not ledger.members() and not ledger.watched():
                    shutil.rmtree(root)


def _prefix() -> str:
    return f"seer-kv-{os.getuid()}-"


def transfer_config(settings: Settings) -> dict[str, object]:
    """Return vLLM's `--kv-transfer-config` for an engine of this pool."""
    return {
        "kv_connector": "SeerShmConnector",
        "kv_connector_module_path": MODULE,
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": settings.extra_config(),
    }
