"""Kernels of the grouped drafter: find a request's recent tokens in its group, choose a draft, learn, verify.

A *row* is one sequence of a group: rows below the number of vLLM's request slots are these slots, the others are
references (responses that finished here or run on other engines). A group lists its rows in `members`. A request's
*candidates* are its own row, then those of its group. All tensors are int32 unless said.

Invariants: a match ends before its sequence does, so it has something to say; a draft never reads past its sequence; a
place without a draft gets confidence 0 and a token of the request's own, because the model may still be run on it.
"""
# Triton's functions have no types, and take pointers and constants in a way of their own.
# ruff: noqa: ANN001, ANN202, N803, PLR0917
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from typing import NamedTuple

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

MEMBERS = 63
"""Rows of its group that a request looks at, besides its own."""

LENGTHS, SUPPORTS = 7, 3
"""Matches are of a kind by length (1, 2, 3, 4-5, 6-8, 9-15, 16 and more) and support (one sequence, split, agreed)."""

KINDS = LENGTHS * SUPPORTS
NO_MATCH, GONE = -1, tl.constexpr(-2)  # in place of a kind; the second where a slot's request is another one now
LONGEST_MATCH = 31
LONGEST_ROW = 1 << 26
BLOCK = 1024
SCORE_BITS = 20  # of a drafted token's chance to be kept, by which it is admitted to verification
FEW_REQUESTS = 64

# A found match is its length above its place, so that a maximum finds the longest and among equals the latest.
_PLACE_BITS = tl.constexpr(26)
_PLACE = tl.constexpr((1 << 26) - 1)


class Tables(NamedTuple):
    """What the kernels read, in the order in which they take it."""

    slot_tokens: torch.Tensor  # [slots, longest sequence]
    slot_lengths: torch.Tensor  # [slots]
    reference_tokens: torch.Tensor  # [references, longest sequence]
    reference_lengths: torch.Tensor  # [references]
    starts: torch.Tensor  # [slots + references] where a sibling's match may end at the earliest
    groups: torch.Tensor  # [slots] the group of each
    members: torch.Tensor  # [groups, MEMBERS]
    counts: torch.Tensor  # [groups] how many members


class Batch(NamedTuple):
    """The requests of a step."""

    slots: torch.Tensor  # int64 [requests]
    sampled: torch.Tensor  # [requests] tokens each got in this step; 0 while it prefills
    logits: torch.Tensor  # [requests + 1] where each one's logits begin


@triton.jit
def _candidate_row(candidate, slot, groups, members, members_stride, counts):
    row = slot
    if candidate > 0:
        row = -1
        group = tl.load(groups + slot)
        if candidate <= tl.load(counts + group):
            row = tl.load(members + group * members_stride + candidate - 1)
        if row == slot:
            row = -1
    return row


