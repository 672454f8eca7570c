"""All spools of a server: created, found again after a restart, dropped when they are old or the room is needed.

root/<server>/lock is held by the process that owns the folder; root/<server>/<rollout>/ are its spools. A server adopts
the folders of servers that have ended, so several may share a root. Invariant: nothing is added while the spools
together take `jobs.spool_gib` or more.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from seer_async.errors import StorageError
from seer_servers.service.jobspool import Spool

if TYPE_CHECKING:
    from collections.abc import Sequence

    from seer_async.config import JobsConfig
    from seer_async.types import Prompt, Sample
    from seer_servers.service.jobspool import JobInfo

_GIB = 1 << 30


class Store:
    """Spools by id; the server called `name` owns new ones."""

    def __init__(self, config: JobsConfig, name: str) -> None:
        self.spools: dict[str, Spool] = {}
        self._root = Path(config.folder) if config.folder else _default_root()
        self._own = self._root / name
        self._limit = config.spool_gib * _GIB
        self._keep_s = config.keep_s
        self._used = 0
        self._locks: dict[Path, int] = {}

    def open(self) -> None:
        """Find what is there.

        Raises:
            StorageError: The folder cannot be used.
        """
        try:
            self._own.mkdir(mode=0o700, parents=True, exist_ok=True)
            for folder in sorted(self._root.iterdir()):
                if folder.is_dir() and self._lock(folder):
                    self._adopt(folder)
        except OSError as error:
            raise StorageError(
                f"cannot keep rollouts in {self._root}: {error.strerror or error}; name another folder as jobs.folder"
            ) from error
        self.expire()

    def close(self) -> None:
        """Let others adopt what is here."""
        for folder, lock in self._locks.items():
            with contextlib.suppress(OSError):
                if [each.name for each in folder.iterdir()] == ["lock"]:
                    (folder / "lock").unlink()
                    folder.rmdir()
            os.close(lock)
        self._locks.clear()

    def _lock(self, folder: Path) -> bool:
        file = os.open(folder / "lock", os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            return False
        self._locks[folder] = file
        return True

    def _adopt(self, folder: Path) -> None:
        for each in sorted(folder.iterdir()):
            if each.is_dir():
                try:
                    self._know(Spool.found(each))
                except (OSError, msgspec.DecodeError):
                    shutil.rmtree(each, ignore_errors=True)  # begun, but its rollout was never answered for

    def create(self, info: JobInfo, prompts: Sequence[Prompt]) -> Spool:
        """A new spool.

        Raises:
            StorageError: There is no room for it.
        """
        try:
            self._make_room()
            spool = Spool.create(self._own / info.id, info, prompts)
        except OSError as error:
            shutil.rmtree(self._own / info.id, ignore_errors=True)
            raise StorageError(f"cannot keep a rollout in {self._own}: {error.strerror or error}") from error
        self._know(spool)
        return spool

    def append(self, spool: Spool, group: int, sample: Sample) -> None:
        """Keep a sample, instead of old rollouts if need be; raises OSError when there is no room."""
        self._make_room()
        before = spool.bytes
        spool.append(group, sample)
        self._used += spool.bytes - before

    def _make_room(self) -> None:
        if self._used >= self._limit:
            for spool in self._ended():
                self.drop(spool)
                if self._used < self._limit:
                    return
            raise OSError(errno.ENOSPC, "running rollouts take all the room that jobs.spool_gib allows")

    def _ended(self) -> list[Spool]:
        """Those that have ended, the oldest end first."""
        ended = [spool for spool in self.spools.values() if not spool.running]
        return sorted(ended, key=lambda spool: spool.info.ended or 0.0)

    def expire(self) -> None:
        """Drop what has been kept long enough."""
        before = time.time() - self._keep_s
        for spool in self._ended():
            if (spool.info.ended or 0.0) < before:
                self.drop(spool)

    def drop(self, spool: Spool) -> None:
        """Forget a rollout that has ended."""
        del self.spools[spool.info.id]
        self._used -= spool.bytes
        shutil.rmtree(spool.folder, ignore_errors=True)

    def _know(self, spool: Spool) -> None:
        self.spools[spool.info.id] = spool
        self._used += spool.bytes


def _default_root() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "seer" / "rollouts"
