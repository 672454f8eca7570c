"""Key figures as Markdown tables, for issues and pull requests.

Invariant: foreign text cannot leave its cell: it is one line, with what Markdown or HTML would obey escaped.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from seer_async.report.drafttables import draft_group_table, drafter_table
from seer_async.report.facts import facts_of
from seer_async.report.mark import MARKDOWN
from seer_async.report.words import count, moment, number, share, visible

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from seer_async.report.report import Report

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~&!@:])")


def markdown_page(reports: Sequence[Report]) -> str:
    """One table of all runs, and a few lines on each."""
    return "\n".join([MARKDOWN, *_comparison(reports), *(line for report in reports for line in _run(report))]) + "\n"


def _comparison(reports: Sequence[Report]) -> Iterator[str]:
    first = reports[0]
    yield _row("", *(_safe(report.subject.name) for report in reports))
    yield _row("---", *("--:" for _ in reports))
    for fact in facts_of(*reports):
        others = (f"{fact.said(r)} {_bracketed(fact.against(r, first))}".strip() for r in reports[1:])
        yield _row(fact.name, fact.said(first), *others)


def _run(report: Report) -> Iterator[str]:
    subject, estimates = report.subject, report.estimates
    yield ""
    yield (
        f"**{_safe(subject.name)}**: {_safe(subject.status)}, {_safe(subject.fidelity)}; "
        + _safe(
            f"{count(subject.groups)} groups of {subject.n} from {subject.dataset}, policy {subject.policy}, "
            f"{', '.join(subject.models) or 'model not recorded'}, {moment(subject.started)}"
        )
    )
    if estimates.informed:
        yield (
            f"Estimates: median error {count(estimates.median_error)} tokens over {count(estimates.informed)} "
            f"dispatches, {share(estimates.too_short)} too short."
        )
    for problem in subject.problems:
        yield f"Note: {_safe(problem)}"
    yield ""
    yield _row("engine", "tokens", "idle", "KV mean", "KV peak", "preemptions")
    yield _row("---", *["--:"] * 5)
    for e in report.timeline.engines:
        shares = (share(e.idle), share(e.kv_mean), share(e.kv_peak))
        yield _row(_safe(e.name), number(e.tokens), *shares, count(e.preemptions))
    if report.drafts and report.drafts.engines:
        yield from _table(*drafter_table(report.drafts))
    if report.drafts and report.drafts.groups:
        yield from _table(*draft_group_table(report.drafts))


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A table whose first column is text."""
    yield ""
    yield _row(*heads)
    yield _row("---", *["--:"] * (len(heads) - 1))
    for row in rows:
        yield _row(_safe(row[0]), *row[1:])


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _bracketed(text: str) -> str:
    return f"({text})" if text else ""


def _safe(text: str) -> str:
    return _SPECIAL.sub(r"\\\1", visible(text, 400))
