"""The key figures in the order in which they are told, with their names and what they mean."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from seer_async.report.words import change, count, duration, number, share

if TYPE_CHECKING:
    from collections.abc import Callable

    from seer_async.report.report import Report


class Fact(NamedTuple):
    """One key figure: its name, its value as text and as a number to compare by, and what it is."""

    name: str
    meaning: str
    value: Callable[[Report], float | None]
    text: Callable[[float | None], str]

    def said(self, report: Report) -> str:
        """The figure as text."""
        return self.text(self.value(report))

    def against(self, report: Report, base: Report) -> str:
        """The figure as a multiple of another run's."""
        return change(self.value(report), self.value(base))


def _rate(value: float | None) -> str:
    return number(value, " tok/s")


FACTS = (
    Fact("Throughput", "accepted tokens over total time", lambda r: r.figures.throughput, _rate),
    Fact("Total time", "from the first request queued to the last finish", lambda r: r.figures.seconds, duration),
    Fact("Tail time", "after nine tenths of the samples had finished", lambda r: r.figures.tail_s, duration),
    Fact("Tail share", "of the total time", lambda r: r.figures.tail_share, share),
    Fact("Idle", "share of the time without a call in flight, mean of the engines", lambda r: r.figures.idle, share),
    Fact("Tokens", "accepted and kept", lambda r: r.figures.tokens, count),
    Fact("Samples done", "ended by themselves", lambda r: r.figures.done, count),
    Fact("Failed", "samples with an error", lambda r: r.figures.failed, count),
    Fact("Not finished", "samples without an end", lambda r: r.figures.unfinished, count),
    Fact("Migrations", "chunks on another engine than the one before", lambda r: r.figures.migrations, count),
    Fact("Retries", "calls that brought nothing", lambda r: r.figures.retries, count),
    Fact("Restarts", "responses begun again for new weights", lambda r: r.figures.restarts, count),
    Fact("Preemptions", "by engines, during this run", lambda r: r.figures.preemptions, count),
    Fact("Pooled tokens", "loaded from the KV pool instead of computed", lambda r: r.figures.pooled_tokens, count),
    Fact("Drafts accepted", "tokens that drafts guessed right", lambda r: r.figures.accepted, count),
    Fact(
        "Tokens a draft", "that a verified draft brought, bonus included", lambda r: r.figures.acceptance_length, number
    ),
    Fact("Mean length", "of finished responses, in tokens", lambda r: r.lengths.mean, count),
    Fact("Length correlation", "within groups: 0 by chance, 1 if alike", lambda r: r.lengths.correlation, number),
)
_MISHAPS = {"Failed", "Not finished", "Restarts"}


def facts_of(*reports: Report) -> list[Fact]:
    """The figures that at least one of the reports has; of mishaps, those that happened."""
    return [fact for fact in FACTS if any(_tells(fact, fact.value(report)) for report in reports)]


def _tells(fact: Fact, value: float | None) -> bool:
    return value is not None and (value > 0 or fact.name not in _MISHAPS)
