"""Numbers and foreign text as a reader meets them."""

from __future__ import annotations

import time
import unicodedata

_MOST_SHOWN = 80
_NONE = "\N{EN DASH}"
_MINUTE, _HOUR = 60.0, 3600.0


def visible(text: str, most: int = _MOST_SHOWN) -> str:
    """Foreign text without what a page would obey or hide: no control or bidi characters, no stacked marks."""
    if len(text) <= most and text.isascii() and text.isprintable():
        return text
    kept = unicodedata.normalize("NFC", text[: 4 * most])
    shown = "".join(c if c.isprintable() else "\ufffd" for c in kept if unicodedata.category(c) not in {"Mn", "Me"})
    return shown if len(shown) <= most else shown[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"


def count(value: float | None) -> str:
    """A count in full."""
    return _NONE if value is None else f"{value:,.0f}"


def number(value: float | None, unit: str = "") -> str:
    """A measured number, to three digits or so."""
    if value is None:
        return _NONE
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2  # noqa: PLR2004 - three digits in all
    return f"{value:,.{digits}f}{unit}"


def share(value: float | None) -> str:
    """A share in percent."""
    return _NONE if value is None else f"{value:.1%}" if 0 < abs(value) < 0.1 else f"{value:.0%}"  # noqa: PLR2004 - two digits


def duration(seconds: float | None) -> str:
    """A time in its largest two units, or in seconds with a fraction."""
    if seconds is None:
        return _NONE
    if seconds < 2 * _MINUTE:
        return number(seconds, " s")
    if seconds < _HOUR:
        return f"{seconds // _MINUTE:.0f} min {seconds % _MINUTE:02.0f} s"
    return f"{seconds // _HOUR:.0f} h {seconds % _HOUR // _MINUTE:02.0f} min"


def moment(unix: float) -> str:
    """A moment, in UTC."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(unix))


def change(value: float | None, base: float | None) -> str:
    """How a figure compares with another run's; empty where that says nothing."""
    if value is None or not base:
        return ""
    return f"{value / base:.2f}\N{MULTIPLICATION SIGN}"
