"""The blocks of the pool: one file each, in shared memory first and on disk behind it.

Invariants: a block is visible only when it is whole (written under another name, then renamed); its name is a hash of
everything its content depends on, so a file is never changed, only replaced by an equal one or removed; what is read
counts only if length, name and checksum are right, and what fails that is removed. No call here raises for what
another process may have done to the files; a block that cannot be had is a miss.

A pool is a folder of the user's own:

    blocks/<salt>/SALT      the `cache_salt` of all blocks beside it
    blocks/<salt>/<block>   header and KV bytes
    tmp/                    blocks being written
    ledger, slots/          counters, see `ledger`
    janitor.lock            see `janitor`
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import struct
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import xxhash

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_MAGIC = b"SEERKV01"
_HEADER = struct.Struct("<8s32sQQ")  # magic, key, payload bytes, checksum
_SALT_FILE = "SALT"
_KEY_BYTES = 32
_FULL = {errno.ENOSPC, errno.EDQUOT}
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}
EXPENDABLE = 1.0  # a last use, in Unix seconds, before all real ones


class Written(StrEnum):
    """How a write ended."""

    SAVED = "saved"
    PRESENT = "present"  # the pool had it
    FULL = "full"
    READ_ONLY = "read-only"
    FAILED = "failed"


class BlockId(NamedTuple):
    """A block's place: the folder of its salt, its key in hex, how deep it is in its sequence, and a worker's rank."""

    salt: str
    key: bytes
    depth: int
    rank: int = 0

    @property
    def path(self) -> str:
        """Relative to `blocks/`; the janitor reads the depth from it."""
        return f"{self.salt}/{self.key.hex()}.{self.depth:x}.{self.rank:x}"


def salt_folder(cache_salt: str) -> str:
    """The folder of a `cache_salt`, which may hold any text."""
    return hashlib.blake2b(cache_salt.encode(), digest_size=12).hexdigest()


def block_key(fingerprint: bytes, block_hash: bytes) -> bytes:
    """Name a block by everything its content depends on: what computed it, and the tokens and salt in the hash."""
    return hashlib.blake2b(block_hash, key=fingerprint, digest_size=_KEY_BYTES).digest()


class Store:
    """The blocks under `root`, and under `spill` those that had to leave it.

    Raises:
        PermissionError: The folder belongs to somebody else, or others may write into it.
    """

    def __init__(self, root: Path, spill: Path | None = None) -> None:
        self.root = root
        self.tiers = [root] if spill is None else [root, spill]
        for tier in self.tiers:
            own_folder(tier)
        self._blocks = [str(tier / "blocks") for tier in self.tiers]
        self._tmp = str(root / "tmp")
        for folder in (*self._blocks, self._tmp):
            _try_mkdir(folder)
        self._salts: set[str] = set()
        self._writes = 0

    def tier(self, block: BlockId) -> int | None:
        """Where a block is now: 0 in shared memory, 1 on disk, None nowhere."""
        path = block.path
        for number, folder in enumerate(self._blocks):
            if os.access(f"{folder}/{path}", os.F_OK):
                return number
        return None

    def write(self, block: BlockId, cache_salt: str, payload: Sequence[memoryview]) -> Written:
        """Publish a block whose content is `payload`, joined."""
        final = f"{self._blocks[0]}/{block.path}"
        if self.tier(block) is not None:
            return Written.PRESENT
        self._writes += 1
        temporary = f"{self._tmp}/{os.getpid()}-{id(self)}-{self._writes}"
        try:
            self._open_salt(block.salt, cache_salt)
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                _write_all(fd, [memoryview(_header(block.key, payload)), *payload])
            finally:
                os.close(fd)
            os.rename(temporary, final)  # noqa: PTH104 - see `read`
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(temporary)  # noqa: PTH108 - see `read`
            self._salts.discard(block.salt)  # its folder may be what is gone
            return _why(error)
        return Written.SAVED

    def read(self, block: BlockId, into: Sequence[memoryview]) -> bool:
        """Fill `into` with a block's content; False if it is not there or not right, `into` then holds anything."""
        for folder in self._blocks:
            path = f"{folder}/{block.path}"
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            except OSError:
                continue
            try:
                right = _read_checked(fd, block.key, into)
            except OSError:
                right = False
            finally:
                os.close(fd)
            if right:
                _touch(path)
                return True
            with contextlib.suppress(OSError):  # nobody else should try it
                os.unlink(path)  # noqa: PTH108 - hot paths are plain strings: a Path costs as much as the call
        return False

    def expend(self, blocks: Sequence[BlockId]) -> None:
        """Say that nobody is expected to need these blocks again: they go first."""
        for block in blocks:
            _touch(f"{self._blocks[0]}/{block.path}", EXPENDABLE)

    def flush(self, run: str, weight_version: str | None) -> int:
        """Remove what was stored for a run, or for one weight version of it; returns how many blocks that were."""
        removed = 0
        for folder, salt in self.salts():
            if salt == f"{run}:{weight_version}" or (weight_version is None and salt.startswith(f"{run}:")):
                removed += _count_files(folder)
                shutil.rmtree(folder, ignore_errors=True)
        self._salts.clear()
        return removed

    def salts(self) -> Iterator[tuple[str, str]]:
        """Yield each salt's folder and text, in all tiers."""
        for blocks in self._blocks:
            with contextlib.suppress(OSError), os.scandir(blocks) as entries:
                for entry in entries:
                    with contextlib.suppress(OSError, UnicodeDecodeError):
                        yield entry.path, Path(entry.path, _SALT_FILE).read_text(encoding="utf-8")

    def _open_salt(self, salt: str, text: str) -> None:
        if salt in self._salts:
            return
        folder = Path(self._blocks[0], salt)
        folder.mkdir(mode=0o700, exist_ok=True)
        _ensure_text(folder / _SALT_FILE, text, Path(f"{self._tmp}/{os.getpid()}-{id(self)}-salt"))
        self._salts.add(salt)


