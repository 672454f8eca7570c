"""The HTML page: one file that needs nothing else, and that can do nothing.

Invariant: its Content-Security-Policy allows its own style sheet, by hash, and nothing more: no script, no request, no
form. So even markup that slipped in could not act.
"""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from typing import TYPE_CHECKING

from seer_async.report import mark
from seer_async.report.charts import comparison_chart
from seer_async.report.element import Element, element, to_html
from seer_async.report.facts import facts_of
from seer_async.report.sections import figure, sections
from seer_async.report.tables import Cell, table
from seer_async.report.words import count, moment, visible

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from seer_async.report.facts import Fact
    from seer_async.report.report import Report, Subject


def html_page(reports: Sequence[Report]) -> str:
    """A page on one run, or on several side by side and then one after the other."""
    style = files("seer_async.report").joinpath("style.css").read_text(encoding="utf-8")
    title = " | ".join(visible(report.subject.name) for report in reports[:4])
    if len(reports) == 1:
        body = [element("header", *_top(reports[0])), element("main", *sections(reports[0]))]
    else:
        body = [_comparison(reports), element("main", *(_one_of(report) for report in reports))]
    page = element(
        "html",
        element(
            "head",
            element("meta", charset="utf-8"),
            element("meta", name="generator", content=mark.HTML),
            element("meta", http_equiv="Content-Security-Policy", content=_policy(style)),
            element("meta", name="referrer", content="no-referrer"),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("title", f"Seer: {title}"),
            _style(style),
        ),
        element("body", *body, element("footer", element("p", _footer(reports)))),
        lang="en",
    )
    return to_html(page)


def _policy(style: str) -> str:
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


def _style(text: str) -> Element:
    style = element("style")
    style.text = text  # our own, and as it is, because its hash must fit
    return style


def _footer(reports: Sequence[Report]) -> str:
    return (
        f"Written by seer report from {', '.join(report.subject.path for report in reports)}. Tail: the last tenth of "
        "the samples to finish; tail time runs from the moment nine tenths have finished to the end. Times leave out "
        "the pauses between an interruption and its resumption."
    )


def _comparison(reports: Sequence[Report]) -> Element:
    first = reports[0]
    rows: list[list[Cell]] = [
        [fact.name, fact.said(first), *(_beside(fact, r, first) for r in reports[1:])] for fact in facts_of(*reports)
    ]
    heads: list[Cell] = ["", *(element("bdi", report.subject.name) for report in reports)]
    policies: list[Cell] = ["Policy", *(report.subject.policy for report in reports)]
    return element(
        "header",
        element("h1", f"{len(reports)} runs side by side"),
        element(
            "p", f"Small figures are multiples of those of the first run, {visible(first.subject.name)}.", class_="soft"
        ),
        element(
            "div",
            table(heads, [policies, *rows]),
            figure("Samples finished over time", "Share of each run's samples.", comparison_chart(reports)),
            class_="beside",
        ),
    )


def _beside(fact: Fact, report: Report, first: Report) -> Element:
    return element("td", fact.said(report), element("span", fact.against(report, first)))


def _one_of(report: Report) -> Element:
    return element("article", *_top(report), *sections(report))


def _top(report: Report) -> Iterator[Element]:
    """What was run, and the key figures."""
    yield element("h1", "Rollout ", element("bdi", report.subject.name))
    yield _badges(report)
    yield from (element("p", problem, class_="problem") for problem in report.subject.problems)
    yield _description(report.subject)
    yield element("dl", *(_card(fact, report) for fact in facts_of(report)), class_="cards")


def _card(fact: Fact, report: Report) -> Element:
    value = element("dd", fact.said(report))
    return element("div", element("dt", fact.name), value, element("dd", fact.meaning, class_="meaning"))


def _badges(report: Report) -> Element:
    subject = report.subject
    ended = subject.status == "done" and not report.figures.failed
    return element(
        "p",
        element("span", subject.status, class_=f"badge {'good' if ended else 'bad'}"),
        element("span", subject.fidelity, class_=f"badge {'good' if subject.on_policy else 'bad'}"),
    )


def _description(subject: Subject) -> Element:
    said = {
        "Run": f"{subject.run}, seed {subject.seed}, Seer {subject.version}",
        "Started": moment(subject.started) + _resumed(subject.resumed),
        "Prompts": f"{count(subject.groups)} groups of {subject.n} from {subject.dataset}",
        "Model": ", ".join(subject.models) or "not recorded yet",
        "Engines": f"{len(subject.engines)}, policy {subject.policy}"
        if subject.engines
        else f"policy {subject.policy}",
    }
    pairs = [pair for name, text in said.items() for pair in (element("dt", name), element("dd", element("bdi", text)))]
    return element("dl", *pairs, class_="run")


def _resumed(times: int) -> str:
    return f", resumed {'once' if times == 1 else f'{times} times'}" if times else ""
