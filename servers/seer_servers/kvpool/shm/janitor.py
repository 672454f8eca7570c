"""The janitor: keeps a pool within its capacity, and removes the pool when its last engine is gone.

Run as a program by every engine: `python -m seer_servers.kvpool.shm.janitor ROOT --capacity-bytes N ...`. One works,
the one that holds the pool's lock; the others wait for that lock, so a janitor that is killed is replaced at once.

Invariants: only whole blocks are removed, and those that are least worth keeping first: expendable ones, then the
longest unused, and among equals the deepest, because a prefix is of use without what follows it, and not the other
way round. Standard input ends with the engine that started us; after that we stay only while we are the last, for
`--linger-s` seconds, and then take the pool away. Engines save nothing while no janitor has swept for a while
(`Ledger.room`), so a pool without one cannot grow.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import select
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from seer_servers.kvpool.shm.ledger import Ledger
from seer_servers.kvpool.shm.store import EXPENDABLE, Store, copy_block, depth_of, is_block

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

FULL = 0.92  # evict above this share of the capacity,
DRAINED = 0.84  # down to this one
SWEEP_S = 0.5
SWEEP_SHARE = 25  # sweeps may take one 25th of a core,
MOST_PAUSE_S = 3.0  # unless the ledger would look as if nobody swept (see `ledger.STALE_S`)
ORPHAN_S = 60.0  # a temporary file this old has no writer any more
BUCKET_S = 5.0  # uses this close together are equally recent


class Found(NamedTuple):
    """A block that a sweep saw."""

    path: str
    used: float  # Unix seconds
    depth: int
    size: int

    @property
    def rank(self) -> tuple[float, int]:
        """Its place in the queue to be evicted."""
        return self.used // BUCKET_S, -self.depth


class Janitor:
    """Sweeps one pool; limits in bytes."""

    def __init__(self, store: Store, ledger: Ledger, capacity: int, spill_capacity: int = 0) -> None:
        self._store = store
        self._ledger = ledger
        self._capacity = capacity
        self._spill_capacity = spill_capacity

    def sweep(self) -> None:
        """Measure the pool, evict what is too much, and publish the findings."""
        saved = self._ledger.saved_bytes()
        evictions = self._ledger.janitor()["evictions"]
        blocks = list(_blocks(self._store.tiers[0] / "blocks"))
        used = sum(block.size for block in blocks)
        leaving = _excess(blocks, used, self._capacity)
        for block in leaving:
            self._evict(block)
        spilled = self._sweep_spill()
        gone = sum(block.size for block in leaving)
        self._ledger.tell(
            capacity_bytes=self._capacity,
            used_bytes=used - gone,
            blocks=len(blocks) - len(leaving),
            saved_bytes=saved,
            evictions=evictions + len(leaving),
            spilled_bytes=sum(block.size for block in spilled),
            spilled_blocks=len(spilled),
        )
        _drop_orphans(self._store.root / "tmp")

    def _evict(self, block: Found) -> None:
        with contextlib.suppress(OSError):  # no room on disk, or gone meanwhile: evicting comes first
            if len(self._store.tiers) > 1 and block.used > EXPENDABLE:
                relative = Path(block.path).relative_to(self._store.tiers[0])
                copy_block(Path(block.path), self._store.tiers[1] / relative, self._store.tiers[1] / ".moving")
        with contextlib.suppress(OSError):
            Path(block.path).unlink()

    def _sweep_spill(self) -> list[Found]:
        if len(self._store.tiers) == 1:
            return []
        blocks = list(_blocks(self._store.tiers[1] / "blocks"))
        leaving = _excess(blocks, sum(block.size for block in blocks), self._spill_capacity)
        for block in leaving:
            with contextlib.suppress(OSError):
                Path(block.path).unlink()
        gone = {block.path for block in leaving}
        return [block for block in blocks if block.path not in gone]


def _blocks(folder: Path) -> Iterator[Found]:
    for salt in _entries(folder):
        names = 0
        for entry in _entries(Path(salt.path)):
            if is_block(entry.name):
                names += 1
                with contextlib.suppress(OSError):
                    status = entry.stat(follow_symlinks=False)
                    yield Found(entry.path, status.st_mtime, depth_of(entry.name), status.st_size)
        if not names:
            _drop_empty_salt(Path(salt.path))


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:  # flushed meanwhile
        return []


def _drop_empty_salt(folder: Path) -> None:
    with contextlib.suppress(OSError):
        if time.time() - folder.stat().st_mtime > ORPHAN_S:  # nobody is about to write into it
            shutil.rmtree(folder)


def _excess(blocks: Sequence[Found], used: int, capacity: int) -> list[Found]:
    if used <= FULL * capacity:
        return []
    leaving: list[Found] = []
    for block in sorted(blocks, key=lambda found: found.rank):
        if used <= DRAINED * capacity:
            break
        leaving.append(block)
        used -= block.size
    return leaving


def _drop_orphans(folder: Path) -> None:
    for entry in _entries(folder):
        with contextlib.suppress(OSError):
            if time.time() - entry.stat(follow_symlinks=False).st_mtime > ORPHAN_S:
                Path(entry.path).unlink()


def serve(janitor: Janitor, ledger: Ledger, root: Path, linger_s: float) -> None:
    """Wait for the pool's lock, then sweep until the engine that started us has ended and others go on, or none do."""
    with _locked(root / "janitor.lock", sys.stdin.fileno()) as ours:
        if not ours:
            return
        alone_since: float | None = None
        orphaned = False
        while root.exists():
            started = time.process_time()
            janitor.sweep()
            pause = min(MOST_PAUSE_S, max(SWEEP_S, SWEEP_SHARE * (time.process_time() - started)))
            orphaned = _ended(sys.stdin.fileno(), pause, orphaned=orphaned)
            if not orphaned:
                continue
            if ledger.members():
                return  # their janitors wait for the lock
            alone_since = alone_since or time.monotonic()
            if time.monotonic() - alone_since >= linger_s:
                shutil.rmtree(root, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: Path, lifeline: int) -> Iterator[bool]:
    """Hold an exclusive lock; False if whoever we wait for it for has ended first."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                if _ended(lifeline, SWEEP_S, orphaned=False):
                    yield False
                    return
            else:
                yield True
                return
    finally:
        os.close(fd)


def _ended(lifeline: int, wait_s: float, *, orphaned: bool) -> bool:
    if orphaned:
        time.sleep(wait_s)
        return True
    return bool(select.select([lifeline], [], [], wait_s)[0])


def main() -> None:
    """Read the command line and serve."""
    parser = argparse.ArgumentParser(prog="janitor", description=__doc__)
    parser.add_argument("root", type=Path)
    parser.add_argument("--capacity-bytes", type=int, required=True)
    parser.add_argument("--spill", type=Path, default=None, help="a folder on disk for blocks that leave memory")
    parser.add_argument("--spill-bytes", type=int, default=0)
    parser.add_argument("--linger-s", type=float, default=30.0)
    options = parser.parse_args()
    ledger = Ledger(options.root)
    janitor = Janitor(Store(options.root, options.spill), ledger, options.capacity_bytes, options.spill_bytes)
    serve(janitor, ledger, options.root, options.linger_s)


if __name__ == "__main__":
    main()
