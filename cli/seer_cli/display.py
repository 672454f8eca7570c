"""What a person sees of a rollout: a live screen on a terminal, key=value lines elsewhere, or nothing.

Invariants: a line given to `phase` or `finish` stays; the screen is redrawn by `update` alone, so that it costs the
event loop nothing between two snapshots; nothing reaches the terminal with control characters in it.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Self

from rich.console import Console, Group
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from seer_cli.panel import clean
from seer_cli.screen import Frame, eta, lay_out

if TYPE_CHECKING:
    from collections.abc import Sequence

    from seer_async.snapshot import Snapshot

_WINDOW_S = 10.0
_LEAST_CHANGES = 4  # the window reaches back at least so far: slow engines finish a chunk less than once in 10 s
_LEAST_PAUSE_S = 2.0
_MOST_PAUSE_S = 15.0
_STEP = 5  # per cent
_LONGEST_LINE = 2000


class Display:
    """Shows nothing. `run` names the run in the live screen's header, once it is known."""

    run = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Give the terminal back."""

    def phase(self, text: str) -> None:
        """Say what is being done from now on; the line stays."""

    def update(self, snapshot: Snapshot) -> None:
        """Show the run as it is now."""

    def finish(self, summary_lines: Sequence[str]) -> None:
        """Show the run as it ended, then these lines."""


def make_display(kind: str | None, console: Console | None = None) -> Display:
    """A display: "rich", "plain", "none", or None for rich on a terminal that can show it and plain elsewhere.

    Without a `console` it goes to stderr, so that stdout is free for results.
    """
    console = console or _Console(stderr=True)
    if kind is None:
        able = console.is_terminal and not console.is_dumb_terminal and console.encoding.startswith("utf")
        kind = "rich" if able else "plain"
    if kind == "none":
        return Display()
    return {"rich": RichDisplay, "plain": PlainDisplay}[kind](console)


class _Console(Console):
    """Falls silent when nobody reads it any more, because a rollout is worth more than its display."""

    def on_broken_pipe(self) -> None:
        """Rich would end the program."""
        self.quiet = True


class Speed:
    """Tokens a second over a moving window, from a total that comes in whole chunks."""

    def __init__(self) -> None:
        self._changes: deque[tuple[float, int]] = deque()

    def observe(self, now: float, total: int) -> float | None:
        """Take in the total at `now`; returns the speed, or None before the first tokens."""
        changes = self._changes
        if not changes or changes[-1][1] != total:
            changes.append((now, total))
        while len(changes) > _LEAST_CHANGES and changes[1][0] <= now - _WINDOW_S:
            changes.popleft()
        since, before = changes[0]
        return (total - before) / (now - since) if len(changes) > 1 and now > since else None


class Speeds:
    """The speed of the run and of each engine."""

    def __init__(self) -> None:
        self._all = Speed()
        self._engines: dict[str, Speed] = {}

    def observe(self, snapshot: Snapshot) -> tuple[float | None, dict[str, float | None]]:
        """Tokens a second of all engines together, and by engine."""
        rates = {
            view.name: self._engines.setdefault(view.name, Speed()).observe(snapshot.now, view.generated)
            for view in snapshot.engines
        }
        return self._all.observe(snapshot.now, sum(view.generated for view in snapshot.engines)), rates


class PlainDisplay(Display):
    """One line at every step of 5 % and at least every 15 s, but never two within 2 s."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._began = time.monotonic()
        self._speeds = Speeds()
        self._last: Snapshot | None = None
        self._rate: float | None = None
        self._shown_at = -_MOST_PAUSE_S
        self._shown_step = 0

    def phase(self, text: str) -> None:
        """A line."""
        self._say(text)

    def update(self, snapshot: Snapshot) -> None:
        """A line, when it is time for one."""
        self._last = snapshot
        self._rate, _ = self._speeds.observe(snapshot)
        pause = time.monotonic() - self._shown_at
        step = _percent(snapshot) // _STEP
        if pause >= _MOST_PAUSE_S or (pause >= _LEAST_PAUSE_S and step != self._shown_step):
            self._shown_at, self._shown_step = time.monotonic(), step
            self._say(_figures(snapshot, self._rate))

    def finish(self, summary_lines: Sequence[str]) -> None:
        """The last figures and the summary."""
        if self._last:
            self._say(_figures(self._last, self._rate))
        for line in summary_lines:
            self._say(line)

    def _say(self, text: str) -> None:
        self._console.out(f"t={time.monotonic() - self._began:.1f}", _one_line(text), highlight=False)


