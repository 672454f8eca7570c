"""What an engine knows of its groups, whatever order it hears it in."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("numba")

from seer_async.drafting.groups import Groups
from seer_async.drafting.index import Lookup

LOOKUP = Lookup(max_spec_tokens=4)


def tail(*tokens):
    return np.array(tokens, dtype=np.int32)


def test_a_sibling_says_what_comes_next():
    groups = Groups()
    groups.add("g", "a", 0, [1, 2, 3, 4, 5, 6])
    path = groups.propose("g", tail(9, 2, 3), LOOKUP)
    assert path is not None
    assert path.tokens[:3] == [4, 5, 6]
    assert groups.propose("other", tail(2, 3), LOOKUP) is None


def test_late_double_and_overlapping_news_count_once():
    groups = Groups()
    groups.add("g", "a", 0, [1, 2, 3])
    groups.add("g", "a", 0, [1, 2, 3])
    groups.add("g", "a", 1, [2, 3, 4])
    groups.add("g", "a", 6, [9, 9])
    assert groups.length("g", "a") == 4
    assert groups.tokens == 4


def test_the_least_recently_used_group_is_forgotten_first():
    groups = Groups(max_tokens=100)
    for name in "abc":
        groups.add(name, "x", 0, list(range(40)))
    groups.add("a", "x", 40, [1])
    groups.trim()
    assert [name for name in "abc" if groups.length(name, "x")] == ["a", "c"]
    assert groups.forgotten == 1
