"""Who is told what a rollout or a service brings: the sink, which keeps it, and the tracer, which sees calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from seer_async.events import Dispatch, Record
    from seer_async.snapshot import Snapshot
    from seer_async.types import Sample


class Sink(Protocol):
    """Where records and samples go. What it is called as in an error, and how often the run was begun before."""

    @property
    def name(self) -> str:
        """What to call it."""

    @property
    def life(self) -> int:
        """0 for a new run, 1 more each time it is resumed."""

    def record(self, record: Record) -> None:
        """An accepted chunk or a restart; raises OSError if it cannot be kept."""

    def emit(self, sample: Sample) -> None:
        """A finished sample; raises OSError if it cannot be kept."""

    def measure(self, snapshot: Snapshot) -> None:
        """The fleet at one moment; raises OSError."""

    def sync(self) -> None:
        """Make safe what was given; may take long; raises OSError."""


class Tracer(Protocol):
    """Sees calls come and go; the trace file."""

    def dispatched(self, dispatch: Dispatch, now: float) -> None:
        """A call left."""

    def finished(self, call: int, now: float, *, tokens: int, outcome: str, finish_reason: str | None) -> None:
        """A call was answered, or failed."""

    def cancelled(self, call: int, now: float) -> None:
        """A call was given up."""

    def counter(self, snapshot: Snapshot) -> None:
        """The fleet at one moment."""
