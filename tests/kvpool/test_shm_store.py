"""The shared-memory pool without an engine: blocks, counters, capacity, and what crashes leave behind."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from seer_servers.kvpool.shm.janitor import Janitor
from seer_servers.kvpool.shm.ledger import Field, Ledger
from seer_servers.kvpool.shm.pool import remove_leftovers
from seer_servers.kvpool.shm.store import BlockId, Store, Written, block_key, salt_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SALT = "run-1:v1"
SIZE = 4096


def block(number: int, salt: str = SALT, depth: int = 0, rank: int = 0) -> BlockId:
    return BlockId(salt_folder(salt), block_key(b"engine", number.to_bytes(4)), depth, rank)


def content(number: int) -> list[memoryview]:
    """A block in two parts, as a model of two layers has it."""
    data = bytes([number % 256]) * SIZE
    return [memoryview(data)[: SIZE // 2], memoryview(data)[SIZE // 2 :]]


def read(store: Store, wanted: BlockId) -> bytes | None:
    into = bytearray(SIZE)
    parts = [memoryview(into)[:1000], memoryview(into)[1000:]]
    return bytes(into) if store.read(wanted, parts) else None


def file_of(store: Store, wanted: BlockId) -> Path:
    return store.root / "blocks" / wanted.path


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "pool")


def save(store: Store, number: int, salt: str = SALT, depth: int = 0) -> BlockId:
    saved = block(number, salt, depth)
    assert store.write(saved, salt, content(number)) is Written.SAVED
    return saved


class TestBlocks:
    def test_what_is_written_is_read_by_any_store_of_the_folder(self, store: Store) -> None:
        saved = save(store, 7)
        assert read(Store(store.root), saved) == bytes([7]) * SIZE

    def test_the_same_block_is_stored_once(self, store: Store) -> None:
        saved = save(store, 7)
        assert store.write(saved, SALT, content(7)) is Written.PRESENT

    def test_ranks_salts_and_fingerprints_keep_apart(self, store: Store) -> None:
        saved = save(store, 7)
        strangers = [
            saved._replace(rank=1),
            block(7, "run-1:v2"),
            saved._replace(key=block_key(b"another engine", (7).to_bytes(4))),
        ]
        assert [read(store, stranger) for stranger in strangers] == [None, None, None]

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda data: data[:-1],
            lambda data: data[:40],
            lambda data: b"",
            lambda data: data + b"\0",
            lambda data: data[:-1] + bytes([data[-1] ^ 1]),
            lambda data: b"XXXX" + data[4:],
            lambda data: data[:8] + bytes([data[8] ^ 1]) + data[9:],
        ],
        ids=["short by one", "header cut", "empty", "longer", "one bit", "magic", "another block's name"],
    )
    def test_a_spoilt_block_is_a_miss_and_goes_away(self, store: Store, spoil: Callable[[bytes], bytes]) -> None:
        saved = save(store, 7)
        file = file_of(store, saved)
        file.write_bytes(spoil(file.read_bytes()))
        assert read(store, saved) is None
        assert not file.exists()
        assert store.write(saved, SALT, content(7)) is Written.SAVED
        assert read(store, saved) == bytes([7]) * SIZE

    def test_a_block_swapped_for_a_whole_other_one_is_a_miss(self, store: Store) -> None:
        one, two = save(store, 1), save(store, 2)
        file_of(store, one).write_bytes(file_of(store, two).read_bytes())
        assert read(store, one) is None

    def test_a_link_to_elsewhere_is_not_followed(self, store: Store, tmp_path: Path) -> None:
        saved = save(store, 7)
        elsewhere = tmp_path / "elsewhere"
        file_of(store, saved).rename(elsewhere)
        file_of(store, saved).symlink_to(elsewhere)
        assert read(store, saved) is None

    def test_flushing_a_version_leaves_the_others(self, store: Store) -> None:
        old, new, other = save(store, 1), save(store, 2, "run-1:v2"), save(store, 3, "run-10:v1")
        assert store.flush("run-1", "v1") == 1
        assert [store.tier(each) for each in (old, new, other)] == [None, 0, 0]
        assert store.flush("run-1", None) == 1
        assert [store.tier(each) for each in (new, other)] == [None, 0]
        save(store, 1)  # and the salt can be used again

    def test_a_full_file_system_refuses_and_keeps_what_is_there(self, store: Store) -> None:
        code = (
            "import resource, sys; from pathlib import Path\n"
            "from tests.kvpool.test_shm_store import *\n"
            "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            f"resource.setrlimit(resource.RLIMIT_FSIZE, ({SIZE // 2}, {SIZE // 2}))\n"
            "s = Store(Path(sys.argv[1])); print(s.write(block(9), SALT, content(9)).value)\n"
        )
        saved = save(store, 7)
        said = subprocess.run([sys.executable, "-c", code, str(store.root)], capture_output=True, text=True, check=True)
        assert said.stdout.strip() in {"failed", "full"}
        assert store.tier(block(9)) is None
        assert read(store, saved) is not None
        assert not list((store.root / "tmp").iterdir())

    @pytest.mark.parametrize(
        ("number", "says"),
        [
            (errno.EROFS, Written.READ_ONLY),
            (errno.EACCES, Written.READ_ONLY),
            (errno.ENOSPC, Written.FULL),
            (errno.EIO, Written.FAILED),
        ],
    )
    def test_a_pool_that_cannot_be_written_still_loads(
        self, store: Store, monkeypatch: pytest.MonkeyPatch, number: int, says: Written
    ) -> None:
        saved = save(store, 7)
        real = os.open

        def refuse(path: str, flags: int, *more: int) -> int:
            if flags & os.O_CREAT:
                raise OSError(number, os.strerror(number))
            return real(path, flags, *more)

        monkeypatch.setattr(os, "open", refuse)
        assert store.write(block(8), SALT, content(8)) is says
        assert read(store, saved) == bytes([7]) * SIZE

    def test_a_folder_that_others_may_write_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "pool").mkdir(mode=0o700)
        (tmp_path / "pool").chmod(0o777)
        with pytest.raises(PermissionError, match="only you can write"):
            Store(tmp_path / "pool")

    def test_a_folder_that_vanishes_is_a_miss_and_a_failure(self, store: Store) -> None:
        saved = save(store, 7)
        subprocess.run(["rm", "-r", str(store.root)], check=True)
        assert read(store, saved) is None
        assert store.write(saved, SALT, content(7)) is Written.FAILED


class TestSpill:
    @pytest.fixture
    def spilling(self, tmp_path: Path) -> Store:
        return Store(tmp_path / "pool", tmp_path / "disk")

    def test_evicted_blocks_are_read_from_disk(self, spilling: Store) -> None:
        blocks = [save(spilling, number, depth=number) for number in range(10)]
        sweep(spilling, capacity=5 * SIZE, spill=100 * SIZE)
        tiers = [spilling.tier(each) for each in blocks]
        assert set(tiers) == {0, 1}
        assert [read(spilling, each) for each in blocks] == [bytes([number]) * SIZE for number in range(10)]

    def test_the_disk_has_a_limit_too(self, spilling: Store) -> None:
        blocks = [save(spilling, number, depth=number) for number in range(40)]
        figures = sweep(spilling, capacity=5 * SIZE, spill=10 * SIZE)
        assert 0 < figures["spilled_bytes"] <= 10 * SIZE
        assert figures["spilled_blocks"] == sum(spilling.tier(each) == 1 for each in blocks)

    def test_expendable_blocks_are_not_kept(self, spilling: Store) -> None:
        blocks = [save(spilling, number, depth=number) for number in range(10)]
        spilling.expend(blocks)
        sweep(spilling, capacity=5 * SIZE, spill=100 * SIZE)
        assert 1 not in {spilling.tier(each) for each in blocks}

    def test_flushing_reaches_the_disk(self, spilling: Store) -> None:
        for number in range(10):
            save(spilling, number, depth=number)
        sweep(spilling, capacity=5 * SIZE, spill=100 * SIZE)
        assert spilling.flush("run-1", None) == 10


def sweep(store: Store, *, capacity: int, spill: int = 0) -> dict[str, int]:
    ledger = Ledger(store.root)
    Janitor(store, ledger, capacity, spill).sweep()
    return ledger.janitor()


class TestEviction:
    def test_nothing_goes_while_there_is_room(self, store: Store) -> None:
        blocks = [save(store, number) for number in range(10)]
        figures = sweep(store, capacity=20 * SIZE)
        assert figures["evictions"] == 0
        assert figures["blocks"] == 10
        assert all(store.tier(each) == 0 for each in blocks)

    def test_the_longest_unused_go_first(self, store: Store) -> None:
        blocks = [save(store, number) for number in range(10)]
        now = time.time()
        for number, each in enumerate(blocks):
            os.utime(file_of(store, each), (now - 1000 + 100 * number,) * 2)
        read(store, blocks[0])  # used just now
        sweep(store, capacity=6 * SIZE)
        kept = [number for number, each in enumerate(blocks) if store.tier(each) == 0]
        assert kept == [0, 7, 8, 9]

    def test_of_one_sequence_the_end_goes_before_the_beginning(self, store: Store) -> None:
        blocks = [save(store, number, depth=number) for number in range(10)]
        stamp = time.time() // 5 * 5
        for each in blocks:
            os.utime(file_of(store, each), (stamp, stamp))
        sweep(store, capacity=6 * SIZE)
        kept = [store.tier(each) == 0 for each in blocks]
        assert kept == sorted(kept, reverse=True)
        assert 0 < sum(kept) < 10

    def test_expendable_blocks_go_before_all(self, store: Store) -> None:
        blocks = [save(store, number) for number in range(10)]
        store.expend(blocks[5:])
        sweep(store, capacity=8 * SIZE)
        assert all(store.tier(each) == 0 for each in blocks[:5])
        assert any(store.tier(each) is None for each in blocks[5:])

    def test_orphans_of_killed_writers_are_removed(self, store: Store) -> None:
        orphan = store.root / "tmp" / "123-1"
        orphan.write_bytes(b"half")
        fresh = store.root / "tmp" / "124-1"
        fresh.write_bytes(b"half")
        os.utime(orphan, (1, 1))
        sweep(store, capacity=SIZE)
        assert not orphan.exists()
        assert fresh.exists()


class TestLedger:
    def test_without_a_janitor_there_is_no_room(self, store: Store) -> None:
        assert Ledger(store.root).room() <= 0

    def test_room_shrinks_with_what_any_writer_saves(self, store: Store) -> None:
        one, two = Ledger(store.root), Ledger(store.root)
        sweep(store, capacity=100)
        one.join("a").add(Field.SAVE_BYTES, 30)
        two.join("b").add(Field.SAVE_BYTES, 20)
        assert one.room() == two.room() == 50

    def test_engines_are_counted_apart(self, store: Store) -> None:
        ledger = Ledger(store.root)
        rows = [ledger.join("a"), ledger.join("a"), ledger.join("b")]
        for row in rows:
            row.add(Field.LOADS, 2)
        assert ledger.engine("a")["loads"] == 4
        assert ledger.engine("b")["loads"] == 2
        assert ledger.engine("c")["loads"] == 0

    def test_a_row_is_free_again_when_its_owner_was_killed(self, store: Store) -> None:
        code = (
            "import sys, time; from pathlib import Path; from seer_servers.kvpool.shm.ledger import Ledger\n"
            "l = Ledger(Path(sys.argv[1])); r = l.join('x'); print('joined', flush=True); time.sleep(60)"
        )
        child = subprocess.Popen([sys.executable, "-c", code, str(store.root)], stdout=subprocess.PIPE)
        assert child.stdout
        child.stdout.readline()
        ledger = Ledger(store.root)
        assert ledger.members() == 1
        child.kill()
        child.wait()
        assert ledger.members() == 0


class TestLeftovers:
    def test_pools_that_nobody_has_any_more_are_removed(self, tmp_path: Path) -> None:
        prefix = f"seer-kv-{os.getuid()}-"
        dead, young, used, foreign = (
            tmp_path / name for name in (f"{prefix}dead", f"{prefix}young", f"{prefix}used", "x")
        )
        for root in (dead, young, used, foreign):
            save(Store(root), 1)
        alive = Ledger(used).join("engine")
        for root in (dead, used, foreign):
            os.utime(root, (1, 1))
        remove_leftovers(tmp_path)
        assert [root.exists() for root in (dead, young, used, foreign)] == [False, True, True, True]
        del alive


@pytest.fixture
def janitors(store: Store) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    children: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "seer_servers.kvpool.shm.janitor", str(store.root)]
        command += ["--capacity-bytes", str(6 * SIZE), "--linger-s", "1"]
        children.append(subprocess.Popen(command, stdin=subprocess.PIPE))
        return children[-1]

    yield start
    for child in children:
        child.kill()
        child.wait()


class TestJanitorProcess:
    def test_another_takes_over_when_it_is_killed(
        self, store: Store, janitors: Callable[[], subprocess.Popen[bytes]]
    ) -> None:
        ledger = Ledger(store.root)
        first = janitors()
        wait_for(lambda: ledger.room() > 0)
        janitors()
        first.send_signal(signal.SIGKILL)
        first.wait()
        swept = ledger.janitor()["swept_ns"]
        wait_for(lambda: ledger.janitor()["swept_ns"] > swept)
        for number in range(12):
            save(store, number)
        wait_for(lambda: ledger.janitor()["evictions"] > 0)
        wait_for(lambda: sum(store.tier(block(number)) == 0 for number in range(12)) <= 6)

    def test_the_last_takes_the_pool_away(self, store: Store, janitors: Callable[[], subprocess.Popen[bytes]]) -> None:
        ledger = Ledger(store.root)
        child = janitors()
        wait_for(lambda: ledger.room() > 0)
        assert child.stdin
        child.stdin.close()
        assert child.wait(20) == 0
        assert not store.root.exists()

    def test_it_leaves_the_pool_to_engines_that_live(
        self, store: Store, janitors: Callable[[], subprocess.Popen[bytes]]
    ) -> None:
        ledger = Ledger(store.root)
        ours = ledger.join("alive")
        child = janitors()
        wait_for(lambda: ledger.room() > 0)
        assert child.stdin
        child.stdin.close()
        assert child.wait(20) == 0
        assert store.root.exists()
        del ours


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.05)
