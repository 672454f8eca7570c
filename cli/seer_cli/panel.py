"""Lines of text that fit: tables that choose their columns and rows, bars, numbers, and names from outside.

In every bar, heavy is done or used, light is running or held, dots are the rest, so that bars read without colour.

Invariants: a panel is never wider or longer than asked for; a name from a dataset or an engine is shown through `clean`
only, and is never read as markup.
"""

from __future__ import annotations

import heapq
import unicodedata
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from rich.cells import cell_len
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

GAP = 2
_MOST_SHOWN = 200  # characters of a name
_MOST_DIGITS = 1e5  # 99,999 is six characters
_T = TypeVar("_T")


def clean(text: str, most: int = _MOST_SHOWN) -> str:
    """Text that a terminal shows and does not obey: no control, bidi or invisible characters, no stacked marks."""
    text = unicodedata.normalize("NFC", text[:most])
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c.isprintable() else "\ufffd" for c in text if unicodedata.category(c) not in {"Mn", "Me"})


def short(count: float) -> str:
    """A count in about six characters."""
    for unit, size in (("G", 1e9), ("M", 1e6)):
        if count >= size:
            return f"{count / size:.2f}{unit}"
    return f"{count / 1e3:.1f}k" if count >= _MOST_DIGITS else f"{count:,.0f}"


def duration(seconds: float) -> str:
    """A time in its two largest units."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


def bar(width: int, heavy: float, light: float = 0.0) -> Text:
    """A bar of `width` cells, of shares in [0, 1]. What has begun shows, and what is not complete is not full."""
    filled = _cells(width, heavy)
    busy = max(0, _cells(width, heavy + light) - filled)
    return Text.assemble(("━" * filled + "─" * busy, "green"), ("·" * (width - filled - busy), "dim"))


def _cells(width: int, share: float) -> int:
    if share <= 0:
        return 0
    return width if share >= 1 else max(1, min(width - 1, round(share * width)))


def longest(texts: Iterable[str], most: int) -> int:
    """Width of a column that shows these texts, or as much of them as fits in `most` cells."""
    return min(most, max(map(cell_len, texts), default=0))


def aligned(cell: Text, size: int, *, right: bool = False) -> Text:
    """The text in exactly `size` cells; may be the same object, changed."""
    cell.truncate(size, overflow="ellipsis")
    padding = " " * (size - cell.cell_len)
    return Text(padding).append_text(cell) if right else cell.append(padding)


def side_by_side(blocks: Sequence[list[Text]], each: int) -> list[Text]:
    """Blocks of lines next to each other, each in `each` cells."""
    if len(blocks) == 1:
        return blocks[0]
    rows = zip_longest(*blocks)
    return [Text(" " * GAP).join([aligned(cell or Text(), each) for cell in row]) for row in rows]


def share_out(room: int, wanted: Sequence[int]) -> list[int]:
    """Divide rows as evenly as the wants allow."""
    given = [0] * len(wanted)
    while room > 0 and (hungry := [i for i, want in enumerate(wanted) if given[i] < want]):
        for i in hungry[:room]:
            given[i] += 1
        room -= len(hungry)
    return given


class Column(NamedTuple, Generic[_T]):
    """`least` to `most` cells wide. Columns of the highest `rank` go first where there is no room; rank 0 stays."""

    title: str
    cell: Callable[[_T, int], Text]
    least: int
    most: int = 0
    right: bool = False
    rank: int = 0


class Panel(Generic[_T]):
    """A table of the items of most interest, lowest value first.

    Where `ranked`, rows come in that order, else in the items' own. `hidden` words what is left out; `note`, where it
    gives a rank and words, puts the words in place of the columns of that rank and above.
    """

    def __init__(
        self,
        columns: Sequence[Column[_T]],
        items: Sequence[_T],
        interest: Callable[[_T], Any],
        *,
        ranked: bool = False,
        hidden: Callable[[Sequence[_T]], str] | None = None,
        note: Callable[[_T], tuple[int, Text] | None] = lambda _: None,
    ) -> None:
        self._columns = columns
        self._items = items
        self._interest = interest
        self._ranked = ranked
        self._hidden = hidden
        self._note = note
        self.length = len(items)

    def lines(self, width: int, rows: int) -> list[Text]:
        """A heading and at most `rows` rows."""
        columns = _fit(self._columns, width - 1)
        heading = _joined([aligned(Text(column.title), size, right=column.right) for column, size in columns])
        heading = aligned(heading, width)
        heading.stylize("dim underline")
        shown, hidden = self._picked(rows)
        lines = [heading, *(self._row(item, columns, width) for item in shown)]
        if hidden:
            lines.append(Text(f" +{len(hidden)} more{self._hidden(hidden) if self._hidden else ''}", "dim"))
        return lines

    def _picked(self, rows: int) -> tuple[list[_T], list[_T]]:
        """The items to show, and those that a last row speaks of."""
        items = self._items
        count = rows - 1 if self._hidden and self.length > rows else rows
        best = heapq.nsmallest(count, range(self.length), key=lambda i: self._interest(items[i]))
        shown = [items[i] for i in (best if self._ranked else sorted(best))]
        chosen = set(best)
        return shown, [items[i] for i in range(self.length) if i not in chosen] if self._hidden else []

    def _row(self, item: _T, columns: Sequence[tuple[Column[_T], int]], width: int) -> Text:
        note = self._note(item)
        kept = [(column, size) for column, size in columns if note is None or column.rank < note[0]]
        row = _joined([aligned(column.cell(item, size), size, right=column.right) for column, size in kept])
        if note is not None:
            row.append(" " * GAP).append_text(note[1]).truncate(width, overflow="ellipsis")
        return row


def _fit(columns: Sequence[Column[_T]], width: int) -> list[tuple[Column[_T], int]]:
    """The columns that fit, and their widths; what is to spare goes first to those that want least."""
    kept = list(columns)
    while (spare := width - sum(column.least + GAP for column in kept) + GAP) < 0:
        last = max(kept, key=lambda column: column.rank)
        if not last.rank:
            break
        kept.remove(last)
    sizes = {column.title: column.least for column in kept}
    for column in sorted(kept, key=lambda column: column.most):
        grown = max(0, min(spare, column.most - column.least))
        spare -= grown
        sizes[column.title] += grown
    return [(column, sizes[column.title]) for column in kept]


def _joined(cells: Sequence[Text]) -> Text:
    return Text(" ").append_text(Text(" " * GAP).join(cells))
