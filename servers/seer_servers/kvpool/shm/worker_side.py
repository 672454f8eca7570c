"""The connector in vLLM's workers: moves blocks between the engine's KV cache and the pool.

Invariants: what is saved is read after the forward that computed it and before the next one can overwrite it; a load
that goes wrong is reported with every block that was not filled, each of which then holds zeros, and vLLM computes
them; every load that was begun is reported exactly once; nothing in here raises into a step.
"""

from __future__ import annotations

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

from vllm.logger import init_logger

from seer_servers.kvpool.shm.ledger import Field
from seer_servers.kvpool.shm.store import Store, Written

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from seer_servers.kvpool.shm.ledger import Ledger, Row
    from seer_servers.kvpool.shm.plan import Load, Plan
    from seer_servers.kvpool.shm.store import BlockId

logger = init_logger("vllm.seer")

_MOST_LEAVING_BYTES = 1 << 30  # of pinned memory; beyond, blocks are not saved
_SWITCH_S = 0.0005  # how long our threads wait for the interpreter beside a busy engine; the default is 0.005


class Staged(Protocol):
    """Blocks between cache and pool: one list of parts for each."""

    parts: list[list[memoryview]]

    def settle(self) -> None:
        """Finish the transfer: parts that leave are right after it, parts that arrive are in the cache after it."""


class Cache(Protocol):
    """The engine's KV cache. Blocks are numbered as the scheduler numbers them.

    Attributes:
        block_bytes: The size of a block, all layers together.
        threaded: Whether settling takes a while and should not hold up the engine.
    """

    block_bytes: int
    threaded: bool

    def gather(self, places: Sequence[int]) -> Staged:
        """Begin to take blocks out; the engine may overwrite them as soon as this returns."""

    def fill(self, places: Sequence[int]) -> Staged:
        """Begin to put blocks in."""


class WorkerSide:
    """Executes the plans of one worker."""

    def __init__(self, store: Store, ledger: Ledger, row: Row, rank: int, cache: Cache) -> None:
        self._store = store
        self._ledger = ledger
        self._row = row
        self._rank = rank
        self._cache = cache
        self._lock = threading.Lock()
        self._loaded: set[str] = set()
        self._bad: set[int] = set()
        self._leaving = 0  # bytes
        self._warned: set[Written] = set()
        if cache.threaded:
            sys.setswitchinterval(_SWITCH_S)
        self._loader = ThreadPoolExecutor(1, "seer-kv-load") if cache.threaded else None
        self._saver = ThreadPoolExecutor(1, "seer-kv-save") if cache.threaded else None

    def load(self, plan: Plan) -> None:
        """Load what the plan says."""
        for load in plan.loads:
            _run(self._loader, self._load, load)

    def save(self, plan: Plan) -> None:
        """Save what the plan says, as far as there is room: all of a step in one go."""
        started = time.monotonic_ns()
        missing = [
            (place, mine, save.cache_salt)
            for save in plan.saves
            for place, block in save.blocks
            if self._store.tier(mine := block._replace(rank=self._rank)) is None
        ]
        if len(missing) > (room := self._room()):
            self._refuse(Written.FULL, len(missing) - room)
            missing = missing[:room]
        if not missing:
            return
        try:
            staged = self._cache.gather([place for place, _, _ in missing])
        except Exception:  # noqa: BLE001 - an engine may have no memory left for it, in its back end's own words
            self._refuse(Written.FAILED, len(missing), exc_info=True)
            return
        with self._lock:
            self._leaving += len(missing) * self._cache.block_bytes
        _run(self._saver, self._write, staged, [(block, salt) for _, block, salt in missing], started)

    def take_results(self) -> tuple[set[str], set[int]]:
        """Requests whose loads have ended since the last call, and places of the cache that could not be filled."""
        with self._lock:
            loaded, self._loaded = self._loaded, set()
            bad, self._bad = self._bad, set()
        return loaded, bad

    def close(self) -> None:
        """Finish what was begun."""
        for pool in (self._loader, self._saver):
            if pool is not None:
                pool.shutdown()

    def _load(self, load: Load) -> None:
        started = time.monotonic_ns()
        filled = 0
        try:
            filled = self._fill(load)
        except Exception:
            logger.exception("A load from the KV pool failed; its blocks are computed again.")
        with self._lock:
            if filled < len(load.blocks):
                self._bad.update(place for place, _ in load.blocks[filled:])  # others may share any of them already
                self._row.add(Field.FAILURES, len(load.blocks) - filled)
            self._row.add(Field.LOADS, filled)
            self._row.add(Field.LOAD_BYTES, filled * self._cache.block_bytes)
            self._row.add(Field.LOAD_NS, time.monotonic_ns() - started)
            self._loaded.add(load.request)

    def _fill(self, load: Load) -> int:
        """Fill the cache up to the first block that cannot be had; returns how many those are.

        The others become zeros. Attention reads a whole block and gives what lies behind a sequence's end the weight
        nought, but nought times what is not a number is not a number: no garbage may stay there.
        """
        staged = self._cache.fill([place for place, _ in load.blocks])
        filled = 0
        for (_, block), parts in zip(load.blocks, staged.parts, strict=True):
            if not self._store.read(block._replace(rank=self._rank), parts):
                break
            filled += 1
        for parts in staged.parts[filled:]:
            _clear(parts)
        staged.settle()
        return filled

    def _room(self) -> int:
        """Blocks that the pool, and the way there, can take."""
        with self._lock:
            room = min(self._ledger.room(), _MOST_LEAVING_BYTES) - self._leaving
        return max(0, room // self._cache.block_bytes)

    def _write(self, staged: Staged, blocks: Sequence[tuple[BlockId, str]], started: int) -> None:
        try:
            staged.settle()
            for (block, cache_salt), parts in zip(blocks, staged.parts, strict=True):
                self._count(self._store.write(block, cache_salt, parts))
        except Exception:
            logger.exception("Blocks could not be saved to the KV pool.")
        with self._lock:
            self._leaving -= len(blocks) * self._cache.block_bytes
            self._row.add(Field.SAVE_NS, time.monotonic_ns() - started)

    def _count(self, written: Written) -> None:
        if written is Written.SAVED:
            self._row.add(Field.SAVES, 1)
            self._row.add(Field.SAVE_BYTES, self._cache.block_bytes)
        elif written is not Written.PRESENT:
            self._refuse(written, 1)

    def _refuse(self, why: Written, blocks: int, *, exc_info: bool = False) -> None:
        self._row.add(Field.REFUSED, blocks)
        if why not in self._warned:
            self._warned.add(why)
            logger.warning(
                "The KV pool does not take blocks now (%s); requests that move are computed again.",
                why,
                exc_info=exc_info,
            )


def _clear(parts: Sequence[memoryview]) -> None:
    for part in parts:
        part[:] = bytes(part.nbytes)


def _run(pool: ThreadPoolExecutor | None, work: Callable[..., None], *arguments: object) -> None:
    if pool is None:
        work(*arguments)
    else:
        pool.submit(work, *arguments)
