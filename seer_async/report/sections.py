"""The sections on one run: each a heading, pictures, and the numbers as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from seer_async.report.charts import (
    completion_chart,
    drafts_chart,
    engine_chart,
    estimates_chart,
    fleet_chart,
    lengths_chart,
    moves_chart,
    waits_chart,
)
from seer_async.report.chunks import matrix
from seer_async.report.drafttables import draft_group_table, drafter_table
from seer_async.report.element import Element, element
from seer_async.report.tables import folded, table
from seer_async.report.words import count, number, share, visible

if TYPE_CHECKING:
    from collections.abc import Iterator

    from seer_async.report.chunks import ChunkClass
    from seer_async.report.report import Report

_MOST_ROWS = 50


def sections(report: Report) -> Iterator[Element]:
    """Everything below the key figures; what a run has nothing of is left out."""
    yield _section("Completion and lengths", *_ends(report))
    if report.timeline.engines:
        yield _section("Fleet", *_fleet(report))
    if report.chunks.count:
        yield _section("Chunks", *_chunks(report))
    if report.drafts:
        yield _section("Drafts", *_drafts(report))
    yield _section("Settings", *_settings(report))


def figure(title: str, words: str, picture: Element) -> Element:
    """A picture with its caption above it."""
    caption = element("figcaption", element("h3", title), element("p", words) if words else None)
    return element("figure", caption, picture)


def _section(title: str, *content: Element) -> Element:
    return element("section", element("h2", title), *content)


def _plots(*figures: Element) -> Element:
    return element("div", *figures, class_="plots")


def _ends(report: Report) -> Iterator[Element]:
    plots = []
    if report.completion.ended:
        words = "Share of all samples that have ended; the shaded end is the tail, the last tenth to finish."
        words += " Dashes without shade: interrupted and resumed." if report.pauses else ""
        plots.append(figure("Samples finished over time", words, completion_chart(report)))
    if report.lengths.groups:
        plots.append(figure("Length by group", _correlation(report), lengths_chart(report.lengths)))
    if not plots:
        yield element("p", "No sample has ended yet.")
        return
    yield _plots(*plots)
    if groups := report.lengths.groups:
        rows = [
            [visible(g.id), count(g.responses), count(g.shortest), number(g.mean), count(g.longest)]
            for g in groups[::-1][:_MOST_ROWS]
        ]
        summary = f"The {len(rows)} groups with the longest responses" if len(groups) > _MOST_ROWS else "All groups"
        yield folded(summary, table(["Group", "Finished", "Shortest", "Mean", "Longest"], rows))


def _correlation(report: Report) -> str:
    lengths = report.lengths
    words = "Each dot is a response, the line its group's mean."
    if lengths.correlation is None or lengths.log_correlation is None:
        return f"{words} Too little has finished to say how alike siblings are."
    return (
        f"{words} Intra-class correlation {number(lengths.correlation)} ({number(lengths.log_correlation)} of "
        "log lengths): 0 by chance, 1 if siblings are equally long."
    )


def _fleet(report: Report) -> Iterator[Element]:
    fleet = report.timeline
    shown = [engine for engine in fleet.engines if engine.running or engine.kv]
    plots = []
    if len(fleet.engines) > 1:
        words = (
            "Line in the band: mean KV use between the engines' extremes. Thin line: running requests, all together."
        )
        plots.append(figure("The whole fleet", words, fleet_chart(report)))
    words = "Area: KV use as the engine reports it. Thin line: running requests."
    plots += [figure(visible(engine.name), words, engine_chart(report, engine)) for engine in shown]
    yield _plots(*plots)
    heads = ["Engine", "Tokens", "Chunks", "Idle", "KV mean", "KV peak", "Most running", "Preemptions"]
    rows = [
        [
            visible(e.name), count(e.tokens), count(e.chunks), share(e.idle), share(e.kv_mean), share(e.kv_peak),
            count(e.running_peak), count(e.preemptions),
        ]
        for e in fleet.engines
    ]  # fmt: skip
    numbers = table(heads, rows)
    yield numbers if len(rows) <= _MOST_ROWS else folded(f"All {len(rows)} engines", numbers)


def _chunks(report: Report) -> Iterator[Element]:
    chunks, estimates = report.chunks, report.estimates
    moved = f"Share of the chunks of each number that moved: {chunks.moved:,} of {chunks.count:,}."
    plots = [figure("Migrations", moved, moves_chart(chunks))] if chunks.moved else []
    plots += [
        figure("Queue wait", "Time in the Request Buffer. Strong: median. Pale: 90th percentile.", waits_chart(chunks)),
    ]
    if estimates.dots:
        plots.append(figure("Estimate against length", _estimated(report), estimates_chart(estimates)))
    yield _plots(*plots)
    if not chunks.moved:
        yield element("p", "No chunk ran on another engine than the one before.")
    if not estimates.dots:
        yield element("p", "No response was dispatched after a sibling had finished, so there was nothing to estimate.")
    if chunks.routes:
        yield folded("Moves between engines", _routes(report))
    heads = ["Chunk", "Chunks", "Moved", "Wait, median s", "90th percentile s", "Longest s"]
    yield folded("Chunks by number", table(heads, [_chunk_row(c) for c in chunks.classes]))


def _estimated(report: Report) -> str:
    e = report.estimates
    return (
        f"Of {e.dispatches:,} dispatches {e.informed:,} came after a sibling had finished, the rest at the limit of "
        f"{e.limit:,}. Their median error was {e.median_error:,} tokens ({e.p90_error:,} at the 90th percentile), "
        f"{share(e.too_short)} were too short. Exact ones lie on the dashes."
    )


def _chunk_row(c: ChunkClass) -> list[str]:
    name = str(c.first) if c.first == c.last else f"{c.first} to {c.last}"
    return [name, count(c.chunks), count(c.moved), *(f"{s:.3f}" for s in (c.wait_median, c.wait_p90, c.wait_max))]


def _routes(report: Report) -> Element:
    moves = matrix(report.chunks.routes)
    names = [engine.name for engine in report.timeline.engines]
    if len(names) > _MOST_ROWS // 4:
        return table(["From", "To", "Moves"], [[a, b, count(n)] for a, b, n in report.chunks.routes[:_MOST_ROWS]])
    rows = [[f"from {a}", *(count(moves.get(a, {}).get(b, 0)) for b in names)] for a in names]
    return table(["", *(f"to {name}" for name in names)], rows)


def _drafts(report: Report) -> Iterator[Element]:
    drafts = report.drafts
    assert drafts
    words = (
        f"Area: share of drafted tokens that were accepted, {share(drafts.share)} over all. Thin line: tokens that a "
        f"draft brought, the bonus token included, {number(drafts.length)} over all."
    )
    if drafts.acceptance:
        yield _plots(figure("Acceptance over time", words, drafts_chart(report, drafts)))
    yield table(
        ["", "Tokens"],
        [
            ["Drafted", count(drafts.drafted)],
            ["Accepted", count(drafts.accepted)],
            ["All that the engines generated", count(drafts.generated)],
            ["Drafts verified", count(drafts.verified)],
        ],
    )
    if drafts.engines:
        yield table(*drafter_table(drafts))
    if drafts.groups:
        yield folded("The groups that drafts helped most and least", table(*draft_group_table(drafts)))


def _settings(report: Report) -> Iterator[Element]:
    subject = report.subject
    yield table(["Key", "Value"], list(subject.settings.items()), text=True)
    if subject.engines:
        yield folded("Engines", table(["Engine", "URL", ""], subject.engines, text=True))
