"""Counters that all processes of a pool share: a table of 64-bit integers in a mapped file, one row per writer.

Invariants: a row has one writer, which holds an exclusive lock on the row's slot file while it lives, so the kernel
frees the row however the writer ends; counters only grow during a row's tenancy; row 0 is the janitor's. Reading is a
look into memory (microseconds) and needs no lock: a 64-bit integer is never half written.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import mmap
import os
import time
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

ROWS = 256
STALE_S = 15.0  # a janitor that has not swept for so long is gone


class Field(IntEnum):
    """A row's columns. Tokens, blocks or bytes since the writer started, unless said otherwise."""

    ENGINE = 0  # hash of the engine's id
    QUERIES = 1  # tokens looked up beyond what the engine itself had
    HITS = 2  # tokens of those that were found and are being loaded
    LOADS = 3  # blocks
    LOAD_BYTES = 4
    LOAD_NS = 5
    SAVES = 6  # blocks
    SAVE_BYTES = 7
    SAVE_NS = 8
    FAILURES = 9  # blocks that were found but could not be loaded; they were computed again
    REFUSED = 10  # blocks not saved: the pool was full, read-only or without a janitor


class JanitorField(IntEnum):
    """The columns of row 0, as of the last sweep."""

    SWEPT_NS = 0  # monotonic clock
    USED_BYTES = 1  # in shared memory
    BLOCKS = 2
    SAVED_BYTES = 3  # the sum of all rows' SAVE_BYTES before the sweep
    EVICTIONS = 4  # blocks, since the pool was made
    SPILLED_BYTES = 5  # on disk
    SPILLED_BLOCKS = 6
    CAPACITY_BYTES = 7


class Ledger:
    """The table of one pool."""

    def __init__(self, root: Path) -> None:
        self._slots = root / "slots"
        with contextlib.suppress(OSError):
            self._slots.mkdir(mode=0o700, exist_ok=True)
        size = ROWS * len(Field) * 8
        try:
            fd = os.open(root / "ledger", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            access = mmap.ACCESS_WRITE
        except OSError:  # a read-only pool: nothing is counted for others to see
            self._table = np.zeros((ROWS, len(Field)), dtype=np.int64)
            return
        try:
            if os.fstat(fd).st_size < size:
                os.ftruncate(fd, size)
            self._table = np.frombuffer(mmap.mmap(fd, size, access=access), dtype=np.int64).reshape(ROWS, len(Field))
        finally:
            os.close(fd)

    def join(self, engine: str) -> Row:
        """Take a free row for a writer of `engine`."""
        for slot in range(1, ROWS):
            with contextlib.suppress(OSError):
                lock = os.open(self._slots / str(slot), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    os.close(lock)
                    continue
                self._table[slot] = 0
                self._table[slot, Field.ENGINE] = engine_tag(engine)
                return Row(self._table[slot], lock)
        return Row(np.zeros(len(Field), dtype=np.int64), None)  # too many, or read-only: count for ourselves

    def engine(self, engine: str) -> dict[str, int]:
        """Sum the counters of one engine's writers."""
        rows = self._table[1:][self._table[1:, Field.ENGINE] == engine_tag(engine)]
        return {field.name.lower(): int(rows[:, field].sum()) for field in Field if field is not Field.ENGINE}

    def janitor(self) -> dict[str, int]:
        """Return what the last sweep found."""
        return {field.name.lower(): int(self._table[0, field]) for field in JanitorField}

    def tell(self, **fields: int) -> None:
        """Publish a sweep's findings; the janitor's alone."""
        for name, value in fields.items():
            self._table[0, JanitorField[name.upper()]] = value
        self._table[0, JanitorField.SWEPT_NS] = time.monotonic_ns()

    def saved_bytes(self) -> int:
        """What all writers have saved; tenants that left still count until their row is taken again."""
        return int(self._table[1:, Field.SAVE_BYTES].sum())

    def room(self) -> int:
        """Bytes that may still be saved; 0 when no janitor watches over the pool."""
        row = self._table[0]
        if not self.watched():
            return 0
        since = max(0, self.saved_bytes() - int(row[JanitorField.SAVED_BYTES]))
        return int(row[JanitorField.CAPACITY_BYTES]) - int(row[JanitorField.USED_BYTES]) - since

    def watched(self) -> bool:
        """Whether a janitor has swept lately."""
        swept = int(self._table[0, JanitorField.SWEPT_NS])
        return 0 <= time.monotonic_ns() - swept <= STALE_S * 1e9  # the clock begins anew when the machine does

    def members(self) -> int:
        """How many writers live: slots whose lock somebody holds."""
        return sum(map(_held, self._slots.iterdir()))


class Row:
    """One writer's row, ours until this process ends."""

    def __init__(self, counters: np.ndarray, lock: int | None) -> None:
        self._counters = counters
        self._lock = lock  # never closed: the lock is the tenancy

    def add(self, field: Field, amount: int) -> None:
        """Count."""
        self._counters[field] += amount


def engine_tag(engine: str) -> int:
    """A number that stands for an engine's id."""
    return int.from_bytes(hashlib.blake2b(engine.encode(), digest_size=7).digest())


def _held(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False
