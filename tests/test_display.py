"""The displays: what is said and when, what a terminal must never be sent, and what a lost terminal must not do."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import sys
import time

import pytest
from rich.console import Console

from seer_cli.display import Display, PlainDisplay, RichDisplay, Speed, make_display
from tests.fake_run import FakeRun
from tests.views import HOSTILE, moments, snapshot

SGR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def terminal(width: int = 80, height: int = 24, *, color: str | None = None) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    console = Console(file=file, width=width, height=height, force_terminal=True, color_system=color)  # type: ignore[arg-type]
    return console, file


def test_hostile_names_reach_no_terminal() -> None:
    console, file = terminal(160, 50, color="256")
    run = FakeRun(engines=3, groups=9, group_id=HOSTILE)
    with RichDisplay(console) as display:
        display.run = HOSTILE
        display.phase(HOSTILE)
        for seen in moments(run, 1, 15):
            display.update(seen)
            display.phase(HOSTILE)
        written = file.getvalue()
        display.finish([HOSTILE])
    written += file.getvalue()
    left = SGR.sub("", written).replace("\r", "").replace("\n", "")
    assert left.isprintable(), sorted({c for c in left if not c.isprintable()})
    assert "\x1b[31m" not in written, "a colour that only the name asks for"
    assert "[bold]" in left, "markup is shown, not obeyed"


def test_live_screen_from_set_up_to_summary() -> None:
    console, file = terminal()
    with RichDisplay(console) as display:
        display.phase("starting 2 engines")
        display.phase("rolling out")
        for seen in FakeRun(engines=2, groups=2).snapshots(2.0):
            display.update(seen)
        display.finish(["all [bold]done[/]", "a path " + "/long" * 40])
        display.phase("engines stop")
    text = SGR.sub("", file.getvalue())
    assert text.count(" s  starting 2 engines") == 1
    assert "all [bold]done[/]" in text
    assert "/long" * 40 in text, "paths are not broken, so that they can be copied"
    assert text.rstrip().endswith("s  engines stop")
    assert file.getvalue().count("\x1b[?25h") >= 1, "the cursor is back"
    last = text[text.rindex(" samples ") :]
    assert "16 of 16 100%" in last


def test_redrawing_stays_in_place() -> None:
    console, file = terminal()
    with RichDisplay(console) as display:
        for seen in moments(FakeRun(engines=4, groups=24), 1, 2, 3, 10):
            file.seek(0)
            file.truncate()
            display.update(seen)
            written = file.getvalue()
        assert written.count("\n") == written.count("\x1b[1A") == 22, (
            "up as many rows as down; the last one has no newline"
        )


def test_terminal_is_given_back_after_an_error() -> None:
    console, file = terminal()
    with contextlib.suppress(RuntimeError), RichDisplay(console) as display:
        display.update(snapshot())
        assert file.getvalue().count("\x1b[?25h") == 1, "that of the end of set-up"
        raise RuntimeError
    assert file.getvalue().rstrip("\n").endswith("\x1b[?25h")


def test_no_color_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = []
    for value in ("", "1"):
        monkeypatch.setenv("NO_COLOR", value)
        console, file = terminal(color="256")
        with RichDisplay(console) as display:
            display.update(snapshot())
        outputs.append(re.findall(r"\x1b\[([0-9;]+)m", file.getvalue()))
    colours = [{code for codes in found for code in codes.split(";")} & {"31", "32", "36", "38"} for found in outputs]
    assert colours[0]
    assert not colours[1]


def test_kind_of_display(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    assert type(make_display(None, terminal()[0])) is RichDisplay
    assert type(make_display(None, Console(file=io.StringIO()))) is PlainDisplay
    latin = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    assert type(make_display(None, Console(file=latin, force_terminal=True))) is PlainDisplay
    assert type(make_display("plain", terminal()[0])) is PlainDisplay
    assert type(make_display("none")) is Display
    monkeypatch.setenv("TERM", "dumb")
    assert type(make_display(None, terminal()[0])) is PlainDisplay


def test_silence(capfd: pytest.CaptureFixture[str]) -> None:
    with make_display("none") as display:
        display.phase("x")
        display.update(snapshot())
        display.finish(["y"])
    assert capfd.readouterr() == ("", "")


class Time:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


def test_plain_lines_are_few_and_greppable(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, file = Time(monkeypatch), io.StringIO()
    times: list[float] = []
    with make_display("plain", Console(file=file, width=80)) as display:
        display.phase("starting\n\x1b[31m2 engines")
        for seen in FakeRun(engines=2, groups=12).snapshots(0.25):
            before = len(file.getvalue())
            display.update(seen)
            if len(file.getvalue()) > before:
                times.append(clock.now)
            clock.now += 0.25
        display.finish(["12 of 12", "done"])
    first, *lines = file.getvalue().splitlines()
    assert first == "t=0.0 starting \ufffd[31m2 engines"
    *figures, one, two = lines
    assert (one.split(" ", 1)[1], two.split(" ", 1)[1]) == ("12 of 12", "done")
    read = [dict(pair.split("=") for pair in line.split()) for line in figures]
    assert len(read) == len(times) + 1, "one line each, however narrow the console is"
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert min(gaps) >= 2.0
    assert max(gaps) <= 15.25
    assert len(times) <= 20 + clock.now / 15
    assert (
        read[-1].items() >= {"done": "96", "failed": "0", "total": "96", "percent": "100", "tokens_left": "0"}.items()
    )
    assert [float(line["t"]) for line in read] == sorted(float(line["t"]) for line in read)
    assert any(line["tokens_per_s"] != "-" and float(line["tokens_per_s"]) > 100 for line in read)


def test_plain_speaks_up_when_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, file = Time(monkeypatch), io.StringIO()
    display = make_display("plain", Console(file=file))
    for _ in range(400):
        display.update(snapshot(now=clock.now))
        clock.now += 0.25
    assert len(file.getvalue().splitlines()) == 7  # at 0, 15, ... 90 s


@pytest.mark.parametrize("kind", ["plain", "rich"])
def test_a_lost_reader_does_not_end_the_run(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w", buffering=1) as gone:
        monkeypatch.setattr(sys, "stderr", gone)
        monkeypatch.setenv("FORCE_COLOR", "1")
        with make_display(kind) as display:
            display.phase("starting")
            display.update(snapshot())
            display.update(snapshot(now=3.0))
            display.finish(["done"])
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), gone.fileno())


def test_speed_is_that_of_the_last_seconds() -> None:
    speed = Speed()
    assert speed.observe(0.0, 0) is None
    for tick in range(1, 401):
        rate = speed.observe(tick * 0.25, tick * 25)
    assert rate == pytest.approx(100)
    for tick in range(401, 481):  # 20 s at four times the speed
        rate = speed.observe(tick * 0.25, 10_000 + (tick - 400) * 100)
    assert rate == pytest.approx(400)
    assert speed.observe(1000.0, 18_000) == pytest.approx(0, abs=5), "and falls when nothing comes"


def test_speed_of_an_engine_that_finishes_a_chunk_in_twenty_seconds() -> None:
    speed = Speed()
    seen = [speed.observe(tick * 0.25, 512 * (tick // 80)) for tick in range(1, 1600)]
    late = [rate for rate in seen[600:] if rate is not None]
    assert len(late) == len(seen[600:])
    assert min(late) > 0.7 * 512 / 20
    assert max(late) < 1.05 * 512 / 20


def test_redrawing_costs_the_loop_little() -> None:
    """Measured at 15 ms for the largest screen; the test allows for a busy machine."""
    console, _ = terminal(160, 50, color="256")
    large = list(moments(FakeRun(engines=64, groups=1000), 1, 14))
    with RichDisplay(console) as display:
        display.update(large[0])
        spent = []
        for _ in range(10):
            start = time.process_time()
            display.update(large[1])
            spent.append(time.process_time() - start)
    print(f"{min(spent) * 1e3:.1f} ms")
    assert min(spent) < 0.1
