"""Fewer points, so that a page stays small whatever the run's size, with the picture unchanged.

Invariant: the first and the last point stay, and so does every extreme that a reader could see.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Sequence

_T = TypeVar("_T")
Point = tuple[float, float]


def thin_line(points: Sequence[Point], most: int) -> list[Point]:
    """At most about `most` points of a line whose x does not fall: of each stretch its ends, lowest and highest."""
    if len(points) <= most:
        return list(points)
    width = -(-len(points) * 4 // most)
    return [point for start in range(0, len(points), width) for point in _outline(points, start, start + width)]


def _outline(points: Sequence[Point], start: int, end: int) -> list[Point]:
    stretch = range(start, min(end, len(points)))
    low = min(stretch, key=lambda i: points[i][1])
    high = max(stretch, key=lambda i: points[i][1])
    return [points[i] for i in sorted({stretch[0], low, high, stretch[-1]})]


def thin_dots(dots: Sequence[_T], most: int) -> list[_T]:
    """At most `most` of the dots, evenly chosen in their order, the first and the last among them."""
    if len(dots) <= most:
        return list(dots)
    return [dots[i * (len(dots) - 1) // (most - 1)] for i in range(most)]
