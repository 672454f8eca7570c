"""A pool's settings, as they stand in `kv_connector_extra_config`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from vllm.config import KVTransferConfig

GIB = 2**30


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`root` is a folder in shared memory, `spill` one on disk for blocks that leave it; capacities in bytes.

    The pool is removed `linger_s` seconds after its last engine has gone.
    """

    root: Path
    capacity_bytes: int
    spill: Path | None = None
    spill_bytes: int = 0
    linger_s: float = 30.0

    @classmethod
    def of(cls, transfer: KVTransferConfig) -> Settings:
        """Return an engine's settings.

        Raises:
            ValueError: A setting is wrong; names it.
        """
        extra: dict[str, Any] = transfer.kv_connector_extra_config
        try:
            return msgspec.convert(extra, cls, strict=False, dec_hook=_path)
        except msgspec.ValidationError as error:
            raise ValueError(f"kv_connector_extra_config of the shared-memory KV pool: {error}") from error

    def extra_config(self) -> dict[str, Any]:
        """Return the settings as an engine is given them."""
        given: dict[str, Any] = msgspec.to_builtins(self, enc_hook=str)
        return {name: value for name, value in given.items() if value is not None}

    def janitor_arguments(self) -> list[str]:
        """Return the settings as the janitor is given them."""
        words = [str(self.root), "--capacity-bytes", str(self.capacity_bytes), "--linger-s", str(self.linger_s)]
        return (
            words
            if self.spill is None
            else [*words, "--spill", str(self.spill), "--spill-bytes", str(self.spill_bytes)]
        )


def _path(kind: type, value: object) -> object:
    if kind is Path and isinstance(value, str) and value:
        return Path(value)
    raise ValueError(f"{value!r} is not a path")
