"""The suffix index against a naive one, which looks at every place of every sequence."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("numba")

from seer_async.drafting import matcher
from seer_async.drafting.index import GroupIndex, Lookup

FEW = matcher.CHAIN - 8  # tokens of which every place is looked at
ALL = Lookup(top_k=1000, min_score=0.0)

tokens = st.integers(0, 3)
appends = st.lists(st.tuples(st.sampled_from("abc"), st.lists(tokens, max_size=9)), max_size=12)
lookups = st.builds(
    Lookup,
    max_spec_tokens=st.integers(1, 9),
    pattern_lookup_min=st.integers(1, 8),
    pattern_lookup_max=st.integers(1, 12),
    top_k=st.integers(1, 5),
    min_score=st.sampled_from([0.0, 0.0203, 0.2003]),  # no score is just that, where the last bit would decide
)


def tail(values):
    return np.array(values, dtype=np.int32)


def filled(news, **options):
    """An index and the plain lists of what is in it."""
    index, sequences = GroupIndex(**options), {}
    for name, values in news:
        index.extend(name, values)
        sequences.setdefault(name, []).extend(values)
    return index, sequences


class Naive:
    """What `propose` is meant to know: every continuation, with its votes."""

    def __init__(self, sequences, text, lookup):
        self.found = self._find([values for values in sequences.values() if values], text, lookup)
        self.match = max((match for match, _ in self.found), default=0)
        self.votes = [
            (max(matcher.FLOOR, matcher.FADE ** (self.match - match)), tuple(after[: lookup.max_spec_tokens]))
            for match, after in self.found
        ]
        self.low = lookup.min_score

    @staticmethod
    def _find(sequences, text, lookup):
        places = [(values, end) for values in sequences for end in range(1, len(values))]
        matches = [(common_end(values[:end], text, lookup.pattern_lookup_max), values[end:]) for values, end in places]
        found, unseen = [], lookup.pattern_lookup_max
        for order in matcher.ORDERS:
            if order <= lookup.pattern_lookup_max:
                least = max(order, lookup.pattern_lookup_min)
                found += [each for each in matches if least <= each[0] <= unseen]
            if len(found) >= lookup.top_k or order <= lookup.pattern_lookup_min:
                break
            unseen = order - 1
        return found

    def score(self, path):
        score = 1.0
        for length in range(len(path)):
            going_on = [vote for vote, after in self.votes if len(after) > length and after[:length] == path[:length]]
            agreeing = [vote for vote, after in self.votes if after[: length + 1] == path[: length + 1]]
            score *= sum(agreeing) / (sum(going_on) + matcher.DOUBT)
        return score

    def gains(self, count):
        """The expected tokens that each of the best `count` paths adds to those before it."""
        nodes = {after[: i + 1] for _, after in self.votes for i in range(len(after))}
        scores = {node: self.score(node) for node in nodes if self.score(node) >= self.low}
        chains = []

        def gain(node):
            below = sorted((gain(other) for other in scores if other[:-1] == node), reverse=True)
            chains.extend(below[1:])
            return scores.get(node, 0.0) + (below[0] if below else 0.0)

        chains.append(gain(()))
        return sorted((chain for chain in chains if chain), reverse=True)[:count]


def common_end(left, right, most):
    count = 0
    while count < min(most, len(left), len(right)) and left[-1 - count] == right[-1 - count]:
        count += 1
    return count


def added(paths):
    """The expected tokens that each path adds to those before it."""
    seen, gains = set(), []
    for path in paths:
        nodes = {tuple(path.tokens[: i + 1]): score for i, score in enumerate(path.scores)}
        gains.append(sum(score for node, score in nodes.items() if node not in seen))
        seen |= nodes.keys()
    return gains


def few(news):
    kept, count = [], 0
    for name, values in news:
        kept.append((name, values[: FEW - count]))
        count += len(kept[-1][1])
    return kept


class TestAgainstNaive:
    @settings(max_examples=400, deadline=None)
    @given(appends.map(few), st.lists(tokens, max_size=14), lookups)
    def test_it_proposes_the_same(self, news, text, lookup):
        index, sequences = filled(news)
        naive = Naive(sequences, text, lookup)
        paths = index.propose(tail(text), lookup)
        assert added(paths) == pytest.approx(naive.gains(lookup.top_k))
        for path in paths:
            assert path.match == naive.match
            starts = [tuple(path.tokens[: i + 1]) for i in range(len(path.tokens))]
            assert path.scores == pytest.approx([naive.score(start) for start in starts])

    @settings(max_examples=200, deadline=None)
    @given(appends.map(few), st.lists(tokens, max_size=14), lookups)
    def test_looking_meanwhile_changes_nothing(self, news, text, lookup):
        index, other = GroupIndex(), GroupIndex()
        for name, values in news:
            index.extend(name, values)
            other.extend(name, tail(values))
            other.propose(tail(text), lookup)
        assert index.propose(tail(text), lookup) == other.propose(tail(text), lookup)

    @settings(max_examples=100, deadline=None)
    @given(st.randoms(use_true_random=False), lookups)
    def test_with_many_tokens_each_path_still_occurs(self, rng, lookup):
        news = [(rng.choice("abcdef"), [rng.randrange(5) for _ in range(rng.randrange(20))]) for _ in range(300)]
        index, sequences = filled(news)
        text = max(sequences.values(), key=len)[-rng.randrange(1, 12) :]
        paths = index.propose(tail(text), lookup)
        gains = added(paths)
        assert gains == sorted(gains, reverse=True)
        assert len({tuple(path.tokens) for path in paths}) == len(paths) <= lookup.top_k
        for path in paths:
            assert 1 <= len(path.tokens) == len(path.scores) <= lookup.max_spec_tokens
            assert all(later <= score for score, later in pairwise((1.0, *path.scores)))
            assert path.scores[-1] >= lookup.min_score
            assert lookup.pattern_lookup_min <= path.match <= lookup.pattern_lookup_max
            whole = text[len(text) - lookup.pattern_lookup_min :] + path.tokens
            assert any(occurs(whole, values) for values in sequences.values())


def occurs(part, values):
    return any(values[at : at + len(part)] == part for at in range(len(values)))


class TestBorders:
    def test_a_match_does_not_run_over_the_border_of_two_sequences(self):
        index, _ = filled([("a", [1, 2]), ("b", [3, 4, 5])])
        assert [(path.tokens, path.match) for path in index.propose(tail([1, 2, 3]), ALL)] == [([4, 5], 1)]
        assert index.propose(tail([1, 2]), ALL) == []

    def test_a_path_ends_with_its_sequence(self):
        index, _ = filled([("a", [1, 2]), ("b", [2, 3]), ("a", [4])])
        assert [path.tokens for path in index.propose(tail([1]), ALL)] == [[2, 4]]

    def test_the_end_of_a_text_is_no_match_for_itself(self):
        index, _ = filled([("a", [5, 6, 7])])
        assert index.propose(tail([5, 6, 7]), ALL) == []
        index.extend("a", [5, 6])
        assert [(path.tokens, path.match) for path in index.propose(tail([6, 7, 5, 6]), ALL)] == [([7, 5, 6], 2)]

    @pytest.mark.parametrize("text", [[], [9], [9, 9, 9, 9, 9, 9, 9, 9]])
    def test_what_never_occurred_has_no_continuation(self, text):
        index, _ = filled([("a", [1, 2, 3])])
        assert index.propose(tail(text), ALL) == []
        assert GroupIndex().propose(tail(text), ALL) == []

    def test_a_least_match_between_two_orders_is_kept_to(self):
        index, _ = filled([("a", [1, 2, 3, 4, 9]), ("b", [7, 2, 3, 4, 8])])
        lookup = Lookup(pattern_lookup_min=4, top_k=5)
        assert [path.tokens for path in index.propose(tail([1, 2, 3, 4]), lookup)] == [[9]]


class TestVotes:
    def test_the_continuation_of_most_siblings_comes_first(self):
        index, _ = filled([("a", [1, 2, 3]), ("b", [1, 2, 4]), ("c", [1, 2, 4])])
        paths = index.propose(tail([1, 2]), Lookup(top_k=2))
        assert [path.tokens for path in paths] == [[4], [3]]
        assert paths[0].scores[0] > paths[1].scores[0]

    def test_a_longer_match_outweighs_two_shorter_ones(self):
        long = list(range(10, 20))
        index, _ = filled([("a", [*long, 3]), ("b", [0, *long[3:], 4]), ("c", [0, *long[3:], 4])])
        assert index.propose(tail(long), Lookup(top_k=2))[0].tokens == [3]

    def test_more_witnesses_are_worth_more(self):
        scores = []
        for witnesses in (1, 2, 8):
            index, _ = filled([(str(i), [1, 2, 3]) for i in range(witnesses)])
            scores.append(index.propose(tail([1, 2]), Lookup())[0].scores[0])
        assert scores == sorted(scores)
        assert scores[0] < 0.7
        assert scores[-1] > 0.9


class TestGrowth:
    def test_every_place_is_found_however_large_the_index_has_become(self):
        rng = random.Random(0)
        news, sequences = [], {}
        for _ in range(6000):
            name, values = rng.choice("abcdefgh"), [rng.randrange(32000) for _ in range(rng.randrange(1, 8))]
            news.append((name, values))
        index, sequences = filled(news)
        index.extend("long", long := [rng.randrange(32000) for _ in range(30000)])
        sequences["long"] = long
        for values in sequences.values():
            for at in rng.sample(range(32, len(values) - 8), 200):
                path = index.propose(tail(values[at - 32 : at]), Lookup())[0]
                assert (path.tokens, path.match) == (values[at : at + 8], 32)

    def test_memory_is_bounded_and_nothing_is_taken_in_behind_a_gap(self):
        index, _ = filled([("a", [1, 2, 3, 4, 5, 6]), ("b", [7, 8, 9]), ("b", [5]), ("a", [6])], max_tokens=8)
        assert index.tokens == 8
        assert index.propose(tail([8]), ALL) == []
        assert [path.tokens for path in index.propose(tail([7]), ALL)] == [[8]]

    @pytest.mark.parametrize("length", [1, 4, 1000])
    def test_memory_grows_with_the_tokens_alone(self, length):
        rng = random.Random(0)
        index = GroupIndex()
        for number in range(20000 // length):
            index.extend(str(number), [rng.randrange(100) for _ in range(length)])
        index.propose(tail([1]), Lookup())
        rooms = 320 * max(1, 20000 // length)
        assert index.nbytes <= 120 * index.tokens + rooms + 100_000


class TestCompiling:
    def test_after_the_warm_up_no_call_has_to_be_compiled(self):
        GroupIndex.warm_up()
        compiled = [len(loop.signatures) for loop in (matcher.append, matcher.propose)]
        index, _ = filled([("a", range(5000)), ("b", np.arange(5000, dtype=np.int64)), ("c", [1, 2, 3])])
        text = np.arange(8, dtype=np.int32)
        text.flags.writeable = False
        for other in (text, text[::2], text.astype(np.int64), text[:0]):
            index.propose(other, Lookup(min_score=0, top_k=3))
        assert compiled == [1, 1] == [len(loop.signatures) for loop in (matcher.append, matcher.propose)]

    def test_without_a_folder_for_the_cache_it_compiles_all_the_same(self, monkeypatch):
        plain = matcher.njit

        def njit(*args, **options):
            if options.get("cache"):
                raise RuntimeError("cannot cache function: no locator available")
            return plain(*args, **options)

        monkeypatch.setattr(matcher, "njit", njit)
        assert matcher._compiled(lambda x: x + 1)(1) == 2
