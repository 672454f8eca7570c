"""A config as TOML that `--config` takes back: the standard library only reads it.

Invariant: what is printed resolves to the config it was printed from. Keys without a value are comments, because TOML
has no null.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_DELETE = "\x7f"  # JSON leaves it as it is, TOML does not allow it


def toml_lines(tree: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Lines of a document with one table a section; values are of the kinds that a config has."""
    for section, keys in tree.items():
        yield f"[{section}]"
        for key, value in keys.items():
            yield f"# {key} is not set" if value is None else f"{key} = {_value(value)}"
        yield ""


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace(_DELETE, "\\u007f")
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, dict):
        pairs = (f"{_value(str(key))} = {_value(each)}" for key, each in value.items())
        return f"{{{', '.join(pairs)}}}"
    return repr(value)
