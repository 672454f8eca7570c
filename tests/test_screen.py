"""The screen's layout: it fits any terminal, says what it leaves out, and shows names that do no harm."""

from __future__ import annotations

import re
import unicodedata
from typing import TYPE_CHECKING, Any

import pytest
from msgspec.structs import replace
from rich.cells import cell_len

from seer_async.events import DrainRequested
from seer_async.snapshot import DraftView, PoolView
from seer_cli.panel import clean, duration, share_out, short
from seer_cli.screen import Frame, eta, lay_out
from tests.fake_run import FakeRun
from tests.views import HOSTILE, REQUEST, engine, group, moments, snapshot

if TYPE_CHECKING:
    from seer_async.snapshot import Snapshot

SIZES = [(80, 24), (100, 30), (160, 50), (119, 29), (120, 30), (40, 12), (20, 5), (300, 90)]


def screen(seen: Snapshot, size: tuple[int, int] = (100, 30), rate: float | None = 50.0, **more: Any) -> list[str]:
    frame = Frame("run-1", "rolling out", 75.0, seen, rate, {view.name: rate for view in seen.engines})
    return [line.plain for line in lay_out(frame._replace(**more), *size)]


@pytest.fixture(scope="module")
def large() -> list[Snapshot]:
    return list(moments(FakeRun(engines=64, groups=1000), 1, 14))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("final", [False, True])
def test_nothing_is_wider_or_longer_than_the_screen(size: tuple[int, int], final: bool, large: list[Snapshot]) -> None:
    hostile = moments(FakeRun(engines=5, groups=9, group_id=HOSTILE), 1, 15, 40)
    small = moments(FakeRun(engines=1, groups=1), 1, 5)
    huge = snapshot(done=10**6, total=10**7, tokens=10**12, tokens_left=10**12, waiting=10**7, migrations=10**8)
    for seen in [*hostile, *small, *large, huge, snapshot(engines=[], groups=[], tail=[], total=0, done=0, failed=0)]:
        frame = Frame("run" * 30, "phase " * 30, 1e6, seen, 1e6, {view.name: 1e5 for view in seen.engines}, final)
        lines = lay_out(frame, *size)
        assert len(lines) <= size[1]
        assert max(line.cell_len for line in lines) <= size[0]


def test_large_fleets_fill_the_screen_and_say_what_is_missing(large: list[Snapshot]) -> None:
    for size in ((80, 24), (100, 30), (160, 50)):
        lines = screen(large[1], size)
        assert len(lines) == size[1]
        hidden = [int(m[1]) for line in lines if (m := re.search(r"\+(\d+) more", line))]
        engines = sum(bool(re.match(r" engine-\d+ ", line)) for line in lines)
        groups = sum(bool(re.match(r" problem-\d+ ", line)) for line in lines)
        assert hidden == [64 - engines, len(large[1].groups) - groups]
        assert engines >= 3
        assert groups >= 3


@pytest.mark.parametrize(("size", "final"), [((80, 24), False), ((160, 50), False), ((80, 24), True)])
def test_a_kv_pool_is_shown_where_there_is_one(size: tuple[int, int], final: bool) -> None:
    pool = PoolView(
        bytes=3 << 29, capacity_bytes=4 << 30, blocks=1090, loaded=17_080, failures=2, refused=0, evictions=9
    )
    (line,) = [line for line in screen(snapshot(pool=pool), size, final=final) if "KV pool" in line]
    for part in ("1.5/4.0 GiB", "17,080 tokens loaded", "2 failed", "0 refused"):
        assert part in line
    assert not [line for line in screen(snapshot(), size, final=final) if "KV pool" in line]


@pytest.mark.parametrize(("size", "final"), [((80, 24), False), ((160, 50), False), ((80, 24), True)])
def test_drafting_is_shown_where_there_is_some(size: tuple[int, int], final: bool) -> None:
    drafts = DraftView(
        verified=1000, drafted=2100, accepted=640, generated=3200, steps=400, steps_off=48, switch_offs=3,
        drafter_s=0.1, drafted_at=[1000, 700, 300, 100], accepted_at=[400, 175, 60, 5],
    )  # fmt: skip
    (line,) = [line for line in screen(snapshot(drafts=drafts), size, final=final) if " drafts " in line]
    for part in ("1.25 tokens, 0.25 ms a step", "40% 25% 20% accepted", "12% off (3x)"):
        assert part in line
    others = DraftView(verified=1000, drafted=2000, accepted=500, generated=1000)
    (line,) = [line for line in screen(snapshot(drafts=others), size, final=final) if " drafts " in line]
    assert line.split()[1:] == ["2.00", "tokens", "a", "step", "25%", "accepted"]
    assert not [line for line in screen(snapshot(), size, final=final) if " drafts " in line]


def test_engines_in_trouble_are_shown_before_others() -> None:
    engines = [engine(f"engine-{i}") for i in range(64)]
    engines[40] = engine("engine-40", "down", last_error="connection refused")
    engines[50] = engine("engine-50", "closed", last_error="503")
    engines[60] = engine("engine-60", preemptions=9)
    engines[63] = engine("engine-63", queued=4)
    lines = screen(snapshot(engines=engines), (80, 24))
    shown = [m[1] for line in lines if (m := re.match(r" (engine-\d+)", line))]
    assert {"engine-40", "engine-50", "engine-60", "engine-63"} <= set(shown)
    assert shown == sorted(shown, key=lambda name: int(name.split("-")[1])), "in the fleet's order"
    assert any("more: " in line and "up" in line for line in lines)


