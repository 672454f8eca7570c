"""HTML and SVG elements. All text and attributes are escaped on the way out, by the standard library's tree writer.

Invariant: text of other origin (ids, paths, model names) gets into a page only through `element`, which also takes out
control characters; no page has a script, an event handler or a style attribute.
"""

from __future__ import annotations

from xml.etree.ElementTree import Element, tostring

from seer_async.report.words import visible

__all__ = ["Child", "Element", "element", "to_html"]

Child = Element | str | None
_MOST_TEXT = 2000


def element(tag: str, *children: Child, **attributes: object) -> Element:
    """An element; `class_` and `for_` lose their underscore, other underscores become hyphens, None is left out."""
    made = Element(tag, {_name(key): _text(value) for key, value in attributes.items() if value is not None})
    for child in children:
        if isinstance(child, str):
            _append_text(made, visible(child, _MOST_TEXT))
        elif child is not None:
            made.append(child)
    return made


def to_html(root: Element) -> str:
    """The document that `root` is the html element of."""
    return "<!DOCTYPE html>\n" + tostring(root, encoding="unicode", method="html") + "\n"


def _name(key: str) -> str:
    return key if key == "viewBox" else key.rstrip("_").replace("_", "-")


def _text(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else visible(str(value), _MOST_TEXT * 1000)


def _append_text(made: Element, text: str) -> None:
    if len(made):
        made[-1].tail = (made[-1].tail or "") + text
    else:
        made.text = (made.text or "") + text
