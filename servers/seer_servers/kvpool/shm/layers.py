"""The order of a model's layers in a block, the same in every engine."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_NUMBER = re.compile(r"(\d+)")


def in_order(names: Iterable[str]) -> list[str]:
    """Sort layers' names by the numbers in them: layer 2 comes before layer 10."""
    return sorted(names, key=_key)


def _key(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in _NUMBER.split(name)]
