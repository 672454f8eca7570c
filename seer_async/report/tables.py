"""Tables of a page: the numbers behind each picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

from seer_async.report.element import Element, element

if TYPE_CHECKING:
    from collections.abc import Sequence

Cell = str | Element


def table(heads: Sequence[Cell], rows: Sequence[Sequence[Cell]], *, text: bool = False) -> Element:
    """A table whose first column names its rows; it scrolls by itself where it is too wide. A `td` stays as it is."""
    head = element("tr", *(element("th", cell, scope="col") for cell in heads))
    body = element("tbody", *(_row(row) for row in rows))
    made = element("table", element("thead", head), body, class_="text" if text else None)
    return element("div", made, class_="wide")


def folded(summary: str, *content: Element) -> Element:
    """Content that a reader unfolds."""
    return element("details", element("summary", summary), *content)


def _row(row: Sequence[Cell]) -> Element:
    first = element("th", _isolated(row[0]), scope="row")
    return element("tr", first, *(_cell(cell) for cell in row[1:]))


def _cell(cell: Cell) -> Element:
    return cell if isinstance(cell, Element) and cell.tag == "td" else element("td", _isolated(cell))


def _isolated(cell: Cell) -> Cell:
    return element("bdi", cell) if isinstance(cell, str) else cell