def test_groups_that_run_and_have_the_most_to_go_come_first() -> None:
    groups = [group(f"waits{i}", running=0, estimate=9000) for i in range(50)]
    groups += [group("short", estimate=600), group("long", estimate=800), group("nearly", estimate=800, done=7)]
    lines = screen(snapshot(groups=groups), (80, 24))
    rows = [line.split()[0] for line in lines if re.match(r" (waits|short|long |nearly)", line)]
    assert rows[:3] == ["long", "short", "nearly"]


def test_every_column_is_there_at_80() -> None:
    lines = screen(snapshot(engines=[engine("engine-10", weight_version="step-100", preemptions=7, epoch=4)]), (80, 24))
    row = next(line for line in lines if line.startswith(" engine-10"))
    assert row.split() == ["engine-10", "up", "4", "3/16", "━─···", "25%", "50%", "50", "7", "step-100"]
    text = "\n".join(lines)
    for words in ("11 of 64", "17%", "1 failed", "1,000 done", "5,000 left", "50 tokens/s", "ETA ~4m00s"):
        assert words in text
    for words in ("20 running", "30 waiting", "3 parked", "2 running", "1 waiting", "5 done", "run-1", "1m15s"):
        assert words in text
    for words in ("11 migrated", "12 retried", "13 restarted", "14 preempted", "2/8", "~700", "100/700", "g0/3"):
        assert words in text


def test_long_names_push_no_column_aside() -> None:
    groups = [group("g" * 80), group("\u4f60" * 80), group("h")]
    rows = [line for line in screen(snapshot(groups=groups), (80, 24)) if "2/8" in line]
    assert len({cell_len(row[: row.index("2/8")]) for row in rows}) == 1
    assert [row[: row.index("2/8")].count("\u2026") for row in rows] == [1, 1, 0]


def test_estimates_that_are_only_limits_are_marked() -> None:
    text = "\n".join(screen(snapshot(groups=[group("a"), group("b", known=False, estimate=4096)])))
    assert "~700" in text
    assert "<4,096" in text
    assert "ETA <4m00s" in text


def test_no_eta_without_a_rate_or_while_closing() -> None:
    assert "ETA" not in "\n".join(screen(snapshot(), rate=None))
    assert "ETA" not in "\n".join(screen(snapshot(closing="drained")))


def test_eta_knows_that_the_longest_request_cannot_be_shared() -> None:
    one = replace(REQUEST, generated=100, estimate=4100)
    assert eta(snapshot(tokens_left=5000, running=1, tail=[one]), 100.0) == 50
    assert eta(snapshot(tokens_left=5000, running=10, tail=[REQUEST, one]), 100.0) == 400


def test_an_engine_that_is_down_says_why() -> None:
    lines = screen(snapshot(engines=[engine("engine-0", "down", last_error="connection\nrefused \x1b[2J" + "y" * 300)]))
    row = next(line for line in lines if line.startswith(" engine-0"))
    assert "down" in row
    assert "connection\ufffdrefused \ufffd[2Jyyy" in row
    busy = screen(snapshot(engines=[engine("engine-0", "closed")]))
    assert any("closed" in line and "25%" in line and "busy" in line for line in busy)


def test_the_end_shows_what_each_engine_did() -> None:
    lines = screen(snapshot(engines=[engine("a", generated=300), engine("b", generated=100)]), final=True)
    rows = {line.split()[0]: line.split() for line in lines if line.startswith((" a ", " b "))}
    assert rows["a"][3] == "300"
    assert rows["a"][4].count("━") == 3 * rows["b"][4].count("━")
    assert not any("g0" in line for line in lines)


@pytest.mark.parametrize(
    "text",
    [HOSTILE, "\x00\x1b]0;title\x07", "a\u202eb\u2066c\u200fd\ufeff", "\ud800", "\x85\u2028\u2029", "\U000e0041"],
)
def test_clean_text_is_harmless(text: str) -> None:
    shown = clean(text)
    assert not any(unicodedata.category(c)[0] in "CM" or c in "\u2028\u2029" for c in shown)
    assert len(shown) <= 200


def test_clean_keeps_what_is_readable() -> None:
    assert clean("nai\u0308ve \u4f60\u597d [bold]x[/] \U0001f600") == "na\u00efve \u4f60\u597d [bold]x[/] \U0001f600"


def test_numbers() -> None:
    assert [short(n) for n in (0, 9_999, 99_999, 123_456, 1_234_567, 5e9)] == [
        "0", "9,999", "99,999", "123.5k", "1.23M", "5.00G",
    ]  # fmt: skip
    assert [duration(s) for s in (0.4, 59, 61, 3600, 90_061)] == ["0s", "59s", "1m01s", "1h00m", "25h01m"]


def test_rows_are_shared_out_evenly() -> None:
    assert share_out(10, [2, 20, 20]) == [2, 4, 4]
    assert share_out(11, [2, 20, 3]) == [2, 6, 3]
    assert share_out(2, [5, 5, 5]) == [1, 1, 0]
    assert share_out(-3, [5, 5]) == [0, 0]
    assert share_out(100, [1, 2]) == [1, 2]


def test_a_drained_run_ends_with_what_is_left() -> None:
    run = FakeRun(engines=2, groups=6)
    for seen in run.snapshots(1.0):
        if seen.done > 5 and not seen.closing:
            run.post(DrainRequested())
    text = "\n".join(screen(seen, final=True))
    assert re.search(r"0 running +\d+ waiting", text)
