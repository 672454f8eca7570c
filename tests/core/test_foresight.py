"""What the policy `foresight` believes, and whom it therefore sends first."""

from typing import Any

import numpy as np

from seer_async.policies.foresight import Foresight

from .hand import Hand

LIMIT = 1000


def hand(**tree: Any) -> Hand:
    return Hand(scheduler={"policy": "foresight"}, rollout={"chunk_size": 100}, **tree)


def left(hand: Hand, group: str, generated: int) -> float:
    policy = hand.core.policy
    assert isinstance(policy, Foresight)
    return float(policy.remainders(hand.core.buffer.groups[group], [generated])[0])


def test_probes_start_first_and_have_no_privilege_then() -> None:
    it = hand().groups("a", "b", n=2, limit=LIMIT).up(seqs=3)
    assert it.running[:2] == ["a/0", "b/0"]
    assert it.running[2] == "a/1"
    it.answer("a/0")  # a long way to go still, and so have all others: 100 of 1000 tokens say little
    assert "b/1" in it.running


def test_a_finished_sibling_tells_what_is_left() -> None:
    it = hand().groups("a", "b", n=4, limit=LIMIT).up(seqs=2)
    it.answer("a/0", 40, finish="stop")
    assert left(it, "a", 0) < 120 < left(it, "b", 0)
    assert all(request.startswith("b") for request in it.running)


def test_a_probe_that_has_got_far_outranks_one_that_has_just_begun() -> None:
    it = hand().groups("a", "b", n=2, limit=LIMIT).up(seqs=2)
    for _ in range(4):
        it.answer("b/0")
        if "b/1" in it.running:
            break
    assert left(it, "b", 0) > left(it, "a", 0)


def test_what_has_been_generated_counts_against_a_request_until_it_outlives_its_siblings() -> None:
    it = hand().groups("a", n=8, limit=LIMIT).up(seqs=8)
    for index in range(4):
        it.answer(f"a/{index}", 90 + index, finish="stop")
    remainders = [left(it, "a", generated) for generated in (0, 40, 80)]
    assert remainders == sorted(remainders, reverse=True)
    assert 0 < left(it, "a", 200) < LIMIT - 200


def test_a_response_cut_off_at_the_limit_says_no_more_than_that_it_was_long() -> None:
    it = hand().groups("a", n=8, limit=100).up(seqs=8)
    it.answer("a/0", 100)
    assert it.samples["a/0"].finish_reason == "length"
    assert left(it, "a", 0) > 90


def test_remainders_are_within_the_limit() -> None:
    it = hand().groups("a", n=2, limit=LIMIT).up(seqs=2)
    generated = list(range(LIMIT))
    policy = it.core.policy
    assert isinstance(policy, Foresight)
    remainders = policy.remainders(it.core.buffer.groups["a"], generated)
    assert np.isfinite(remainders).all()
    assert (remainders >= 0).all()
    assert (remainders <= LIMIT - np.array(generated)).all()
