"""The journal survives being cut at any byte of its end, and refuses damage before it."""

from pathlib import Path

import pytest

from seer_async.errors import StorageError
from seer_async.events import Record
from seer_async.journal import Journal, read_journal
from seer_async.types import Chunk


def record(n: int) -> Record:
    chunk = Chunk(
        n=n, tokens=2, engine="engine-0", epoch=1, weight_version="v", attempt=1, queued=0.0, start=1.0, end=2.0
    )
    return Record(request=f"g/{n}", chunk=chunk, token_ids=[n, 7], logprobs=[-0.5, -1.25])


def write(path: Path, count: int) -> bytes:
    journal = Journal(path)
    for n in range(count):
        journal.append(record(n))
    journal.close()
    return path.read_bytes()


def test_reads_back_what_was_appended(tmp_path: Path) -> None:
    write(tmp_path / "journal", 5)
    assert read_journal(tmp_path / "journal", repair=False) == [record(n) for n in range(5)]


def test_cut_at_every_byte_of_its_last_three_records(tmp_path: Path) -> None:
    data = write(tmp_path / "whole", 6)
    starts = [0] + [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]
    path = tmp_path / "journal"
    for size in range(starts[3], len(data) + 1):
        path.write_bytes(data[:size])
        whole = sum(start <= size for start in starts[1:])
        assert read_journal(path, repair=True) == [record(n) for n in range(whole)]
        assert path.stat().st_size == starts[whole]
        write(path, 1)  # appending after the repair gives a whole journal again
        assert len(read_journal(path, repair=False)) == whole + 1


def test_damage_before_the_end_is_an_error_that_says_where(tmp_path: Path) -> None:
    data = bytearray(write(tmp_path / "journal", 3))
    first = data.index(b"\n")
    data[first + 20] ^= 1
    (tmp_path / "journal").write_bytes(data)
    with pytest.raises(StorageError, match=f"byte {first + 1}"):
        read_journal(tmp_path / "journal", repair=True)
    assert (tmp_path / "journal").read_bytes() == data


def test_a_full_disk_leaves_no_half_record() -> None:
    with pytest.raises(OSError, match="No space"):
        Journal(Path("/dev/full")).append(record(0))