class RichDisplay(Display):
    """A log of what was said, and below it the screen."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._began = time.monotonic()
        self._phase = ""
        self._speeds = Speeds()
        self._frame: Frame | None = None
        self._live = Live(_Ticker(self._began), console=console, transient=True, refresh_per_second=4)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the screen as it is and give the terminal back."""
        self._live.stop()

    def phase(self, text: str) -> None:
        """A line above the screen, and the words in its header."""
        self._phase = _one_line(text)
        stamp = Text(f"{time.monotonic() - self._began:8.1f} s  ", "dim")
        self._console.print(stamp.append(self._phase, "default not dim"), soft_wrap=True)

    def update(self, snapshot: Snapshot) -> None:
        """Redraw the screen."""
        first = self._frame is None
        rate, rates = self._speeds.observe(snapshot)
        self._frame = Frame(self.run, self._phase, time.monotonic() - self._began, snapshot, rate, rates)
        if first:
            self._live.stop()  # set-up is over: from here on redrawing is driven by snapshots
            self._live = Live(console=self._console, auto_refresh=False, get_renderable=self._screen)
            self._live.start()
        self._live.refresh()

    def finish(self, summary_lines: Sequence[str]) -> None:
        """Leave the run's end on the screen, and the summary below it."""
        if self._frame:
            self._frame = self._frame._replace(final=True)
        self._live.stop()
        self._console.print()
        for line in summary_lines:
            self._console.print(Text(f" {_one_line(line)}"), soft_wrap=True)

    def _screen(self) -> Group:
        assert self._frame is not None
        width, height = self._console.size
        return Group(*lay_out(self._frame, width, height - 1))  # the last row is where the cursor rests


class _Ticker:
    """Says that set-up is under way, and for how long."""

    def __init__(self, began: float) -> None:
        self._began = began
        self._spinner = Spinner("dots")

    def __rich__(self) -> Text:
        now = time.monotonic()
        turn = self._spinner.render(now)
        assert isinstance(turn, Text)
        return Text.assemble((f"{now - self._began:8.1f} s  ", "dim"), turn)


def _percent(snapshot: Snapshot) -> int:
    return 100 * (snapshot.done + snapshot.failed) // max(1, snapshot.total)


def _figures(snapshot: Snapshot, rate: float | None) -> str:
    up = sum(view.state == "up" for view in snapshot.engines)
    seconds = eta(snapshot, rate)
    figures: dict[str, str | float] = {
        "done": snapshot.done,
        "failed": snapshot.failed,
        "total": snapshot.total,
        "percent": _percent(snapshot),
        "tokens": snapshot.tokens,
        "tokens_per_s": "-" if rate is None else round(rate),
        "tokens_left": snapshot.tokens_left,
        "eta_s": "-" if seconds is None else round(seconds),
        "running": snapshot.running,
        "waiting": snapshot.waiting,
        "parked": snapshot.parked,
        "probes_done": snapshot.probes_done,
        "engines_up": f"{up}/{len(snapshot.engines)}",
        "migrations": snapshot.migrations,
        "retries": snapshot.retries,
        "restarts": snapshot.restarts,
        "preemptions": snapshot.preemptions,
    }
    if snapshot.pool:
        figures |= {"pooled": snapshot.pool.loaded, "pool_gib": round(snapshot.pool.bytes / 2**30, 2)}
    if snapshot.drafts:
        drafts = snapshot.drafts
        figures |= {"tokens_per_step": round(drafts.per_step, 2), "tokens_per_draft": round(drafts.length, 2)}
        figures |= {"steps_off": drafts.steps_off, "switch_offs": drafts.switch_offs}
    return " ".join(f"{name}={value}" for name, value in figures.items())


def _one_line(text: str) -> str:
    return clean(" ".join(text.split()), _LONGEST_LINE)
