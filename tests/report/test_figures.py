"""Every figure against a run worked out by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from seer_async.report import Report, read_run, report_on
from seer_async.report.counters import increase
from seer_async.report.elapsed import Elapsed
from seer_async.report.lengths import intraclass, quantile
from seer_async.report.plot import nice_step
from seer_async.report.thin import thin_dots, thin_line
from tests.report.folders import START, chunk, folder, reading, record, sample, two_groups

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def report(tmp_path: Path) -> Report:
    return report_on(read_run(two_groups(tmp_path / "hand")))


def test_key_figures(report: Report) -> None:
    figures = report.figures
    assert (figures.samples, figures.done, figures.failed, figures.unfinished) == (4, 4, 0, 0)
    assert (figures.tokens, figures.seconds, figures.throughput) == (80, 10, 8)
    assert (figures.tail_s, figures.tail_share) == (0, 0)  # of four samples, the last is the nine tenths' end
    assert (figures.migrations, figures.chunks, figures.retries, figures.preemptions) == (1, 7, 2, 3)
    assert (figures.pooled_tokens, figures.cached_tokens, figures.accepted) == (6, 13, None)
    assert figures.idle == pytest.approx((0.4 + 0.0) / 2)


def test_the_tail_of_twenty(tmp_path: Path) -> None:
    samples = [sample(f"g/{i}", [chunk(0, 5, "a", 0, 1 + i)]) for i in range(20)]
    end = report_on(read_run(folder(tmp_path / "r", samples))).completion
    assert (end.tail_start, end.tail_s, end.tail_share) == (18, 2, 0.1)


def test_timeline(report: Report) -> None:
    a, b = report.timeline.engines
    assert (a.name, a.tokens, a.idle, a.running_peak, a.kv_peak) == ("a", 40, pytest.approx(0.4), 2, 0.5)
    assert a.kv_mean == pytest.approx(0.5 * 5 / 10)
    assert b.kv_mean == pytest.approx((0.1 * 5 + 0.3 * 4) / 10)
    assert b.idle == 0
    assert a.running == [(0, 0), (0, 2), (2, 2), (2, 2), (3, 2), (3, 1), (6, 1), (6, 0)]
    assert report.timeline.kv_mean[1] == (1, pytest.approx(0.3))


def test_readings_after_the_end_do_not_count(tmp_path: Path) -> None:
    metrics = [reading(t, {"a": {"kv_used": 0.5}}) for t in (0, 1, 2, 30)]
    engine = report_on(read_run(folder(tmp_path / "r", [sample("g/0", [chunk(0, 5, "a", 0, 2)])], metrics))).timeline
    assert engine.engines[0].kv_mean == 0.5
    assert engine.kv_mean[-1] == (2, 0.5)


def test_lengths(report: Report) -> None:
    lengths = report.lengths
    assert [(g.id, g.mean) for g in lengths.groups] == [("g", 20), ("h", 20)]
    assert sorted(lengths.dots) == [(0, 10), (0, 30), (1, 20), (1, 20)]
    assert lengths.correlation == -1  # nothing between the groups, everything within one
    assert (lengths.mean, lengths.median, lengths.longest) == (20, 20, 30)


def test_intraclass_correlation() -> None:
    assert intraclass({"a": [1, 1], "b": [5, 5], "c": [9, 9]}) == 1
    # means 2 and 5: between the groups 2 * (1.5**2 + 1.5**2) / 1 = 9, within them 2 / 2 = 1, so (9 - 1) / (9 + 1)
    assert intraclass({"a": [1.2928932188, 2.7071067812], "b": [4.2928932188, 5.7071067812]}) == pytest.approx(0.8)
    assert intraclass({"a": [1, 2]}) is None
    assert intraclass({"a": [1], "b": [2]}) is None
    assert intraclass({"a": [3, 3], "b": [3, 3]}) is None


def test_estimates(report: Report) -> None:
    """g/0 ends at 2 with 10; so g/1 is dispatched at 4 and at 6 for 10 and then 20. h/1 goes before h/0 has ended."""
    estimates = report.estimates
    assert (estimates.dispatches, estimates.informed, estimates.limit) == (7, 2, 100)
    assert estimates.dots == [(30, 10), (30, 20)]
    assert (estimates.median_error, estimates.p90_error, estimates.too_short) == (10, 20, 1.0)


def test_chunks(report: Report) -> None:
    first, second, third = report.chunks.classes
    assert (first.chunks, first.moved, first.wait_max) == (4, 0, pytest.approx(2))
    assert (second.chunks, second.moved, second.wait_max) == (2, 1, pytest.approx(1))
    assert (third.chunks, third.moved) == (1, 0)
    assert report.chunks.routes == [("a", "b", 1)]
    assert report.chunks.wait_mean == pytest.approx(3 / 7)


def test_drafts_count_from_the_first_reading(tmp_path: Path) -> None:
    def said(verified: int, drafted: int, accepted: int, generated: int) -> dict[str, int]:
        return {"verified": verified, "drafted": drafted, "accepted": accepted, "generated": generated}

    counts = [None, said(900, 5000, 3000, 9000), said(910, 5040, 3030, 9100), said(0, 0, 0, 0), said(10, 20, 0, 30)]
    metrics = [reading(i, {"a": {}}, drafts=drafts) for i, drafts in enumerate(counts)]
    drafts = report_on(read_run(folder(tmp_path / "r", [sample("g/0", [chunk(0, 5, "a", 0, 4)])], metrics))).drafts
    assert drafts is not None
    assert (drafts.verified, drafts.drafted, drafts.accepted, drafts.generated) == (20, 60, 30, 130)
    assert drafts.acceptance == [(2, 0.75), (4, 0.0)]
    assert drafts.lengths == [(2, 4.0), (4, 1.0)]


def test_drafting_by_engine_and_group(tmp_path: Path) -> None:
    """What engine a gained in 10 seconds: 30 of 100 tokens came from drafts, so 70 steps of a request."""
    before = {"verified": 5, "drafted": 9, "accepted": 2, "generated": 50, "steps": 100, "steps_off": 10,
              "switch_offs": 1, "drafter_s": 1.0, "drafted_at": [5, 4], "accepted_at": [2]}  # fmt: skip
    now = {"verified": 25, "drafted": 69, "accepted": 32, "generated": 150, "steps": 150, "steps_off": 20,
           "switch_offs": 3, "drafter_s": 1.5, "drafted_at": [25, 24, 20], "accepted_at": [12, 12, 8]}  # fmt: skip
    stock = {"verified": 4, "drafted": 8, "accepted": 6, "generated": 9}
    metrics = [
        reading(0, {"a": {}, "b": {}}),
        reading(2, {"a": {"drafts": before}, "b": {"drafts": dict.fromkeys(stock, 0)}}, drafts=before),
        reading(12, {"a": {"drafts": now}, "b": {"drafts": stock}}, drafts=now),
    ]
    groups = {"g": (20, 60, 30), "h": (20, 60, 45), "few": (1, 3, 3)}
    path = folder(tmp_path / "r", [sample("g/0", [chunk(0, 5, "a", 0, 12)])], metrics, draft_groups=groups)
    drafts = report_on(read_run(path)).drafts
    assert drafts is not None
    a, b = drafts.engines
    assert (a.name, a.verified, a.drafted, a.accepted, a.steps, a.steps_off, a.switch_offs) == (
        "a", 20, 60, 30, 50, 10, 2,
    )  # fmt: skip
    assert a.tokens_per_step == pytest.approx(100 / 70)
    assert a.acceptance == [0.5, 0.6, 0.4]
    assert (a.step_ms, a.time_share, a.off_share) == (pytest.approx(10), pytest.approx(0.05), 0.2)
    assert (b.tokens_per_step, b.acceptance, b.steps, b.step_ms, b.off_share) == (3.0, [], None, None, None)
    assert [(group.id, group.share, group.length) for group in drafts.groups] == [("h", 0.75, 3.25), ("g", 0.5, 2.5)]


def test_pauses_are_left_out(tmp_path: Path) -> None:
    samples = [
        sample("g/0", [chunk(0, 10, "a", 0, 2)]),
        sample("g/1", [chunk(0, 10, "a", 0, 3), chunk(1, 10, "a", 1000, 1004)]),
    ]
    report = report_on(read_run(folder(tmp_path / "r", samples, resumed=[START + 990])))
    assert (report.figures.seconds, report.pauses) == (7, [3])
    assert report.timeline.engines[0].idle == 0


def test_elapsed() -> None:
    elapsed = Elapsed([5, 8, 20, 21], resumed=[10])
    assert [elapsed.at(t) for t in (1, 5, 7, 8, 15, 20, 21, 30)] == [0, 0, 2, 3, 3, 3, 4, 4]
    assert Elapsed([]).at(3) == 0


def test_an_interrupted_run_has_no_tail_yet(tmp_path: Path) -> None:
    path = folder(tmp_path / "r", [sample("g/0", [chunk(0, 10, "a", 0, 2)])], total=4, status="drained")
    journal = [
        record("g/0", chunk(0, 10, "a", 0, 2), "stop"),
        record("g/1", chunk(0, 9, "a", 0, 1)),
        record("g/1", None),
        record("g/1", chunk(0, 8, "b", 1, 4)),
        record("h/0", chunk(0, 7, "b", 0, 3), "stop"),  # killed before its line was written
        record("h/1", chunk(0, 6, "b", 0, 3))[:-9],
    ]
    (path / "journal").write_bytes(b"".join(journal))
    report = report_on(read_run(path))
    figures = report.figures
    assert (figures.done, figures.unfinished, figures.tokens) == (2, 2, 25)
    assert (figures.seconds, figures.tail_s, report.subject.status) == (4, None, "interrupted")
    assert not report.subject.problems


def test_calls_in_flight_show_while_a_run_goes_on(tmp_path: Path) -> None:
    metrics = [reading(t, {"a": {"in_flight": n}, "b": {"in_flight": 1}}) for t, n in ((0, 3), (4, 2))]
    path = folder(tmp_path / "r", [sample("g/0", [chunk(0, 10, "a", 0, 2)])], metrics, total=4, status="running")
    fleet = report_on(read_run(path)).timeline
    assert fleet.engines[0].running == [(0, 3), (4, 2)]
    assert fleet.running == [(0, 4), (4, 3)]
    assert fleet.engines[0].idle == pytest.approx(0.5)


def test_counters_and_steps() -> None:
    assert increase([40, 43, 43]) == 3
    assert increase([5, 7, 0, 2]) == 4
    assert increase([]) == 0
    assert quantile([1, 2, 3, 4], 0.5) == 2
    assert [nice_step(span, 5) for span in (1, 7, 12, 100, 130)] == [0.2, 2, 2.5, 20, 50]


def test_thinning_keeps_ends_and_extremes() -> None:
    line = [(float(i), 0.0) for i in range(10_000)]
    line[3_333], line[7_777] = (3333.0, 9.0), (7777.0, -9.0)
    thin = thin_line(line, 400)
    assert len(thin) <= 410
    assert {line[0], line[-1], line[3_333], line[7_777]} <= set(thin)
    assert thin == sorted(thin)
    dots = thin_dots(range(10_000), 100)
    assert (len(dots), dots[0], dots[-1]) == (100, 0, 9_999)
