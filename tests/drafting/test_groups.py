"""What an engine knows of its groups, whatever order it hears it in."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

pytest.importorskip("numba")

from seer_async.drafting.groups import Groups
from seer_async.drafting.index import GroupIndex, Lookup

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
    groups = Groups()
    for name in "abc":
        groups.add(name, "x", 0, list(range(40)))
    bound = Groups(max_bytes=groups.nbytes - 1)
    for name in "abc":
        bound.add(name, "x", 0, list(range(40)))
    bound.add("a", "x", 40, [1])
    bound.trim()
    assert [name for name in "abc" if bound.length(name, "x")] == ["a", "c"]
    assert bound.forgotten == 1
    assert bound.tokens == 81
    assert 0 < bound.nbytes < groups.nbytes


@pytest.mark.parametrize(("requests", "tokens"), [(1, 1), (40, 2), (2, 3000), (0, 0)])
def test_memory_is_bounded_whatever_groups_are_like(requests, tokens):
    """Many tiny ones, many requests, tokens that wait to be indexed, and groups of which nothing has come."""
    GroupIndex.warm_up()  # compiling takes memory, too
    most = 4 << 20
    groups = Groups(max_bytes=most)
    tracemalloc.start()
    try:
        for number in range(600):
            name = f"{number:032}"
            groups.add(name, "behind a gap", 1, [1])
            for request in range(requests):
                groups.add(name, f"{number:032}/{request:032}", 0, np.arange(300, 300 + tokens, dtype=np.int32))
            if number % 3 == 0:
                groups.propose(name, tail(1), LOOKUP)
            groups.trim()
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert groups.forgotten > 0
    assert groups.tokens == requests * tokens * len(groups)
    assert groups.nbytes <= most
    assert held <= 1.1 * most
    assert held > 0.5 * groups.nbytes, "what is charged is not far from what is taken"
