"""The pictures of a report, each from one part of it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from seer_async.report.plot import Axis, Plot, nice_step, stairs, time_axis
from seer_async.report.words import count, duration, number, share, visible

if TYPE_CHECKING:
    from collections.abc import Sequence
    from xml.etree.ElementTree import Element

    from seer_async.report.chunks import Chunks
    from seer_async.report.drafts import Drafts
    from seer_async.report.estimates import Estimates
    from seer_async.report.lengths import Lengths
    from seer_async.report.report import Report
    from seer_async.report.thin import Point
    from seer_async.report.timeline import EngineLine

_GRID = 4  # lines of the KV axis, which the other axis shares
SERIES = 6  # line styles that can be told apart
_NAME = 28


def _percent(label: str, high: float = 1.0) -> Axis:
    return Axis(high, label, lambda value: f"{100 * value:g}%", step=0.25 if high == 1 else None)


def completion_chart(report: Report) -> Element:
    """Samples finished over time, with the tail marked."""
    end = report.completion
    text = f"{end.ended:,} of {end.total:,} samples ended within {duration(end.seconds)}"
    tail = ""
    if end.tail_s is not None:
        tail = f"tail {duration(end.tail_s)}, {share(end.tail_share)}"
    plot = Plot(
        "Samples finished over time", f"{text}; {tail}".strip("; "), time_axis(end.seconds), _percent("finished")
    )
    if end.tail_start is not None:
        plot.stretch(end.tail_start, end.seconds, tail, "tail")
    curve = [(time, ended / max(1, end.total)) for time, ended in end.curve]
    plot.area(stairs(curve), "done")
    plot.line(stairs(curve), "s0")
    _mark_pauses(plot, report.pauses)
    return plot.svg()


def comparison_chart(reports: Sequence[Report]) -> Element:
    """The completion curves of several runs, one over the other."""
    seconds = max(report.completion.seconds for report in reports)
    said = "; ".join(f"{r.subject.name}: {duration(r.completion.seconds)}" for r in reports)
    plot = Plot("Samples finished over time, by run", said, time_axis(seconds), _percent("finished"), height=340)
    for number_, report in enumerate(reports):
        end = report.completion
        plot.line(stairs([(time, ended / max(1, end.total)) for time, ended in end.curve]), f"s{number_ % SERIES}")
    plot.legend([(f"s{i % SERIES}", visible(r.subject.name, _NAME)) for i, r in enumerate(reports)][:12])
    return plot.svg()


def fleet_chart(report: Report) -> Element:
    """Mean KV of the engines between their extremes, and all running requests."""
    fleet = report.timeline
    plot = _kv_plot("Fleet: KV use and running requests", report, fleet.running, f"idle {share(fleet.idle)}")
    plot.area(fleet.kv_high, "between", fleet.kv_low)
    plot.line(fleet.kv_mean, "kv")
    plot.line(fleet.running, "running", plot.y2)
    _mark_pauses(plot, report.pauses)
    return plot.svg()


def engine_chart(report: Report, engine: EngineLine) -> Element:
    """KV and running requests of one engine."""
    said = f"idle {share(engine.idle)}, KV {share(engine.kv_mean)} on average, {share(engine.kv_peak)} at most"
    plot = _kv_plot(f"{engine.name}: KV use and running requests", report, engine.running, said)
    plot.area(engine.kv, "kv")
    plot.line(engine.running, "running", plot.y2)
    _mark_pauses(plot, report.pauses)
    return plot.svg()


def lengths_chart(lengths: Lengths) -> Element:
    """Every response as a dot over its group, groups ordered by mean length."""
    icc = "not known" if lengths.correlation is None else number(lengths.correlation)
    x = Axis(max(1, len(lengths.groups)), "groups, by mean length", count, tight=True, whole=True)
    y = Axis(lengths.longest, "tokens", count, whole=True)
    plot = Plot("Lengths of responses by group", f"{len(lengths.groups):,} groups, intra-class correlation {icc}", x, y)
    plot.dots([(rank + 0.5, length) for rank, length in lengths.dots], "many" if len(lengths.dots) > 1500 else "few")  # noqa: PLR2004 - dots begin to touch
    plot.line(stairs([*((float(i), g.mean) for i, g in enumerate(lengths.groups)), *_last_mean(lengths)]), "mean")
    return plot.svg()


def estimates_chart(estimates: Estimates) -> Element:
    """Estimates at dispatch against the lengths that came; right ones lie on the diagonal."""
    high = float(max((max(dot) for dot in estimates.dots), default=1))
    said = f"{estimates.informed:,} dispatches, median error {estimates.median_error:,} tokens"
    x, y = Axis(high, "length, tokens", count, whole=True), Axis(high, "estimate, tokens", count, whole=True)
    plot = Plot("Estimates against lengths", said, x, y)
    plot.line([(0.0, 0.0), (high, high)], "ideal")
    plot.dots(estimates.dots, "many" if len(estimates.dots) > 1500 else "few")  # noqa: PLR2004 - dots begin to touch
    return plot.svg()


def moves_chart(chunks: Chunks) -> Element:
    """The share of chunks that ran elsewhere than the chunk before them, by their number."""
    shares = [c.moved / c.chunks for c in chunks.classes]
    high = max([0.05, *shares])
    plot = Plot(
        "Chunks that moved, by number", f"{chunks.moved:,} of {chunks.count:,} chunks moved", _numbers(chunks),
        _percent("moved", high),
    )  # fmt: skip
    for c, value in zip(chunks.classes, shares, strict=True):
        plot.bar(c.first + 0.1, c.last + 0.9, value, "s0")
    return plot.svg()


def waits_chart(chunks: Chunks) -> Element:
    """How long chunks waited, by their number: the median as a dark bar, the 90th percentile as a light one."""
    y = Axis(max([1e-3, *(c.wait_p90 for c in chunks.classes)]), "seconds")
    plot = Plot("Wait in the Request Buffer, by chunk", f"{number(chunks.wait_mean)} s on average", _numbers(chunks), y)
    for c in chunks.classes:
        plot.bar(c.first + 0.1, c.last + 0.9, c.wait_p90, "light")
        plot.bar(c.first + 0.1, c.last + 0.9, c.wait_median, "s0")
    return plot.svg()


def drafts_chart(report: Report, drafts: Drafts) -> Element:
    """Acceptance and tokens a draft over time."""
    said = f"{share(drafts.share)} of drafted tokens accepted, {number(drafts.length)} tokens a draft"
    longest = Axis(max([2.0, *(value for _, value in drafts.lengths)]), "tokens a draft", low=1)
    x = time_axis(report.completion.seconds)
    plot = Plot("Acceptance of drafts over time", said, x, _percent("accepted"), y2=longest)
    plot.area(drafts.acceptance, "kv")
    plot.line(drafts.lengths, "running", plot.y2)
    return plot.svg()


def _kv_plot(title: str, report: Report, running: Sequence[Point], said: str) -> Plot:
    most = max((value for _, value in running), default=1.0)
    step = math.ceil(nice_step(max(1.0, most), _GRID))
    requests = Axis(_GRID * step, "running", count, step=step)
    return Plot(title, said, time_axis(report.completion.seconds), _percent("KV"), y2=requests, height=220)


def _numbers(chunks: Chunks) -> Axis:
    return Axis(
        max(1, len(chunks.classes) and chunks.classes[-1].last + 1), "chunk", count, tight=True, whole=True, cells=True
    )


def _mark_pauses(plot: Plot, pauses: Sequence[float]) -> None:
    for pause in pauses:
        plot.rule(pause, "pause")


def _last_mean(lengths: Lengths) -> list[Point]:
    return [(float(len(lengths.groups)), lengths.groups[-1].mean)] if lengths.groups else []
