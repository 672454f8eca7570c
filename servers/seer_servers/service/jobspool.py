"""The spool of one rollout: a folder that holds its prompts and its finished samples, readable while it grows.

job.json       what was asked for, and the state; replaced as a whole
prompts.jsonl  the prompts with their token ids
samples.jsonl  one finished sample a line, in the order in which they finished
index          24 bytes a sample: where its line ends, its group and place there, its tokens, whether it is good

Invariants: a sample counts once its index entry is written, which is after its line is; `order` lists the samples of
whole groups only, one group after the other; files are the owner's alone; nothing that was written is written again.
"""

from __future__ import annotations

import asyncio
import os
import struct
import time
from array import array
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec

from seer_async.api import LOST, RUNNING
from seer_async.appendfile import AppendFile
from seer_async.types import Prompt

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from seer_async.types import Sample

_PRIVATE = 0o600
_ENTRY = struct.Struct("<QIIII")
_GOOD = {"stop", "length"}


class JobInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The content of job.json. `key` and `body` are digests of the idempotency key and of what came with it."""

    id: str
    created: float
    groups: int
    n: int
    seed: int
    chunk_size: int
    sampling: dict[str, Any]
    key: str = ""
    body: str = ""
    status: str = RUNNING
    error: str = ""
    ended: float | None = None


class _Head(msgspec.Struct):
    group: str


class Spool:
    """The rollout in `folder`, which `create` has made or an earlier server has left."""

    def __init__(self, folder: Path, info: JobInfo) -> None:
        self.folder = folder
        self.info = info
        self.done = self.failed = self.tokens = 0
        self.order = array("I")  # numbers of the samples of whole groups
        self._ends = array("Q")  # of the samples' lines
        self._partial: dict[int, list[tuple[int, int]]] = {}  # index and number of a group's samples so far
        self._news = asyncio.Event()
        self._writers: list[AppendFile] = []
        self._encoder = msgspec.json.Encoder()
        self._prompt_bytes = _size(folder / "prompts.jsonl")

    @classmethod
    def create(cls, folder: Path, info: JobInfo, prompts: Sequence[Prompt]) -> Spool:
        """Begin a spool; raises OSError when the disk refuses."""
        folder.mkdir(mode=0o700)
        with open(folder / "prompts.jsonl", "wb", opener=_private) as file:
            file.writelines(msgspec.json.encode(prompt) + b"\n" for prompt in prompts)
        spool = cls(folder, info)
        spool._writers = [AppendFile(folder / name, _PRIVATE) for name in ("samples.jsonl", "index")]
        spool.save()
        return spool

    @classmethod
    def found(cls, folder: Path) -> Spool:
        """A spool that another server has left; raises OSError or DecodeError where it is unreadable."""
        spool = cls(folder, msgspec.json.decode((folder / "job.json").read_bytes(), type=JobInfo))
        index = folder / "index"
        for entry in _entries(index.read_bytes() if index.exists() else b"", _size(folder / "samples.jsonl")):
            spool._note(*entry)
        if spool.running:
            spool.end(LOST, "its server ended before it did; what had finished can be read")
        return spool

    @property
    def running(self) -> bool:
        """Whether more may come."""
        return self.info.status == RUNNING

    @property
    def count(self) -> int:
        """Samples that can be read."""
        return len(self._ends)

    @property
    def whole_groups(self) -> int:
        """Groups that can be read."""
        return len(self.order) // self.info.n

    @property
    def bytes(self) -> int:
        """What it takes on disk."""
        return self._prompt_bytes + (self._ends[-1] if self._ends else 0) + _ENTRY.size * len(self._ends)

    def prompts(self) -> Iterator[Prompt]:
        """The prompts, read as they are wanted."""
        decoder = msgspec.json.Decoder(Prompt)
        with (self.folder / "prompts.jsonl").open("rb") as file:
            for line in file:
                yield decoder.decode(line)

    def append(self, group: int, sample: Sample) -> None:
        """Keep the next sample; raises OSError when the disk refuses, and then holds what it held."""
        line = self._encoder.encode(sample) + b"\n"
        end = (self._ends[-1] if self._ends else 0) + len(line)
        entry = (end, group, sample.index, len(sample.token_ids), int(sample.finish_reason in _GOOD))
        for writer, data in zip(self._writers, (line, _ENTRY.pack(*entry)), strict=True):
            writer.append(data)
        self._note(*entry)
        self._tell()

    def _note(self, end: int, group: int, index: int, tokens: int, good: int) -> None:
        members = self._partial.setdefault(group, [])
        members.append((index, len(self._ends)))
        self._ends.append(end)
        self.done, self.failed, self.tokens = self.done + good, self.failed + 1 - good, self.tokens + tokens
        if len(members) == self.info.n:
            self.order.extend(number for _, number in sorted(self._partial.pop(group)))

    def end(self, status: str, error: str = "") -> None:
        """Nothing more comes. A disk that refuses even that leaves the rollout to be found as lost."""
        self.info = msgspec.structs.replace(self.info, status=status, error=error, ended=time.time())
        while self._writers:
            self._writers.pop().close()
        self._partial.clear()
        self._tell()
        try:
            self.save()
        except OSError:
            return

    def save(self) -> None:
        """Write job.json."""
        draft = self.folder / "job.json.new"
        with open(draft, "wb", opener=_private) as file:
            file.write(msgspec.json.encode(self.info))
        draft.replace(self.folder / "job.json")

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    async def news(self) -> None:
        """Return when something has changed."""
        await self._news.wait()

    @contextmanager
    def reader(self) -> Iterator[Reader]:
        """A reader, which goes on reading even when the spool is dropped meanwhile."""
        file = os.open(self.folder / "samples.jsonl", os.O_RDONLY)
        try:
            yield Reader(self, file)
        finally:
            os.close(file)

    def span(self, number: int) -> tuple[int, int]:
        """Where the line of a sample begins and ends."""
        return self._ends[number - 1] if number else 0, self._ends[number]


class Reader:
    """Reads a spool's samples and groups as JSON, without a newline."""

    def __init__(self, spool: Spool, file: int) -> None:
        self._spool = spool
        self._file = file

    def sample(self, number: int) -> bytes:
        """The sample that was the `number`th to finish, from 0."""
        start, end = self._spool.span(number)
        return os.pread(self._file, end - start - 1, start)

    def group(self, number: int) -> bytes:
        """The group that was the `number`th to be whole, from 0, as a `GroupSamples`."""
        n = self._spool.info.n
        samples = [self.sample(each) for each in self._spool.order[number * n : (number + 1) * n]]
        name = msgspec.json.encode(msgspec.json.decode(samples[0], type=_Head).group)
        return b'{"group":%b,"samples":[%b]}' % (name, b",".join(samples))


def _entries(index: bytes, size: int) -> Iterator[tuple[int, int, int, int, int]]:
    """The entries whose lines are there; what a crash has torn is left out."""
    for entry in _ENTRY.iter_unpack(index[: len(index) // _ENTRY.size * _ENTRY.size]):
        if entry[0] > size:
            return
        yield entry


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, _PRIVATE)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
