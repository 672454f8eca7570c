"""One plot: axes, and marks in data coordinates, as inline SVG.

Plots have one width, and the style sheet sizes their text for the screen. Marks differ in shape, weight or dashes as
well as in colour, so that they can be told apart in grey. A plot's title and description are read to those who do
not see it.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING

from seer_async.report.element import Element, element

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from seer_async.report.thin import Point

WIDTH = 560
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 24, 26, 44
_TICKS = 5


class Axis:
    """Data from 0 (or `low`) to `high`, laid over pixels; `high` is rounded up to a tick unless `tight`.

    With `whole`, ticks are whole numbers; with `cells`, a number's label stands in the middle of its cell [n, n + 1).
    """

    def __init__(
        self,
        high: float,
        label: str,
        say: Callable[[float], str] = "{:,g}".format,
        *,
        low: float = 0.0,
        step: float | None = None,
        tight: bool = False,
        whole: bool = False,
        cells: bool = False,
    ) -> None:
        high = high if math.isfinite(high) and high > low else low + 1
        step = step or nice_step(high - low, _TICKS)
        self.step = float(max(1, math.ceil(step))) if whole else step
        self.low, self.label, self.say = low, label, say
        self.shift = 0.5 if cells else 0.0
        self.high = high if tight else low + self.step * max(1, math.ceil((high - low) / self.step - 1e-9))
        self.start, self.end = 0.0, 1.0

    def __call__(self, value: float) -> float:
        """The pixel of a value; values outside lie on the border."""
        part = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return round(self.start + part * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        """Where the axis is labelled."""
        last = self.high - self.low - self.shift
        return [self.low + i * self.step for i in range(int(last / self.step + 1e-9) + 1)]


def nice_step(span: float, most: int) -> float:
    """The smallest of 1, 2, 2.5 and 5 times a power of ten that cuts `span` into at most `most` parts."""
    power = 10.0 ** math.floor(math.log10(span / most))
    return next(power * factor for factor in (1, 2, 2.5, 5, 10) if span / (power * factor) <= most * (1 + 1e-9))


def time_axis(seconds: float) -> Axis:
    """The run's time, in the unit that fits."""
    seconds = max(seconds, 1e-3)
    size, unit = (3600, "hours") if seconds > 7200 else (60, "minutes") if seconds > 300 else (1, "seconds")  # noqa: PLR2004 - two hours, five minutes
    step = size * nice_step(seconds / size, _TICKS)
    return Axis(seconds, unit, lambda value: f"{value / size:g}", step=step, tight=True)


