"""The run folder: everything a rollout leaves behind, and everything it needs to go on after it died.

run.json       the resolved config, the seed, what ran where, and how it ended
prompts.jsonl  the prompts with their token ids, so that a resumed run does not depend on the dataset file
journal        accepted chunks (see journal.py)
samples.jsonl  one line a finished sample
metrics.jsonl  one line a second or so
trace.json     Chrome/Perfetto trace
logs/          logs of local engines

Invariants: one process writes a run folder at a time; samples.jsonl holds whole lines only and each sample at most
once; run.json is replaced atomically.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import time
from typing import TYPE_CHECKING, Any

import msgspec

from seer_async import __version__
from seer_async.appendfile import AppendFile
from seer_async.config import Config, resolve, to_toml_tree
from seer_async.errors import StorageError, UsageError
from seer_async.journal import Journal, read_journal
from seer_async.tally import Effort, SampleHead, Tally, effort_in_metrics, effort_in_summary
from seer_async.types import Prompt, Sample

if TYPE_CHECKING:
    from pathlib import Path

    from seer_async.events import Record
    from seer_async.snapshot import Snapshot

_KEPT = {"stop", "length"}


class RunInfo(msgspec.Struct, kw_only=True):
    """The content of run.json. `config` is the resolved config as nested tables; times are Unix seconds.

    `draft_groups` says what drafts brought each group: drafts verified, tokens drafted, tokens accepted.
    `on_policy` says that all samples written so far are of one weight version, and the set is not biased by the policy
    that chose which to finish. `earlier` is what the parts before the last `resumed` took; `summary` is of all parts.
    """

    run: str
    seer: str
    seed: int
    config: dict[str, Any]
    dataset: str
    groups: int
    samples: int
    command: list[str]
    started: float
    resumed: list[float] = []
    earlier: Effort = Effort()
    ended: float | None = None
    status: str = "running"
    on_policy: bool = True
    engines: list[dict[str, Any]] = []
    draft_groups: dict[str, tuple[int, int, int]] = {}
    summary: dict[str, Any] | None = None


class RunFolder:
    """An open run folder; `close` releases it."""

    def __init__(self, path: Path, info: RunInfo, prompts: list[Prompt]) -> None:
        self.path = path
        self.info = info
        self.prompts = prompts
        self.tally = Tally()
        self._encoder = msgspec.json.Encoder()
        self._lock = _lock(path)
        self.journal = Journal(path / "journal")
        self._samples = AppendFile(path / "samples.jsonl")
        self._metrics = AppendFile(path / "metrics.jsonl")

    @property
    def config(self) -> Config:
        """The resolved config."""
        return resolve(self.info.config)

    @classmethod
    def create(
        cls, path: Path, config: Config, prompts: list[Prompt], *, dataset: str, command: list[str]
    ) -> RunFolder:
        """Start a new run in `path`, which `require_fresh` has accepted; `prompts` are tokenised.

        Raises:
            StorageError: The folder cannot be written.
        """
        seed = config.sampling.seed if config.sampling.seed is not None else secrets.randbits(62)
        info = RunInfo(
            run=f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}",
            seer=__version__,
            seed=seed,
            config=to_toml_tree(config),
            dataset=dataset,
            groups=len(prompts),
            samples=len(prompts) * config.rollout.n,
            command=command,
            started=time.time(),
        )
        try:
            path.mkdir(parents=True, exist_ok=True)
            _replace(path / "prompts.jsonl", b"".join(msgspec.json.encode(p) + b"\n" for p in prompts))
            _replace(path / "run.json", _pretty(info))
            return cls(path, info, prompts)
        except OSError as error:
            raise StorageError(f"cannot write run folder {path}: {error.strerror or error}") from error

    @classmethod
    def resume(cls, path: Path) -> tuple[RunFolder, list[Record], set[str]]:
        """Go on with an earlier run.

        Returns the folder, the journal's records, and the ids of samples that samples.jsonl already holds for good;
        lines of failed or unfinished samples are dropped, because those are tried again. Of a run that has `ended`
        nothing is changed.

        Raises:
            UsageError: It is no run folder.
            StorageError: It is in use, or is damaged.
        """
        if not (path / "run.json").exists():
            raise UsageError(f"{path} cannot be resumed: it holds no run.json; name the folder of an interrupted run")
        try:
            info = msgspec.json.decode((path / "run.json").read_bytes(), type=RunInfo)
            lines = (path / "prompts.jsonl").read_bytes().splitlines()
            prompts = [msgspec.json.decode(line, type=Prompt) for line in lines]
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            raise StorageError(f"{path} cannot be resumed: {error}; name the folder of an interrupted run") from error
        try:
            lock = _lock(path)  # before anything is repaired
            records = read_journal(path / "journal", repair=True)
            finished = {record.request for record in records if record.finish_reason is not None}
            kept = _settle_samples(path / "samples.jsonl", finished)
            os.close(lock)
            folder = cls(path, info, prompts)
            for head in kept.values():
                folder.tally.add(head)
            if not folder.ended:
                folder.begin_again()
        except OSError as error:
            raise StorageError(f"cannot write run folder {path}: {error.strerror or error}") from error
        return folder, records, set(kept)

    @property
    def ended(self) -> bool:
        """Whether nothing is left to do."""
        return self.info.status == "done" and sum(self.tally.weight_versions.values()) == self.info.samples

    def begin_again(self) -> None:
        """Note that another part of the run begins, and what those before it took."""
        info = self.info
        if info.status == "running":  # it was killed, and wrote no summary
            begun = info.resumed[-1] if info.resumed else info.started
            info.earlier += effort_in_metrics(self.path / "metrics.jsonl", begun)
        elif info.summary is not None:
            info.earlier = effort_in_summary(info.summary)
        info.resumed = [*info.resumed, time.time()]
        info.status = "running"
        self.save()

    def check_model(self, model: str) -> None:
        """Refuse to mix the samples of two models in one run.

        Raises:
            StorageError: The run was sampled from another model.
        """
        before = {entry["info"]["model"] for entry in self.info.engines if entry.get("info")}
        if before and model not in before:
            raise StorageError(f"{self.path} was sampled from {', '.join(sorted(before))}, the engines serve {model}")

    @property
    def name(self) -> str:
        """The folder."""
        return str(self.path)

    @property
    def life(self) -> int:
        """How often the run was resumed."""
        return len(self.info.resumed)

    def record(self, record: Record) -> None:
        """Append an accepted chunk or a restart to the journal; raises OSError when the disk refuses."""
        self.journal.append(record)

    def emit(self, sample: Sample) -> None:
        """Append one sample; raises OSError when the disk refuses."""
        self._samples.append(self._encoder.encode(sample) + b"\n")
        self.tally.add(sample)

    def measure(self, snapshot: Snapshot) -> None:
        """Append one line of metrics."""
        line = {k: v for k, v in msgspec.to_builtins(snapshot).items() if k not in {"groups", "tail"}}
        self._metrics.append(self._encoder.encode(line) + b"\n")

    def sync(self) -> None:
        """Wait until journal and samples are on the disk."""
        self.journal.sync()
        self._samples.sync()

    def save(self) -> None:
        """Replace run.json by what `info` says now."""
        _replace(self.path / "run.json", _pretty(self.info))

    def close(self) -> None:
        """Release the folder."""
        self.journal.close()
        self._samples.close()
        self._metrics.close()
        os.close(self._lock)


def require_fresh(path: Path) -> None:
    """Refuse a folder that a new run must not write into, before anything expensive is started.

    It may hold logs/, because engines started for the run log there before it exists.

    Raises:
        StorageError: The folder is another run's, or holds other files.
    """
    if (path / "run.json").exists():
        raise StorageError(f"{path} holds another run; continue it with --resume {path}, or choose another --out")
    try:
        taken = path.exists() and (not path.is_dir() or any(entry.name != "logs" for entry in path.iterdir()))
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error
    if taken:
        raise StorageError(f"{path} is not an empty folder; choose another --out")


def _lock(path: Path) -> int:
    handle = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise StorageError(f"{path} is being written by another process; wait for it to end") from None
    return handle


def _replace(path: Path, content: bytes) -> None:
    draft = path.with_name(path.name + ".new")
    with draft.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def _pretty(info: RunInfo) -> bytes:
    return msgspec.json.format(msgspec.json.encode(info), indent=2) + b"\n"


def _settle_samples(path: Path, finished: set[str]) -> dict[str, SampleHead]:
    """Keep the lines of samples that the journal knows as finished, and say which, by id.

    A torn end is dropped, and so are samples that are tried again: those that failed, and those whose last record a
    power cut has taken.
    """
    kept: dict[str, SampleHead] = {}
    dropped = False
    draft = path.with_name(path.name + ".new")
    if not path.exists():
        return kept
    with path.open("rb") as file, draft.open("wb") as out:
        for line in file:
            head = _head(line)
            if head is not None and head.finish_reason in _KEPT and head.id in finished and head.id not in kept:
                kept[head.id] = head
                out.write(line)
            else:
                dropped = True
        out.flush()
        os.fsync(out.fileno())
    if dropped:
        draft.replace(path)
    else:
        draft.unlink()
    return kept


def _head(line: bytes) -> SampleHead | None:
    try:
        return msgspec.json.decode(line, type=SampleHead) if line.endswith(b"\n") else None
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
