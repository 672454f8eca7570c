"""The journal: what was accepted, on disk before anything builds on it.

Invariants: a record is written to the operating system before `append` returns, so it outlives this process; a record
that was only half written when the process or the disk died is recognised by its checksum and is simply owed again; a
damaged record anywhere but at the end is an error, because what follows it cannot be trusted.

Format: one line a record, eight hex digits of CRC-32, a space, JSON.
"""

from __future__ import annotations

import os
import zlib
from typing import TYPE_CHECKING, TypeVar

import msgspec

from seer_async.appendfile import AppendFile
from seer_async.errors import StorageError
from seer_async.events import Record
from seer_async.types import Chunk

if TYPE_CHECKING:
    from pathlib import Path

_CRC_DIGITS = 8
_T = TypeVar("_T")


class Step(msgspec.Struct, frozen=True):
    """A record without its tokens, for readers that only ask what happened when."""

    request: str
    chunk: Chunk | None = None
    finish_reason: str | None = None


class Journal:
    """Appends records to a file; raises OSError when the disk does."""

    def __init__(self, path: Path) -> None:
        self._encoder = msgspec.json.Encoder()
        self._file = AppendFile(path)

    def append(self, record: Record) -> None:
        """Write one record through to the operating system."""
        body = self._encoder.encode(record)
        self._file.append(b"%08x %b\n" % (zlib.crc32(body), body))

    def sync(self) -> None:
        """Wait until the records are on the disk."""
        self._file.sync()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_journal(path: Path, *, repair: bool) -> list[Record]:
    """All whole records of a journal, in order; with `repair`, a torn end is cut off so that appending can go on.

    Raises:
        StorageError: The file cannot be read, or is damaged before its end.
    """
    data = _read(path)
    records, good = _scan(data, path, msgspec.json.Decoder(Record))
    if repair and good < len(data):
        os.truncate(path, good)
    return records


def read_steps(path: Path) -> list[Step]:
    """What `read_journal` reads, without tokens and without repair.

    Raises:
        StorageError: The file cannot be read, or is damaged before its end.
    """
    steps, _ = _scan(_read(path), path, msgspec.json.Decoder(Step))
    return steps


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error


def _scan(data: bytes, path: Path, decoder: msgspec.json.Decoder[_T]) -> tuple[list[_T], int]:
    records: list[_T] = []
    start = 0
    while start < len(data):
        end = data.find(b"\n", start)
        record = _parse(data[start:end], decoder) if end >= 0 else None
        if record is None:
            if 0 <= end < len(data) - 1:
                raise StorageError(
                    f"{path} is damaged at byte {start}, before its end; cut it there (truncate -s {start}) to resume "
                    "from what comes before"
                )
            break
        records.append(record)
        start = end + 1
    return records, start


def _parse(line: bytes, decoder: msgspec.json.Decoder[_T]) -> _T | None:
    body = line[_CRC_DIGITS + 1 :]
    if line[: _CRC_DIGITS + 1] != b"%08x " % zlib.crc32(body):
        return None
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
