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

_SEED = 0xCBF29CE484222325
_PRIME = 0x9E3779B97F4A7C15


def _compiled(function):
    """Compile at the first call, and keep it on disk where there is a folder to write to: compiling takes seconds."""
    try:
        return njit(cache=True)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        return njit(function)


@_compiled
def _mix(value, token):
    value = (value ^ np.uint64(token)) * np.uint64(_PRIME)
    return value ^ (value >> np.uint64(32))


@_compiled
def _slot(tokens, end, order, mask):
    """Where the table of an order has the `order` tokens that end at tokens[end]."""
    value = np.uint64(_SEED)
    for back in range(order):
        value = _mix(value, tokens[end - back])
    return np.int64(value & np.uint64(mask))


@_compiled
def _link(place, at, offset, pool, heads, places):
    """Make `place`, whose token is pool[at] at `offset` of its sequence, the latest of its chains."""
    mask = np.uint64(heads.shape[1] - 1)
    value = np.uint64(_SEED)
    back = 0
    for kind in range(len(ORDERS) - 1, -1, -1):  # shortest first: a longer hash goes on from a shorter
        if ORDERS[kind] > offset + 1:
            break
        while back < ORDERS[kind]:
            value = _mix(value, pool[at - back])
            back += 1
        slot = np.int64(value & mask)
        places[place, 2 + kind] = heads[kind, slot]
        heads[kind, slot] = place


@_compiled
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


@_compiled
def propose(tail, least, longest, most, top, low, pool, starts, lengths, heads, places):
    """Up to `top` paths of up to `most` tokens, best first, with scores of at least `low`.

    Returns tokens [top, most], scores [top, most], the paths' lengths [top], and the longest match in tokens, which is
    from `least` to `longest`, or 0 where there is none.
    """
    nexts, rooms, votes, match = _find(tail, least, longest, top, pool, starts, lengths, heads, places)
    tokens, parents, depths, scores = _tree(nexts, rooms, votes, most, pool)
    gains, heirs = _gains(parents, scores, low)
    path_tokens = np.zeros((top, most), dtype=np.int32)
    path_scores = np.zeros((top, most), dtype=np.float64)
    path_lengths = np.zeros(top, dtype=np.int64)
    taken = np.zeros(len(parents), dtype=np.bool_)
    taken[0] = True
    for path in range(top):
        node = _best(parents, gains, taken)
        if node < 0:
            break
        while heirs[node] >= 0:  # to the path's end
            node = heirs[node]
        path_lengths[path] = depths[node]
        while node > 0:
            taken[node] = True
            path_tokens[path, depths[node] - 1], path_scores[path, depths[node] - 1] = tokens[node], scores[node]
            node = parents[node]
    return path_tokens, path_scores, path_lengths, match


@_compiled
def _find(tail, least, longest, enough, pool, starts, lengths, heads, places):
    """Where the end of `tail` occurred: (pool place of the next token, tokens from there, vote), and the longest match.

    Shorter orders are asked until `enough` places are found: what they add has little say beside a longer match.
    """
    nexts = np.empty(CHAIN, dtype=np.int64)
    rooms = np.empty(CHAIN, dtype=np.int64)
    matches = np.empty(CHAIN, dtype=np.int64)
    found = 0
    unseen = longest  # matches of up to so many tokens have not been seen on a longer order's chain
    mask = heads.shape[1] - 1
    for kind in range(len(ORDERS)):
        if ORDERS[kind] <= min(len(tail), longest):
            place = heads[kind, _slot(tail, len(tail) - 1, ORDERS[kind], mask)]
            steps = 0
            while place >= 0 and steps < CHAIN:
                sequence, offset = places[place, 0], places[place, 1]
                room = lengths[sequence] - offset - 1
                if room > 0:
                    start = starts[sequence]
                    match = _match(tail, pool, start, start + offset, longest)
                    if max(least, ORDERS[kind]) <= match <= unseen and found < CHAIN:
                        nexts[found], rooms[found], matches[found] = start + offset + 1, room, match
                        found += 1
                place = places[place, 2 + kind]
                steps += 1
        if found >= enough or ORDERS[kind] <= least:
            break
        unseen = ORDERS[kind] - 1
    best = 0
    for i in range(found):
        best = max(best, matches[i])
    votes = np.empty(found, dtype=np.float64)
    for i in range(found):
        votes[i] = max(FLOOR, FADE ** (best - matches[i]))
    return nexts[:found], rooms[:found], votes, best


@_compiled
def _match(tail, pool, start, at, most):
    """How many tokens before and at pool[at], no further than `start`, are those at the end of `tail`."""
    count = 0
    last = len(tail) - 1
    while count < most and count <= last and at - count >= start and pool[at - count] == tail[last - count]:
        count += 1
    return count


@_compiled
def _tree(nexts, rooms, votes, most, pool):
    """The continuations as a tree, parents first, 0 its root: tokens, parents, depths and scores of the nodes."""
    size = 1 + most * len(nexts)
    tokens = np.empty(size, dtype=np.int32)
    parents = np.empty(size, dtype=np.int64)
    depths = np.empty(size, dtype=np.int64)
    scores = np.zeros(size, dtype=np.float64)  # votes, until all are counted
    totals = np.zeros(size, dtype=np.float64)  # votes of a node's children
    children = np.full(size, -1, dtype=np.int64)  # the first one
    siblings = np.empty(size, dtype=np.int64)  # the next one
    parents[0], depths[0] = -1, 0
    count = 1
    for i in range(len(nexts)):
        node = 0
        for step in range(min(most, rooms[i])):
            token = pool[nexts[i] + step]
            child = children[node]
            while child >= 0 and tokens[child] != token:
                child = siblings[child]
            if child < 0:
                child = count
                count += 1
                tokens[child], parents[child], depths[child] = token, node, step + 1
                siblings[child], children[node] = children[node], child
            scores[child] += votes[i]
            totals[node] += votes[i]
            node = child
    scores[0] = 1.0
    for node in range(1, count):
        parent = parents[node]
        scores[node] *= scores[parent] / (totals[parent] + DOUBT)
    return tokens[:count], parents[:count], depths[:count], scores[:count]


@_compiled
def _gains(parents, scores, low):
    """What each node adds with the best path below it: tokens expected to be accepted; and the next node on that path.

    Nodes that score under `low` add nothing.
    """
    gains = np.zeros(len(parents), dtype=np.float64)
    heirs = np.full(len(parents), -1, dtype=np.int64)
    for node in range(len(parents) - 1, 0, -1):
        if scores[node] < low:
            continue
        gains[node] = scores[node] + (gains[heirs[node]] if heirs[node] >= 0 else 0.0)
        parent = parents[node]
        if heirs[parent] < 0 or gains[node] >= gains[heirs[parent]]:  # of equals, the one found first
            heirs[parent] = node
    return gains, heirs


@_compiled
def _best(parents, gains, taken):
    """The node with most to add that is no part of a path yet, but whose parent is; -1 without one."""
    best, gain = -1, 0.0
    for node in range(1, len(parents)):
        if not taken[node] and taken[parents[node]] and gains[node] > gain:
            best, gain = node, gains[node]
    return best
