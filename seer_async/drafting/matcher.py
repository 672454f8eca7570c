"""The loops of the suffix index, compiled with numba; `seer_async.drafting.index` says what they are for.

A *place* is one token of one sequence, numbered as it arrived: `places[p]` is (sequence, offset, and for each order the
place before it with the same hash, or -1). `heads[k, h]` is the latest place whose last ORDERS[k] tokens hash to h; its
length is a power of two. The tokens of sequence s are pool[starts[s] : starts[s] + lengths[s]].
"""

# ruff: noqa: ANN001, ANN201, ANN202, PLR0917 - numba takes arrays by position and infers the types; index.py has them
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import numpy as np
from numba import njit

ORDERS = (6, 3, 2, 1)  # tokens of context, longest first
CHAIN = 48  # places of a chain that are looked at, the latest first
FADE = 0.5  # a match that is shorter by a token has half the vote
FLOOR = 1 / 64
DOUBT = 0.5  # votes against everything: one witness is worth less than ten that agree


@njit(cache=True)
def _hash(pool, end, order, mask):
    value = np.uint32(2166136261 + order)
    for offset in range(end - order + 1, end + 1):
        value = (value ^ np.uint32(pool[offset])) * np.uint32(2654435761)
        value ^= value >> np.uint32(15)
    return np.int64(value) & mask


@njit(cache=True)
def _link(place, at, offset, pool, heads, places):
    """Make `place`, whose token is pool[at] at `offset` of its sequence, the latest of its chains."""
    mask = heads.shape[1] - 1
    for kind in range(len(ORDERS)):
        if offset + 1 >= ORDERS[kind]:
            slot = _hash(pool, at, ORDERS[kind], mask)
            places[place, 2 + kind] = heads[kind, slot]
            heads[kind, slot] = place


@njit(cache=True)
def append(new, runs, count, pool, starts, lengths, heads, places):
    """Append `new`, of which each run (sequence, tokens) has its part in turn; `count` places exist."""
    at = 0
    for run in range(len(runs)):
        sequence, tokens = runs[run]
        start = starts[sequence]
        for _ in range(tokens):
            offset = lengths[sequence]
            pool[start + offset] = new[at]
            lengths[sequence] = offset + 1
            places[count, 0] = sequence
            places[count, 1] = offset
            _link(count, start + offset, offset, pool, heads, places)
            count += 1
            at += 1


@njit(cache=True)
def relink(count, pool, starts, heads, places):
    """Link all places anew, into empty `heads`."""
    for place in range(count):
        offset = places[place, 1]
        _link(place, starts[places[place, 0]] + offset, offset, pool, heads, places)


@njit(cache=True)
def _match(tail, pool, start, at, most):
    """How many tokens before and at pool[at], no further than `start`, are those at the end of `tail`."""
    count = 0
    last = len(tail) - 1
    while count < most and count <= last and at - count >= start and pool[at - count] == tail[last - count]:
        count += 1
    return count


@njit(cache=True)
def find(tail, least, most, pool, starts, lengths, heads, places):
    """Where the end of `tail` occurred and what follows lies: (place of the next token, tokens from there, vote).

    Also the longest match. Empty arrays and 0 where nothing matches `least` tokens.
    """
    nexts = np.empty(CHAIN, dtype=np.int64)
    rooms = np.empty(CHAIN, dtype=np.int64)
    matches = np.empty(CHAIN, dtype=np.int64)
    found = 0
    longest = 0
    mask = heads.shape[1] - 1
    for kind in range(len(ORDERS)):
        order = ORDERS[kind]
        if order > len(tail) or found:
            continue
        if order < least:
            break
        place = heads[kind, _hash(tail, len(tail) - 1, order, mask)]
        steps = 0
        while place >= 0 and steps < CHAIN:
            sequence, offset = places[place, 0], places[place, 1]
            start = starts[sequence]
            room = lengths[sequence] - offset - 1
            if room > 0:
                match = _match(tail, pool, start, start + offset, most)
                if match >= order:
                    nexts[found], rooms[found], matches[found] = start + offset + 1, room, match
                    longest = max(longest, match)
                    found += 1
            place = places[place, 2 + kind]
            steps += 1
    votes = np.empty(found, dtype=np.float32)
    for i in range(found):
        votes[i] = max(FLOOR, FADE ** (longest - matches[i]))
    return nexts[:found], rooms[:found], votes, longest


@njit(cache=True)
def follow(nexts, rooms, votes, begin, most, least, pool):
    """The path that the votes choose, after the forced tokens `begin`.

    Returns tokens and scores, and for each step the second choice and its score (-1 and 0 without one). Stops after
    `most` tokens, where no vote is left, or where the score falls under `least`.
    """
    tokens = np.empty(most, dtype=np.int32)
    scores = np.empty(most, dtype=np.float32)
    others = np.full(most, -1, dtype=np.int32)
    other_scores = np.zeros(most, dtype=np.float32)
    live = np.ones(len(nexts), dtype=np.bool_)
    score = 1.0
    length = 0
    while length < most:
        total, first, first_votes, second, second_votes = _count(nexts, rooms, votes, live, length, pool)
        if first < 0:
            break
        chosen, chosen_votes = first, first_votes
        if length < len(begin):
            chosen = begin[length]
            chosen_votes = _votes_for(chosen, nexts, rooms, votes, live, length, pool)
        before = score
        score *= chosen_votes / (total + DOUBT)
        if score < least:
            break
        tokens[length], scores[length] = chosen, score
        if second >= 0:
            others[length], other_scores[length] = second, before * second_votes / (total + DOUBT)
        for i in range(len(nexts)):
            live[i] = live[i] and rooms[i] > length and pool[nexts[i] + length] == chosen
        length += 1
    return tokens[:length], scores[:length], others[:length], other_scores[:length]


@njit(cache=True)
def _votes_for(token, nexts, rooms, votes, live, step, pool):
    total = 0.0
    for i in range(len(nexts)):
        if live[i] and rooms[i] > step and pool[nexts[i] + step] == token:
            total += votes[i]
    return total


@njit(cache=True)
def _count(nexts, rooms, votes, live, step, pool):
    """All votes of a step, and the two tokens with most of them; -1 where there is none."""
    total = 0.0
    first, first_votes, second, second_votes = -1, 0.0, -1, 0.0
    for i in range(len(nexts)):
        if not live[i] or rooms[i] <= step:
            continue
        total += votes[i]
        token = pool[nexts[i] + step]
        if token in (first, second):
            continue
        mine = _votes_for(token, nexts, rooms, votes, live, step, pool)
        if mine > first_votes:
            second, second_votes = first, first_votes
            first, first_votes = token, mine
        elif mine > second_votes:
            second, second_votes = token, mine
    return total, first, first_votes, second, second_votes