def copy_block(source: Path, target: Path, temporary: Path) -> None:
    """Copy a block to another tier, with the text of its salt and its last use; visible only when it is whole."""
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):  # flushed meanwhile
        text = (source.parent / _SALT_FILE).read_text(encoding="utf-8")
        _ensure_text(target.parent / _SALT_FILE, text, temporary)
    shutil.copy2(source, temporary)
    temporary.rename(target)


def own_folder(folder: Path) -> None:
    """Make sure that `folder` exists, is ours, and that nobody else can write into it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    if folder.is_symlink() or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise PermissionError(
            f"the KV pool folder {folder} must be a folder that belongs to you and that only you can write into: "
            f"choose another one, or run chmod 700 {folder}"
        )


def is_block(name: str) -> bool:
    """Whether a file in a salt's folder is a block."""
    return name != _SALT_FILE


def depth_of(name: str) -> int:
    """How deep a block is in its sequence, from its file's name; 0 for a stranger."""
    parts = name.split(".")
    try:
        return int(parts[1], 16)
    except (IndexError, ValueError):
        return 0


def _header(key: bytes, payload: Sequence[memoryview]) -> bytes:
    return _HEADER.pack(_MAGIC, key, sum(part.nbytes for part in payload), _checksum(key, payload))


def _checksum(key: bytes, payload: Sequence[memoryview]) -> int:
    digest = xxhash.xxh3_64(key)
    for part in payload:
        digest.update(part)
    return digest.intdigest()


def _read_checked(fd: int, key: bytes, into: Sequence[memoryview]) -> bool:
    head = bytearray(_HEADER.size)
    expected = sum(part.nbytes for part in into)
    if os.fstat(fd).st_size != _HEADER.size + expected:
        return False
    if _read_all(fd, [memoryview(head), *into]) != _HEADER.size + expected:
        return False
    magic, named, size, checksum = _HEADER.unpack(head)
    return bool(magic == _MAGIC and named == key and size == expected and checksum == _checksum(key, into))


_IOV_MAX = 1024  # Linux takes no more parts at once


def _read_all(fd: int, parts: Sequence[memoryview]) -> int:
    """Read one file into `parts`, from its start; returns the bytes read, fewer if the file is shorter."""
    total = 0
    for start in range(0, len(parts), _IOV_MAX):
        some = parts[start : start + _IOV_MAX]
        read = os.preadv(fd, some, total)
        total += read
        if read != sum(part.nbytes for part in some):
            break  # shared memory and disks read short only at the end of a file
    return total


def _write_all(fd: int, parts: Sequence[memoryview]) -> None:
    for start in range(0, len(parts), _IOV_MAX):
        some = parts[start : start + _IOV_MAX]
        if os.writev(fd, some) != sum(part.nbytes for part in some):
            raise OSError(errno.ENOSPC, "the write was cut short")


def _why(error: OSError) -> Written:
    if error.errno in _FULL:
        return Written.FULL
    return Written.READ_ONLY if error.errno in _READ_ONLY else Written.FAILED


def _touch(path: str, when: float | None = None) -> None:
    with contextlib.suppress(OSError):  # evicted meanwhile, or a read-only folder
        os.utime(path, None if when is None else (when, when))


def _try_mkdir(folder: str) -> None:
    with contextlib.suppress(OSError):  # a read-only pool is a pool that only loads
        Path(folder).mkdir(mode=0o700, exist_ok=True)


def _ensure_text(file: Path, text: str, temporary: Path) -> None:
    if not file.exists():
        temporary.write_text(text, encoding="utf-8")
        temporary.rename(file)


def _count_files(folder: str) -> int:
    try:
        with os.scandir(folder) as entries:
            return sum(is_block(entry.name) for entry in entries)
    except OSError:
        return 0
