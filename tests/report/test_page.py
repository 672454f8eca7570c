"""The written reports: nothing foreign acts, everything opens, nothing is too large, and it looks like something."""

from __future__ import annotations

import itertools
import json
import random
import re
import shutil
import struct
import subprocess
import time
import zlib
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import pytest

from seer_async.report import html_page, markdown_page, read_run, report_on
from tests.report.folders import chunk, folder, reading, sample, two_groups
from tests.unit.test_cli import run

if TYPE_CHECKING:
    from pathlib import Path

HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(1)>\u202e\x1b[2J\x00|`</style>é漢字🙂'
VOID = {"meta", "br", "link"}


class Reader(HTMLParser):
    """Checks that tags are closed in order, and notes what there is."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.links += [value or "" for name, value in attrs if name in {"href", "src", "xlink:href", "action"}]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check_page(text: str) -> None:
    reader = Reader()
    reader.feed(text)
    assert not reader.open
    assert not reader.tags & {"script", "img", "link", "iframe", "object", "form", "a"}
    assert not reader.links
    assert not [name for name in reader.attributes if name.startswith("on") or name == "style"]
    assert "url(" not in text and "@import" not in text
    assert re.search(r"default-src 'none'; style-src 'sha256-[\w+/]+='", text)


def hostile(path: Path) -> Path:
    samples = [
        sample(f"{HOSTILE}/{i}", [chunk(0, 5 + i, HOSTILE, 0, 2), chunk(1, 5, "b" + HOSTILE, 2, 3)], prompt=HOSTILE)
        for i in range(2)
    ]
    samples.append(sample("failed/0", [], "error", error=HOSTILE))
    engines = [{"name": HOSTILE, "url": "http://me:secret@host:1", "info": {"model": HOSTILE, "max_model_len": 100}}]
    metrics = [reading(i, {HOSTILE: {"kv_used": 0.5, "drafts": drafted(i)}}, drafts=drafted(i)) for i in range(4)]
    return folder(
        path, samples, metrics, run=HOSTILE, dataset=HOSTILE, status=HOSTILE, engines=engines,
        draft_groups={HOSTILE: (10, 40, 20)},
    )  # fmt: skip


def drafted(times: int) -> dict[str, object]:
    """Counters that have gained the same so many times: 30 of 80 drafted tokens were right, 120 generated."""
    counts = {"verified": 20, "drafted": 80, "accepted": 30, "generated": 120, "steps": 50, "steps_off": 5}
    at = {"drafted_at": [20 * times] * 4, "accepted_at": [15 * times, 10 * times, 5 * times, 0]}
    return (
        {name: times * count for name, count in counts.items()} | at | {"switch_offs": times, "drafter_s": times / 20}
    )


def test_drafting_is_told_in_every_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    metrics = [reading(i, {"a": {"drafts": drafted(i)}}, drafts=drafted(i)) for i in range(4)]
    groups = {f"group-{i:02}": (10, 40, 40 - i) for i in range(20)}
    path = folder(tmp_path / "r", [sample("g/0", [chunk(0, 5, "a", 0, 3)])], metrics, draft_groups=groups)
    report = report_on(read_run(path))
    page, text = html_page([report]), markdown_page([report])
    check_page(page)
    assert "| a | 1.33 | 1.00 | 5.0% | 150 | 10% | 3 | 75% | 50% | 25% | 0% |" in text
    for words in ("Accepted: 1st", "4th", "Best and worst of 20 groups", "group-00", "group-19"):
        assert words in page
        assert words in text
    assert "group-10" not in page + text
    assert run(monkeypatch, "report", str(path), "--format", "json") == 0
    (drafts,) = (entry["drafts"] for entry in json.loads(capsysbinary.readouterr().out)["runs"])
    assert drafts["engines"][0]["acceptance"] == [0.75, 0.5, 0.25, 0.0]
    assert len(drafts["groups"]) == 20


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    reports = [report_on(read_run(hostile(tmp_path / "r")), name) for name in (HOSTILE, "other")]
    for text in (html_page(reports[:1]), html_page(reports)):
        check_page(text)
        assert "&lt;script&gt;" in text
        assert not {"\u202e", "\x1b", "\x00"} & set(text)
        assert "secret" not in text
    text = markdown_page(reports)
    assert "<script" not in text.replace("\\<", "")
    assert not {"\u202e", "\x1b", "\x00"} & set(text)
    table = text.split("\n\n")[0].splitlines()[1:]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in table} == {4}


@pytest.mark.parametrize(
    ("samples", "metrics"),
    [
        ([], []),
        ([sample("g/0", [chunk(0, 1, "a", 0, 0)])], []),
        ([sample("g/0", [], "error")], []),
        ([sample("g/0", [chunk(0, 3, "a", 0, 1)])], [reading(0, {})]),
        ([], [reading(0, {"a": {"kv_used": 0.2}}), reading(3, {"a": {}})]),
    ],
)
def test_hardly_anything(tmp_path: Path, samples: list[dict[str, object]], metrics: list[dict[str, object]]) -> None:
    report = report_on(read_run(folder(tmp_path / "r", samples, metrics, total=3, status="running")))
    check_page(html_page([report]))
    check_page(html_page([report, report]))
    assert markdown_page([report])


MIXED = [chunk(0, 5, "a", 0, 1), chunk(1, 5, "a", 1, 2, weight_version="w")]


@pytest.mark.parametrize(
    ("samples", "on_policy", "said"),
    [
        ([sample("g/0", [chunk(0, 5, "a", 0, 1)])], True, "on-policy"),
        ([sample("g/0", MIXED, on_policy=False)], False, "off-policy: 1 response mixes weight versions"),
        (
            [sample("g/0", [chunk(0, 5, "a", 0, 1)]), sample("g/1", [chunk(0, 5, "a", 0, 1, weight_version="w")])],
            False,
            "off-policy: responses are of 2 weight versions",
        ),
        ([sample("g/0", MIXED[:1], on_policy=False)], False, "off-policy: policy seer chose which responses end"),
    ],
)
def test_why_off_policy(tmp_path: Path, samples: list[dict[str, object]], on_policy: bool, said: str) -> None:
    report = report_on(read_run(folder(tmp_path / "r", samples, on_policy=on_policy)))
    assert report.subject.fidelity == said
    assert f">{said}<" in html_page([report])
    assert said.replace(":", "\\:") in markdown_page([report])


def test_torn_and_damaged_lines_are_named(tmp_path: Path) -> None:
    path = two_groups(tmp_path / "r")
    text = (path / "samples.jsonl").read_bytes()
    (path / "samples.jsonl").write_bytes(text[:-40])
    (path / "metrics.jsonl").write_bytes(b"\xff\xfe{\n" + (path / "metrics.jsonl").read_bytes() + b'{"now": 1')
    (path / "journal").write_bytes(b"00000000 {}\n00000000 {}\n")
    report = report_on(read_run(path))
    assert report.figures.done == 3
    assert report.completion.tail_s is None
    said = " ".join(report.subject.problems)
    assert "samples.jsonl: 1 unreadable line is left out" in said
    assert "metrics.jsonl: 2 unreadable lines are left out" in said
    assert "damaged at byte 0" in said
    assert "1 unreadable line" in html_page([report])


def test_two_runs_side_by_side(tmp_path: Path) -> None:
    fast = two_groups(tmp_path / "fast")
    slow = folder(tmp_path / "slow", [sample("g/0", [chunk(0, 40, "a", 0, 10)])])
    reports = [report_on(read_run(path)) for path in (fast, slow)]
    text = html_page(reports)
    check_page(text)
    assert "2 runs side by side" in text
    assert "4.00 tok/s<span>0.50\N{MULTIPLICATION SIGN}</span>" in text
    assert "| Throughput | 8.00 tok/s | 4.00 tok/s (0.50\N{MULTIPLICATION SIGN}) |" in markdown_page(reports)


def test_ten_thousand_samples_are_quick_and_small(tmp_path: Path) -> None:
    rng = random.Random(1)
    samples = []
    for i in range(10_000):
        cuts = sorted(rng.uniform(0, 4000) for _ in range(rng.randint(2, 12)))
        pieces = [chunk(n, 3, f"engine-{rng.randrange(16)}", a, b) for n, (a, b) in enumerate(itertools.pairwise(cuts))]
        samples.append(sample(f"group-{i // 8}/{i % 8}", pieces))
    metrics = [
        reading(t, {f"engine-{e}": {"kv_used": rng.random(), "in_flight": 4} for e in range(16)}) for t in range(4000)
    ]
    path = folder(tmp_path / "large", samples, metrics)
    begun = time.process_time()
    text = html_page([report_on(read_run(path))])
    assert time.process_time() - begun < 30
    assert len(text.encode()) < 3 << 20
    check_page(text)


# The command


def test_command_writes_and_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    path = two_groups(tmp_path / "r")
    assert run(monkeypatch, "report", str(path)) == 0
    assert run(monkeypatch, "report", str(path)) == 0  # a report may be replaced
    assert (path / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert not list(path.glob("*.new"))
    capsysbinary.readouterr()
    assert run(monkeypatch, "report", str(path), "--format", "json") == 0
    answer = json.loads(capsysbinary.readouterr().out)
    assert answer["runs"][0]["figures"]["throughput"] == 8
    assert run(monkeypatch, "report", str(path), "--format", "md") == 0
    assert b"| Throughput | 8.00 tok/s |" in capsysbinary.readouterr().out
    notes = tmp_path / "notes.md"
    notes.write_text("my notes")
    assert run(monkeypatch, "report", str(path), "--format", "md", "--out", str(notes)) == 5
    assert b"is no report" in capsysbinary.readouterr().err
    assert notes.read_text() == "my notes"
    for form in ("md", "json", "html"):
        assert run(monkeypatch, "report", str(path), "--format", form, "--out", str(notes), "--force") == 0
        assert run(monkeypatch, "report", str(path), "--format", form, "--out", str(notes)) == 0


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "has no run.json"), ("{}", "does not describe a run"), ("\x00{", "does not describe a run")],
)
def test_command_on_what_is_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], content: str | None, says: str
) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    assert run(monkeypatch, "report", str(tmp_path)) == 2
    assert says in capsys.readouterr().err
    assert run(monkeypatch, "report", str(tmp_path / "missing")) == 2
    path = two_groups(tmp_path / "r")
    assert run(monkeypatch, "report", str(path), "--out", str(tmp_path / "no" / "where.html")) == 5
    assert "cannot write" in capsys.readouterr().err


# In a browser


def browser() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("THE PAGE WAS NOT LOOKED AT: no chromium on this machine (apt-get install chromium)")
    return found


def printed(program: str, page: Path, picture: Path, scheme: int, width: int) -> str:
    """Print a page; returns what the browser logged. `scheme` 0 is dark, 1 light."""
    arguments = [
        program, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr",
        f"--user-data-dir={picture.with_suffix('')}", f"--blink-settings=preferredColorScheme={scheme}",
        f"--window-size={width},900", f"--screenshot={picture}", page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(arguments, capture_output=True, text=True, timeout=280, check=True).stderr


def pixels(picture: Path) -> list[bytes]:
    """The rows of an 8-bit PNG, as RGB or RGBA bytes."""
    data = picture.read_bytes()
    width, _, depth, kind = struct.unpack(">IIBB", data[16:26])
    assert depth == 8 and kind in {2, 6}
    size = 3 if kind == 2 else 4
    body, at = b"", 8
    while at < len(data):
        length = int.from_bytes(data[at : at + 4])
        if data[at + 4 : at + 8] == b"IDAT":
            body += data[at + 8 : at + 8 + length]
        at += 12 + length
    raw, stride = zlib.decompress(body), width * size
    rows = [raw[i : i + stride + 1] for i in range(0, len(raw), stride + 1)]
    return unfiltered(rows, size)


def unfiltered(rows: list[bytes], size: int) -> list[bytes]:
    before, plain = bytes(len(rows[0]) - 1), []
    for row in rows:
        kind, now = row[0], bytearray(row[1:])
        for i in range(len(now) if kind else 0):
            left, up, corner = now[i - size] if i >= size else 0, before[i], before[i - size] if i >= size else 0
            guess = left + up - corner
            nearest = min((left, up, corner), key=lambda value: abs(guess - value))
            now[i] = (now[i] + (0, left, up, (left + up) // 2, nearest)[kind]) & 255
        before = bytes(now)
        plain.append(before)
    return plain


@pytest.mark.parametrize(("scheme", "light"), [(0, False), (1, True)])
def test_printed_in_a_browser(tmp_path: Path, scheme: int, light: bool) -> None:
    program = browser()
    page, picture = tmp_path / "report.html", tmp_path / "page.png"
    page.write_text(html_page([report_on(read_run(two_groups(tmp_path / "r")))]), encoding="utf-8")
    log = printed(program, page, picture, scheme, 640)
    assert "CONSOLE" not in log, log
    rows = pixels(picture)
    middle = rows[0][:3]
    assert (sum(middle) > 600) == light, "the paper has the colour of the scheme"
    size = len(rows[0]) // 640
    colours = {row[i : i + 3] for row in rows for i in range(0, len(row), 2 * size)}
    assert len(colours) > 50, "a page with text and pictures has many colours"
