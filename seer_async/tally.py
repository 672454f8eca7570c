"""What a run came to over all its parts: a run that was resumed is one run.

Invariant: an `Effort` is a sum over parts, so figures of a resumed run are those of all its parts together, and a part
that was killed counts as far as metrics.jsonl goes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from pathlib import Path

    from seer_async.snapshot import Snapshot
    from seer_async.types import Sample


class Effort(msgspec.Struct, frozen=True, kw_only=True):
    """What it took: seconds of rolling out, tokens accepted from engines, and what went wrong on the way.

    `generated` counts tokens that a restart has thrown away later, but none of replies that were refused whole.
    """

    seconds: float = 0.0
    generated: int = 0
    migrations: int = 0
    retries: int = 0
    restarts: int = 0
    preemptions: int = 0
    pooled_tokens: int = 0

    def __add__(self, other: Effort) -> Effort:
        """Both parts together."""
        return Effort(**{name: getattr(self, name) + getattr(other, name) for name in self.__struct_fields__})

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens a second; 0 where no time has passed."""
        return round(self.generated / self.seconds, 1) if self.seconds else 0.0


class SampleHead(msgspec.Struct, frozen=True):
    """What is read again of a line of samples.jsonl."""

    id: str
    finish_reason: str
    weight_version: str = ""
    on_policy: bool = True
    error: str = ""


class Tally:
    """The samples that are written: how many are off-policy, how many of each weight version, and the first error."""

    def __init__(self) -> None:
        self.off_policy = 0
        self.weight_versions: dict[str, int] = {}
        self.first_error = ""

    def add(self, sample: Sample | SampleHead) -> None:
        """Count one sample."""
        if sample.error:
            self.first_error = self.first_error or f"{sample.id}: {sample.error}"
            return
        self.off_policy += not sample.on_policy
        self.weight_versions[sample.weight_version] = self.weight_versions.get(sample.weight_version, 0) + 1

    @property
    def on_policy(self) -> bool:
        """Whether all samples are of the same weights, each from its first token to its last."""
        return not self.off_policy and len(self.weight_versions) <= 1


def effort_of(last: Snapshot | _Line, seconds: float) -> Effort:
    """What the part took that ends with this snapshot, or with what was written down of it."""
    return Effort(
        seconds=round(seconds, 3),
        generated=sum(engine.generated for engine in last.engines),
        migrations=last.migrations,
        retries=last.retries,
        restarts=last.restarts,
        preemptions=last.preemptions,
        pooled_tokens=last.pool.loaded if last.pool else 0,
    )


def effort_in_summary(summary: dict[str, Any]) -> Effort:
    """What a run took, by the summary in its run.json."""
    known = {name: summary[name] for name in Effort.__struct_fields__ if name in summary}
    guess = {"generated": round(summary.get("tokens_per_second", 0.0) * summary.get("seconds", 0.0))}
    return msgspec.convert(guess | known, Effort)


class _Engine(msgspec.Struct):
    generated: int


class _Pool(msgspec.Struct):
    loaded: int


class _Line(msgspec.Struct, kw_only=True):
    now: float
    migrations: int
    retries: int
    restarts: int
    preemptions: int
    engines: list[_Engine]
    pool: _Pool | None = None


def effort_in_metrics(path: Path, since: float) -> Effort:
    """What the part that began at `since` (Unix seconds) took until it was killed, as far as metrics.jsonl goes."""
    first: _Line | None = None
    last: _Line | None = None
    if path.exists():
        with path.open("rb") as file:
            for text in file:
                line = _line(text)
                if line is not None and line.now >= since:
                    first, last = first or line, line
    if first is None or last is None:
        return Effort()
    return effort_of(last, last.now - first.now)


def _line(text: bytes) -> _Line | None:
    try:
        return msgspec.json.decode(text, type=_Line)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
