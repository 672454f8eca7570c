"""From a pool's name to the pool."""

from __future__ import annotations

from typing import TYPE_CHECKING

from seer_async.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from seer_servers.fleet import EngineSpec
    from seer_servers.kvpool.pool import Pool

KINDS = ("shm", "mooncake", "none")


def make_pool(kind: str, folder: Path, *, capacity_gib: float, disk_gib: float, spec: EngineSpec) -> Pool | None:
    """Return the pool for a fleet of such engines, whose files lie in `folder`, not started; None for "none".

    `disk_gib` of disk, in `folder`, take what the memory cannot keep; Mooncake limits that by itself.

    Raises:
        ConfigError: There is no such kind.
    """
    capacity = int(capacity_gib * 2**30)
    if kind == "shm":
        from seer_servers.kvpool.shm.pool import ShmPool  # noqa: PLC0415 - only the one that is wanted

        return ShmPool(folder, capacity, spill_bytes=int(disk_gib * 2**30))
    if kind == "mooncake":
        from seer_servers.kvpool.mooncake import MooncakePool, model_namespace  # noqa: PLC0415 - as above

        ssd = folder / "kv-disk" if disk_gib else None
        return MooncakePool(folder, capacity, ssd, namespace=model_namespace(spec.model, spec.dtype))
    if kind == "none":
        return None
    raise ConfigError(f"fleet.kv_pool must be one of {', '.join(KINDS)}, not {kind!r}")