class Plot:
    """A plot being drawn; the marks come in the order of the calls, and `svg` ends it."""

    def __init__(
        self, title: str, description: str, x: Axis, y: Axis, *, y2: Axis | None = None, height: int = 270
    ) -> None:
        self.x, self.y, self.y2 = x, y, y2
        self._height = height
        self._right = _LEFT if y2 else _RIGHT
        x.start, x.end = _LEFT, WIDTH - self._right
        for axis in (y, y2):
            if axis:
                axis.start, axis.end = height - _BOTTOM, _TOP
        self._svg = element(
            "svg",
            element("title", title),
            element("desc", description),
            viewBox=f"0 0 {WIDTH} {height}",
            role="img",
            aria_label=f"{title}: {description}",
        )
        self._axes()

    def svg(self) -> Element:
        """The finished picture."""
        return self._svg

    def line(self, points: Sequence[Point], kind: str, axis: Axis | None = None) -> None:
        """A line through the points."""
        if points:
            self._draw(_path(self._pixels(points, axis)), f"line {kind}")

    def area(self, points: Sequence[Point], kind: str, floor: Sequence[Point] | None = None) -> None:
        """The area between the points and a floor, which is the axis without one."""
        if points:
            floor = floor or [(points[0][0], self.y.low), (points[-1][0], self.y.low)]
            self._draw(_path(self._pixels([*points, *reversed(floor)], None)) + "Z", f"area {kind}")

    def dots(self, points: Sequence[tuple[float, float]], kind: str) -> None:
        """A dot at each point: lines of no length with round ends, which are a tenth of the bytes of circles."""
        if points:
            self._draw("".join(f"M{x:g} {y:g}h0" for x, y in self._pixels(points, None)), f"dots {kind}")

    def bar(self, left: float, right: float, value: float, kind: str) -> None:
        """A bar from the axis to `value`."""
        top, floor = self.y(value), self.y(self.y.low)
        x = self.x(left)
        width, height = max(0.5, self.x(right) - x), max(0.0, floor - top)
        self._svg.append(element("rect", x=x, y=top, width=width, height=height, class_=f"bar {kind}"))

    def stretch(self, left: float, right: float, label: str, kind: str) -> None:
        """A shaded stretch of the x axis with its name above it."""
        x, width = self.x(left), self.x(right) - self.x(left)
        top, floor = self.y.end, self.y.start
        self._svg.append(
            element("rect", x=x, y=top, width=max(0.5, width), height=floor - top, class_=f"stretch {kind}")
        )
        self._draw(f"M{x:g} {top:g}V{floor:g}", f"rule {kind}")
        wide = x > WIDTH / 2
        self._svg.append(
            _label(label, WIDTH - self._right if wide else x, top - 8, "end" if wide else "start", f"note {kind}")
        )

    def rule(self, x: float, kind: str) -> None:
        """A vertical line."""
        self._draw(f"M{self.x(x):g} {self.y.end:g}V{self.y.start:g}", f"rule {kind}")

    def legend(self, names: Sequence[tuple[str, str]]) -> None:
        """Samples of lines with their names, in the lower right corner."""
        for row, (kind, name) in enumerate(reversed(names)):
            y = self._height - _BOTTOM - 14 - 19 * row
            self._draw(f"M{WIDTH - self._right - 36:g} {y - 4:g}h30", f"line {kind}")
            self._svg.append(_label(name, WIDTH - self._right - 42, y, "end", "key"))

    def _axes(self) -> None:
        floor = self._height - _BOTTOM
        for value in self.y.ticks():
            y = self.y(value)
            self._draw(f"M{_LEFT} {y:g}H{WIDTH - self._right}", "grid" if y < floor else "axis")
            self._svg.append(_label(self.y.say(value), _LEFT - 7, y + 4, "end", "tick"))
        for value in self.x.ticks():
            x = self.x(value + self.x.shift)
            self._draw(f"M{x:g} {floor}v4", "axis")
            self._svg.append(_label(self.x.say(value), x, floor + 18, "middle", "tick"))
        for value in self.y2.ticks() if self.y2 else ():
            assert self.y2
            self._svg.append(_label(self.y2.say(value), WIDTH - self._right + 7, self.y2(value) + 4, "start", "tick"))
        self._svg.append(_label(self.x.label, (_LEFT + WIDTH - self._right) / 2, floor + 37, "middle", "label"))
        self._svg.append(_label(self.y.label, 4, 13, "start", "label"))
        if self.y2:
            self._svg.append(_label(self.y2.label, WIDTH - 4, 13, "end", "label"))

    def _pixels(self, points: Sequence[tuple[float, float]], axis: Axis | None) -> list[tuple[float, float]]:
        y = axis or self.y
        return [(self.x(a), y(b)) for a, b in points]

    def _draw(self, path: str, kind: str) -> None:
        self._svg.append(element("path", d=path, class_=kind))


def stairs(points: Sequence[Point]) -> list[Point]:
    """The corners of a line that holds each value until the next point."""
    corners = [corner for before, now in pairwise(points) for corner in (before, (now[0], before[1]))]
    return [*corners, *points[-1:]]


def _path(pixels: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in pixels)


def _label(text: str, x: float, y: float, anchor: str, kind: str) -> Element:
    return element("text", text, x=x, y=y, text_anchor=anchor, class_=kind)
