"""The suffix index against a plain search, on texts short enough for one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("numba")

from seer_async.drafting.index import GroupIndex, Lookup

WIDE = Lookup(max_spec_tokens=4, pattern_lookup_max=32, min_score=0.0)
TEXT = st.lists(st.integers(0, 3), max_size=14)


def built(sequences, cut=3):
    """Append the sequences in turns of `cut` tokens, as running siblings do."""
    index = GroupIndex()
    for at in range(0, max(map(len, sequences), default=0), cut):
        for name, tokens in enumerate(sequences):
            index.extend(str(name), tokens[at : at + cut])
    return index


def propose(index, tail, lookup=WIDE):
    return index.propose(np.array(tail, dtype=np.int32), lookup)


def occurrences(sequences, tail):
    """Longest match of the end of `tail` that something follows, and what follows each such place."""
    longest, follows = 0, []
    for tokens in sequences:
        for end in range(len(tokens) - 1):
            match = 0
            while match < min(end + 1, len(tail)) and tokens[end - match] == tail[-1 - match]:
                match += 1
            if match > longest:
                longest, follows = match, []
            if match and match == longest:
                follows.append(tokens[end + 1 :])
    return longest, follows


@settings(max_examples=400, deadline=None)
@given(st.lists(TEXT, max_size=3), st.lists(st.integers(0, 3), min_size=1, max_size=8), st.integers(1, 5))
def test_it_finds_the_longest_match_and_says_what_followed(sequences, tail, cut):
    longest, follows = occurrences(sequences, tail)
    paths = propose(built(sequences, cut), tail)
    if not longest:
        assert paths == []
        return
    (path,) = paths
    assert path.match == longest
    assert len(path.tokens) == len(path.scores) <= 4
    assert path.tokens[0] in {follow[0] for sequence in sequences for follow in starts(sequence, tail)}
    assert all(0 < b <= a < 1 for a, b in zip(path.scores, path.scores[1:], strict=False))
    assert any(contains(sequence, path.tokens) for sequence in sequences), "a draft stays within one sequence"
    if len({follow[0] for follow in follows}) == 1 and len(follows) >= len(list(all_starts(sequences, tail))):
        assert path.tokens[0] == follows[0][0]


def starts(tokens, tail):
    """What follows each place where at least the last token of `tail` occurred."""
    return [tokens[i + 1 :] for i in range(len(tokens) - 1) if tokens[i] == tail[-1]]


def all_starts(sequences, tail):
    return (follow for sequence in sequences for follow in starts(sequence, tail))


def contains(tokens, part):
    return any(tokens[i : i + len(part)] == part for i in range(len(tokens) - len(part) + 1))


@settings(max_examples=100, deadline=None)
@given(st.lists(TEXT, min_size=1, max_size=3), st.lists(st.integers(0, 3), min_size=1, max_size=5))
def test_paths_differ_and_the_likelier_ones_come_first(sequences, tail):
    paths = propose(built(sequences), tail, Lookup(max_spec_tokens=4, top_k=4, min_score=0.01))
    assert len(paths) <= 4
    assert len({tuple(path.tokens) for path in paths}) == len(paths)
    assert all(path.tokens for path in paths)


def test_the_end_of_a_sequence_does_not_match_itself():
    index = built([[1, 2, 3, 4]])
    assert propose(index, [1, 2, 3, 4]) == []
    assert propose(index, [9, 2])[0].tokens == [3, 4]


def test_matches_do_not_run_from_one_sequence_into_the_next():
    index = GroupIndex()
    index.extend("a", [1, 2, 3])
    index.extend("b", [4, 5, 6])
    assert propose(index, [3]) == []
    assert propose(index, [3, 4])[0].match == 1


def test_the_majority_wins_and_longer_matches_speak_louder():
    index = built([[7, 1, 5], [8, 1, 5], [9, 1, 6]])
    assert propose(index, [0, 1])[0].tokens == [5]
    assert propose(index, [9, 1])[0].tokens == [6]


def test_two_witnesses_are_worth_more_than_one():
    one = propose(built([[7, 1, 5]]), [1])[0].scores[0]
    two = propose(built([[7, 1, 5], [8, 1, 5]]), [1])[0].scores[0]
    assert 0 < one < two < 1


def test_limits_are_kept():
    index = built([list(range(50)) * 2])
    tail = list(range(20))
    assert propose(index, tail, Lookup(max_spec_tokens=7))[0].tokens == list(range(20, 27))
    assert propose(index, tail, Lookup(pattern_lookup_max=5))[0].match == 5
    assert propose(index, [99, 3], Lookup(pattern_lookup_min=2)) == []
    assert propose(index, tail, Lookup(min_score=0.99)) == []


def test_it_grows_without_losing_anything():
    rng = np.random.default_rng(0)
    texts = rng.integers(0, 30_000, (20, 3000)).astype(np.int32)
    index = GroupIndex()
    for at in range(0, 3000, 250):
        for name, text in enumerate(texts):
            index.extend(str(name), text[at : at + 250])
            index.propose(text[:5], WIDE)
    assert index.tokens == texts.size
    for name in (0, 7, 19):
        for at in (40, 1500, 2990):
            assert index.propose(texts[name, at - 32 : at], WIDE)[0].tokens == texts[name, at : at + 4].tolist()


def test_a_full_group_takes_nothing_more_in():
    index = GroupIndex(max_tokens=10)
    index.extend("a", list(range(8)))
    index.extend("b", [1, 2, 3])
    assert index.tokens == 8
    assert propose(index, [0, 1, 2])[0].tokens == [3, 4, 5, 6]
