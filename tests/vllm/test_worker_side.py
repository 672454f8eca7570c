"""The workers' half of the shared-memory pool, with a cache of our own: what is reported when a load goes wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from seer_servers.kvpool.shm.janitor import Janitor
from seer_servers.kvpool.shm.ledger import Ledger
from seer_servers.kvpool.shm.plan import Load, Plan, Save
from seer_servers.kvpool.shm.store import BlockId, Store, block_key, salt_folder
from seer_servers.kvpool.shm.worker_side import WorkerSide

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

pytestmark = pytest.mark.vllm

SALT = "run:v1"


class Memory:
    """A KV cache of one-byte tokens; as an engine on a CPU has it, or beside threads."""

    block_bytes = 64

    def __init__(self, *, threaded: bool) -> None:
        self.threaded = threaded
        self.blocks = [bytearray([number]) * 64 for number in range(32)]
        self.parts: list[list[memoryview]] = []

    def gather(self, places: Sequence[int]) -> Memory:
        return self.fill(places)

    def fill(self, places: Sequence[int]) -> Memory:
        staged = Memory(threaded=self.threaded)
        staged.parts = [[memoryview(self.blocks[place])] for place in places]
        return staged

    def settle(self) -> None:
        pass


def block(number: int) -> BlockId:
    return BlockId(salt_folder(SALT), block_key(b"engine", bytes([number])), number)


@pytest.fixture(params=[False, True], ids=["in place", "threaded"])
def memory(request: pytest.FixtureRequest) -> Memory:
    return Memory(threaded=request.param)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "pool")


def worker(store: Store, memory: Memory, capacity: int = 10_000) -> tuple[WorkerSide, Ledger]:
    ledger = Ledger(store.root)
    Janitor(store, ledger, capacity).sweep()
    return WorkerSide(store, ledger, ledger.join("engine"), 0, memory), ledger


def saved(side: WorkerSide, numbers: Sequence[int]) -> None:
    side.save(Plan([], [Save(SALT, [(number, block(number)) for number in numbers])]))


def test_what_is_saved_is_loaded_elsewhere(store: Store, memory: Memory) -> None:
    side, ledger = worker(store, memory)
    saved(side, range(4))
    side.close()
    other, _ = worker(store, memory)
    other.load(Plan([Load("r", [(10 + number, block(number)) for number in range(4)])]))
    other.close()
    assert other.take_results() == ({"r"}, set())
    assert other.take_results() == (set(), set())
    assert memory.blocks[10:14] == memory.blocks[:4]
    assert ledger.engine("engine")["saves"] == 4


def test_a_bad_block_and_all_after_it_are_reported(store: Store, memory: Memory) -> None:
    """Also those after it: another request may have been given them as filled already."""
    side, ledger = worker(store, memory)
    saved(side, range(4))
    side.close()
    file = store.root / "blocks" / block(1).path
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    other, _ = worker(store, memory)
    other.load(Plan([Load("r", [(10 + number, block(number)) for number in range(4)]), Load("s", [(20, block(3))])]))
    other.close()
    assert other.take_results() == ({"r", "s"}, {11, 12, 13})
    assert memory.blocks[10] == memory.blocks[0]
    assert memory.blocks[11:14] == [bytes(64)] * 3, "no garbage stays where attention may look"
    assert ledger.engine("engine")["failures"] == 3


def test_a_full_pool_refuses_and_counts(store: Store, memory: Memory) -> None:
    side, ledger = worker(store, memory, capacity=150)
    saved(side, range(4))
    side.close()
    counters = ledger.engine("engine")
    assert (counters["saves"], counters["refused"]) == (2, 2)


def test_a_cache_without_memory_for_a_copy_costs_the_engine_nothing(
    store: Store, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    side, ledger = worker(store, memory)

    def gather(_: Sequence[int]) -> Memory:
        raise MemoryError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(memory, "gather", gather)
        saved(side, range(4))
    saved(side, range(4, 6))
    side.close()
    assert ledger.engine("engine")["refused"] == 4
    assert ledger.engine("engine")["saves"] == 2