@triton.jit(do_not_specialize=["splits"])
def _scan_kernel(
    slot_tokens,
    slot_lengths,
    reference_tokens,
    reference_lengths,
    starts,
    groups,
    members,
    counts,
    slots,
    sampled,
    found,  # [requests, candidates, splits]
    stride,  # of both token tables
    members_stride,
    splits,
    SLOTS: tl.constexpr,
    SHORTEST: tl.constexpr,
    LONGEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Find the longest match in one part of one candidate of one request; 0 if none."""
    request, candidate, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot = tl.load(slots + request).to(tl.int32)
    row = _candidate_row(candidate, slot, groups, members, members_stride, counts)
    best = 0
    if (row >= 0) & (tl.load(sampled + request) > 0):
        length = tl.load(slot_lengths + slot)
        newest = slot_tokens + slot.to(tl.int64) * stride + length - 1
        deepest = tl.minimum(length, LONGEST)
        if row >= SLOTS:
            tokens = reference_tokens + (row - SLOTS).to(tl.int64) * stride
            end = tl.load(reference_lengths + row - SLOTS) - 1
        else:
            tokens = slot_tokens + row.to(tl.int64) * stride
            end = tl.load(slot_lengths + row) - 1
        first = 0
        if candidate > 0:
            first = tl.load(starts + row)
        part = tl.cdiv(tl.cdiv(end - first, splits), BLOCK) * BLOCK
        first += split * part
        end = tl.minimum(end, first + part)
        for offset in range(first, end, BLOCK):
            place = offset + tl.arange(0, BLOCK)
            alive = place < end
            matched = tl.zeros([BLOCK], tl.int32)
            back = 0
            living = 1
            while (back < deepest) & (living > 0):
                wanted = tl.load(newest - back)
                alive &= place >= back
                alive &= tl.load(tokens + place - back, mask=alive, other=-1) == wanted
                matched += alive.to(tl.int32)
                living = tl.max(alive.to(tl.int32), axis=0)
                back += 1
            score = tl.where(matched >= SHORTEST, (matched << _PLACE_BITS) + place + 1, 0)
            best = tl.maximum(best, tl.max(score, axis=0))
    candidates = tl.num_programs(1)
    tl.store(found + (request * candidates + candidate) * splits + split, best)


@triton.jit
def _token_at(tokens, references, stride, row, place, mask, SLOTS: tl.constexpr):
    of_slot = tl.load(tokens + row.to(tl.int64) * stride + place, mask=mask & (row < SLOTS), other=0)
    reference = references + (row - SLOTS).to(tl.int64) * stride + place
    return of_slot + tl.load(reference, mask=mask & (row >= SLOTS), other=0)


@triton.jit
def _kind(longest, votes, voters):
    lengths = (longest > 1).to(tl.int32) + (longest > 2).to(tl.int32) + (longest > 3).to(tl.int32)  # noqa: PLR2004
    lengths += (longest > 5).to(tl.int32) + (longest > 8).to(tl.int32) + (longest > 15).to(tl.int32)  # noqa: PLR2004
    return lengths * 3 + tl.where(voters == 1, 0, tl.where(votes * 3 < voters * 2, 1, 2))


@triton.jit(do_not_specialize=["candidates", "splits"])
def _choose_kernel(
    slot_tokens,
    slot_lengths,
    reference_tokens,
    reference_lengths,
    groups,
    members,
    slots,
    sampled,
    found,
    rates,  # float32 [kinds, steps]
    weights,  # float32 [slots]
    drafts,  # int64 [requests, steps]
    confidences,  # float32 [slots, steps]
    averages,  # float32 [slots, steps]
    forecasts,  # float32 [slots, steps]
    kinds,  # [slots]
    offered,  # [slots]
    stride,
    members_stride,
    candidates,
    splits,
    recent,  # share of the newest confidence in the average
    share,  # of a weight: one over the batch's mean
    SLOTS: tl.constexpr,
    STEPS: tl.constexpr,
    STEPS_PO2: tl.constexpr,
    CANDIDATES_PO2: tl.constexpr,
):
    """Draft from the longest match; among equally long ones each sequence votes for the next two tokens."""
    request = tl.program_id(0)
    slot = tl.load(slots + request).to(tl.int32)
    group = tl.load(groups + slot)
    index = tl.arange(0, CANDIDATES_PO2)
    best = tl.zeros([CANDIDATES_PO2], tl.int32)
    for split in range(splits):
        cell = found + (request * candidates + index) * splits + split
        best = tl.maximum(best, tl.load(cell, mask=index < candidates, other=0))
    longest = tl.max(best, axis=0) >> _PLACE_BITS
    equal = (best > 0) & ((best >> _PLACE_BITS) == longest)

    place = best & _PLACE
    row = tl.load(members + group * members_stride + index - 1, mask=equal & (index > 0), other=0)
    row = tl.where(index > 0, row, slot)
    length = tl.load(slot_lengths + row, mask=equal & (row < SLOTS), other=0)
    length += tl.load(reference_lengths + row - SLOTS, mask=equal & (row >= SLOTS), other=0)
    token = _token_at(slot_tokens, reference_tokens, stride, row, place, equal, SLOTS)
    after = _token_at(slot_tokens, reference_tokens, stride, row, place + 1, equal & (place + 1 < length), SLOTS)
    after = tl.where(place + 1 < length, after, -1)
    same = (token[:, None] == token[None, :]) & equal[None, :]
    votes = tl.sum(same.to(tl.int32), axis=1)
    votes_after = tl.sum((same & (after[:, None] == after[None, :])).to(tl.int32), axis=1)
    rank = tl.where(equal, (votes * 256 + votes_after) * 256 + 255 - index, 0)
    chosen = index == 255 - (tl.max(rank, axis=0) & 255)

    voters = tl.sum(equal.to(tl.int32), axis=0)
    votes = tl.sum(tl.where(chosen, votes, 0), axis=0)
    place = tl.sum(tl.where(chosen, place, 0), axis=0)
    length = tl.sum(tl.where(chosen, length, 0), axis=0)
    row = tl.sum(tl.where(chosen, row, 0), axis=0)

    step = tl.arange(0, STEPS_PO2)
    ahead = place + step
    if row == slot:  # its own text may repeat on and on: past its end the draft goes on with its own beginning
        ahead = place + step % tl.maximum(length - place, 1)
    matches = (longest > 0) & (tl.load(sampled + request) > 0)
    valid = (ahead < tl.where(matches, length, 0)) & (step < STEPS)
    row += tl.zeros([STEPS_PO2], tl.int32)
    draft = _token_at(slot_tokens, reference_tokens, stride, row, ahead, valid, SLOTS)
    end = tl.maximum(tl.load(slot_lengths + slot) - 1, 0)
    newest = tl.load(slot_tokens + slot.to(tl.int64) * stride + end)
    tl.store(drafts + request * STEPS + step, tl.where(valid, draft, newest).to(tl.int64), mask=step < STEPS)

    kind = _kind(longest, votes, voters)
    rate = tl.load(rates + kind * STEPS + step, mask=valid, other=0.0)
    # What is made of confidences is their products along a draft, so a weight on the first is one on all.
    weight = tl.where(step == 0, tl.load(weights + slot) * share, 1.0)
    tl.store(confidences + slot * STEPS + step, rate * weight, mask=step < STEPS)
    tl.store(kinds + slot, tl.where(matches, kind, -1))
    tl.store(offered + slot, tl.sum(valid.to(tl.int32), axis=0))
    average = tl.load(averages + slot * STEPS + step, mask=step < STEPS, other=0.0)
    average += recent * (rate - average)
    tl.store(averages + slot * STEPS + step, average, mask=step < STEPS)
    tl.store(forecasts + slot * STEPS + step, (average + rate) * 0.5 * weight, mask=step < STEPS)


@triton.jit
def _tally(tallies, kind, step, reached, accepted, KINDS: tl.constexpr, STEPS: tl.constexpr):
    cell = kind * STEPS + step
    tl.atomic_add(tallies + cell, reached.to(tl.int32), mask=reached)
    tl.atomic_add(tallies + KINDS * STEPS + cell, accepted.to(tl.int32), mask=accepted)


@triton.jit
def _observe_kernel(
    slots,
    sampled,
    logits,
    kinds,
    offered,
    tallies,  # [2, KINDS, steps]: reached by verification, accepted
    totals,  # int64 [2, steps]: verified, accepted
    groups,  # [slots]
    by_group,  # int64 [groups, 3]: drafts, drafted tokens, accepted tokens
    KINDS: tl.constexpr,
    STEPS: tl.constexpr,
    STEPS_PO2: tl.constexpr,
):
    """Count what became of each request's last draft: a step was reached if all steps before it were accepted."""
    request = tl.program_id(0)
    slot = tl.load(slots + request).to(tl.int32)
    got = tl.load(sampled + request)
    kind = tl.load(kinds + slot)
    verified = tl.load(logits + request + 1) - tl.load(logits + request) - 1
    verified = tl.where((got > 0) & (kind >= 0), tl.minimum(verified, tl.load(offered + slot)), 0)
    step = tl.arange(0, STEPS_PO2)
    reached = (step < verified) & (step < got)
    accepted = reached & (step < got - 1)
    _tally(tallies, kind, step, reached, accepted, KINDS, STEPS)
    one = tl.full([STEPS_PO2], 1, tl.int64)
    tl.atomic_add(totals + step, one, mask=step < verified)
    tl.atomic_add(totals + STEPS + step, one, mask=accepted)
    if verified > 0:
        group = by_group + tl.load(groups + slot) * 3
        tl.atomic_add(group, tl.full([], 1, tl.int64))
        tl.atomic_add(group + 1, verified.to(tl.int64))
        tl.atomic_add(group + 2, tl.sum(accepted.to(tl.int64), axis=0))


@triton.jit
def _compare_kernel(
    slot_tokens,
    slot_lengths,
    slots,
    begins,  # [requests] the length of each when its draft was made
    drafts,  # int64 [requests, steps]
    kinds,
    offered,
    tallies,
    seen,  # int64 [2]: drafts, tokens they had right
    stride,
    KINDS: tl.constexpr,
    STEPS: tl.constexpr,
    STEPS_PO2: tl.constexpr,
):
    """Count how far drafts that were not verified agree with what was sampled since."""
    request = tl.program_id(0)
    slot = tl.load(slots + request).to(tl.int32)
    kind = tl.load(kinds + slot)
    begin = tl.load(begins + request)
    step = tl.arange(0, STEPS_PO2)
    known = (begin + step < tl.load(slot_lengths + slot)) & (step < STEPS)
    drafted = known & (step < tl.where(kind >= 0, tl.load(offered + slot), 0))
    said = tl.load(drafts + request * STEPS + step, mask=drafted, other=-1)
    sampled = tl.load(slot_tokens + slot.to(tl.int64) * stride + begin + step, mask=drafted, other=-2)
    wrong = tl.min(tl.where(drafted & (said == sampled), STEPS_PO2, step), axis=0)
    reached = drafted & (step <= wrong)
    accepted = drafted & (step < wrong)
    _tally(tallies, kind, step, reached, accepted, KINDS, STEPS)
    if (kind > GONE) & (tl.sum(known.to(tl.int32), axis=0) > 0):
        tl.atomic_add(seen, tl.full([], 1, tl.int64))
        tl.atomic_add(seen + 1, tl.sum(accepted.to(tl.int64), axis=0))


@triton.jit(do_not_specialize=["requests", "budget"])
def _admit_kernel(
    confidences,  # float32 [slots, steps]
    slots,
    counts,  # [2, requests]: drafted tokens, others
    logits,  # [requests + 1]
    queries,  # [requests + 1]
    requests,
    budget,
    BONUS: tl.constexpr,
    STEPS: tl.constexpr,
    STEPS_PO2: tl.constexpr,
    REQUESTS_PO2: tl.constexpr,
    HIGHEST_BIT: tl.constexpr,
):
    """Find the score that so many drafted tokens reach; of those that just reach it the first are admitted."""
    request = tl.arange(0, REQUESTS_PO2)
    here = request < requests
    slot = tl.load(slots + request, mask=here, other=0)
    drafted = tl.load(counts + request, mask=here, other=0)
    others = tl.load(counts + requests + request, mask=here, other=0)
    step = tl.arange(0, STEPS_PO2)
    eligible = step[None, :] < drafted[:, None]
    confidence = tl.load(confidences + slot[:, None] * STEPS + step[None, :], mask=eligible, other=0.0)
    survival = tl.minimum(tl.cumprod(confidence, axis=1), 1.999)
    score = tl.where(eligible, 1 + (survival * (1 << HIGHEST_BIT)).to(tl.int32), 0)
    least = 0
    for place in range(HIGHEST_BIT + 1):
        higher = least + (1 << (HIGHEST_BIT - place))
        reached = tl.sum(tl.sum((score >= higher).to(tl.int32), axis=1), axis=0)
        least = tl.where(reached >= budget, higher, least)
    above = tl.sum((score > least).to(tl.int32), axis=1)
    level = tl.sum((score == least).to(tl.int32), axis=1)
    left = budget - tl.sum(above, axis=0) - (tl.cumsum(level, axis=0) - level)
    admitted = above + tl.minimum(level, tl.maximum(left, 0))
    tl.store(logits, 0)
    tl.store(queries, 0)
    tl.store(logits + 1 + request, tl.cumsum(tl.where(here, admitted + BONUS, 0), axis=0), mask=here)
    tl.store(queries + 1 + request, tl.cumsum(admitted + others, axis=0), mask=here)


@triton.jit
def _follow_kernel(
    drawn,  # int64 [logits]
    inputs,  # [logits]: the token that each row of logits was computed from
    logits,  # [requests + 1]
    tokens,  # int64 [requests, steps + 1]
    counts,  # [requests]
    STEPS: tl.constexpr,
    STEPS_PO2: tl.constexpr,
):
    request = tl.program_id(0)
    first = tl.load(logits + request)
    drafted = tl.load(logits + request + 1) - first - 1
    step = tl.arange(0, STEPS_PO2)
    got = tl.load(drawn + first + step, mask=step <= drafted, other=0)
    draft = tl.load(inputs + first + step + 1, mask=step < drafted, other=-1).to(tl.int64)
    last = tl.min(tl.where((step < drafted) & (got == draft), STEPS_PO2, step), axis=0)
    tl.store(tokens + request * (STEPS + 1) + step, got, mask=step <= last)
    tl.store(counts + request, last + 1)


def scan(tables: Tables, batch: Batch, found: torch.Tensor, *, shortest: int, longest: int) -> None:
    """Fill `found` [requests, candidates, splits] with the best match in each part of each candidate."""
    _scan_kernel[tuple(found.shape)](
        *tables,
        *batch[:2],
        found,
        tables.slot_tokens.stride(0),
        tables.members.stride(0),
        found.shape[2],
        SLOTS=tables.slot_tokens.shape[0],
        SHORTEST=shortest,
        LONGEST=longest,
        BLOCK=BLOCK,
        num_warps=4,
    )


class Choice(NamedTuple):
    """What `choose` writes; all but the drafts are by slot and live on from step to step."""

    drafts: torch.Tensor  # int64 [requests, steps]
    confidences: torch.Tensor  # float32 [slots, steps] chance of each token if all before it are right; first weighted
    averages: torch.Tensor  # float32 [slots, steps] of past confidences
    forecasts: torch.Tensor  # float32 [slots, steps] confidences to expect of the draft after this one, likewise
    kinds: torch.Tensor  # [slots] kind of the match, NO_MATCH or GONE
    offered: torch.Tensor  # [slots] drafted tokens


class Weights(NamedTuple):
    """What a token of each request is worth, against one of another."""

    by_slot: torch.Tensor  # float32 [slots]
    mean: float = 1.0  # of the requests that run


def choose(
    tables: Tables,
    batch: Batch,
    found: torch.Tensor,
    *,
    rates: torch.Tensor,
    weights: Weights,
    choice: Choice,
    recent: float,
) -> None:
    """Turn what `scan` found into drafts; `rates` float32 [KINDS, steps] gives each kind's confidences."""
    requests, candidates, splits = found.shape
    steps = choice.drafts.shape[1]
    _choose_kernel[(requests,)](
        *tables[:4],
        tables.groups,
        tables.members,
        *batch[:2],
        found,
        rates,
        weights.by_slot,
        *choice,
        tables.slot_tokens.stride(0),
        tables.members.stride(0),
        candidates,
        splits,
        recent,
        1 / weights.mean,
        SLOTS=tables.slot_tokens.shape[0],
        STEPS=steps,
        STEPS_PO2=triton.next_power_of_2(steps),
        CANDIDATES_PO2=triton.next_power_of_2(candidates),
        num_warps=2,
    )


class Totals(NamedTuple):
    """Counts since the engine's start, all int64."""

    by_place: torch.Tensor  # [2, steps]: drafted tokens that were verified, and those accepted
    by_group: torch.Tensor  # [groups, 3]: drafts verified, their tokens, and those accepted


def observe(batch: Batch, choice: Choice, tallies: torch.Tensor, totals: Totals, groups: torch.Tensor) -> None:
    """Count what this step made of the last drafts: in `tallies` [2, KINDS, steps], and for good in `totals`.

    `groups` [slots] is each slot's group.
    """
    steps = tallies.shape[2]
    _observe_kernel[(len(batch.slots),)](
        *batch,
        choice.kinds,
        choice.offered,
        tallies,
        totals.by_place,
        groups,
        totals.by_group,
        KINDS=KINDS,
        STEPS=steps,
        STEPS_PO2=triton.next_power_of_2(steps),
        num_warps=1,
    )


class Peeked(NamedTuple):
    """Drafts that were made to be compared only: whose they are, and how long each sequence was."""

    slots: torch.Tensor  # int64 [requests]
    begins: torch.Tensor  # [requests]


def compare(tables: Tables, peeked: Peeked, choice: Choice, tallies: torch.Tensor, seen: torch.Tensor) -> None:
    """Compare the drafts in `choice` with what was sampled since.

    Counted as `observe` does in `tallies`, as if all of them had been verified, and in `seen` int64 [2]: drafts, and
    their tokens that would have been accepted. A request without a match counts as a draft that says nothing.
    """
    steps = tallies.shape[2]
    _compare_kernel[(len(peeked.slots),)](
        *tables[:2],
        *peeked,
        choice.drafts,
        choice.kinds,
        choice.offered,
        tallies,
        seen,
        tables.slot_tokens.stride(0),
        KINDS=KINDS,
        STEPS=steps,
        STEPS_PO2=triton.next_power_of_2(steps),
        num_warps=1,
    )


def admit(
    confidences: torch.Tensor,
    slots: torch.Tensor,
    counts: torch.Tensor,
    budget: int,
    *,
    logits: torch.Tensor,
    queries: torch.Tensor,
    bonus: int,
) -> None:
    """Admit to verification the `budget` drafted tokens that are most likely to be kept.

    `confidences` float32 [slots, steps], at most 1.999 each; `slots` int64 [requests]; `counts` [2, requests]: how many
    tokens each has drafted, and what else it computes. Written: where each request's `logits` begin, `bonus` more than
    its admitted drafts, and where its tokens do in `queries`, both [at least requests + 1].
    """
    requests, steps = slots.shape[0], confidences.shape[1]
    _admit_kernel[(1,)](
        confidences,
        slots,
        counts,
        logits,
        queries,
        requests,
        budget,
        BONUS=bonus,
        STEPS=steps,
        STEPS_PO2=triton.next_power_of_2(steps),
        REQUESTS_PO2=max(16, triton.next_power_of_2(requests)),
        HIGHEST_BIT=SCORE_BITS,
        num_warps=4 if requests <= FEW_REQUESTS else 8,
    )


def follow(
    drawn: torch.Tensor, inputs: torch.Tensor, logits: torch.Tensor, steps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep of each request's drawn tokens those up to and with the first that is not its draft's.

    `drawn` int64 [logits], `inputs` [logits] the token each was computed from, `logits` [requests + 1] where each
    request's begin. Returns the tokens, int64 [requests, steps + 1], and how many of each row count, int32 [requests].
    """
    requests = len(logits) - 1
    tokens = drawn.new_empty(requests, steps + 1)
    counts = torch.empty(requests, dtype=torch.int32, device=drawn.device)
    size = triton.next_power_of_2(steps + 1)
    _follow_kernel[(requests,)](drawn, inputs, logits, tokens, counts, STEPS=steps, STEPS_PO2=size, num_warps=1)
    return tokens, counts
