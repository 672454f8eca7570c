"""What the policy `foresight` believes, and whom it therefore sends first."""

from typing import Any

import numpy as np
import pytest

from seer_async.belief import PRIOR, Belief, Evidence, Shape
from seer_async.policies.foresight import Foresight, evidence

from .hand import Hand

LIMIT = 1000
RARE = 0.1


def hand(**tree: Any) -> Hand:
    return Hand(scheduler={"policy": "foresight"}, rollout={"chunk_size": 100}, **tree)


def left(hand: Hand, group: str, generated: int) -> float:
    policy = hand.core.policy
    assert isinstance(policy, Foresight)
    known = hand.core.buffer.groups[group]
    return float(policy.belief.remainders(evidence(known), [generated], known.limit, RARE)[0])


def test_probes_start_first_and_have_no_privilege_then() -> None:
    it = hand().groups("a", "b", n=2, limit=LIMIT).up(seqs=3)
    assert it.running[:2] == ["a/0", "b/0"]
    assert it.running[2] == "a/1"
    it.answer("a/0", 20)  # a long way to go still, and so have all others: 20 of 1000 tokens say little
    assert "b/1" in it.running


def test_all_that_wait_are_taken_for_one_of_as_many_as_are_open() -> None:
    it = hand().groups("a", n=40, limit=LIMIT).up(seqs=40)
    policy = it.core.policy
    assert isinstance(policy, Foresight)

    def check(open_: int) -> None:
        assert (1 + open_) / 2 <= 1 / policy.chance <= 2 * (1 + open_)
        for request, key in policy._keys.items():
            assert key == -policy._left(request.group, [request])[0]

    check(40)
    it.groups("b", n=80, limit=LIMIT)
    check(120)
    for index in range(40):
        it.answer(f"a/{index}", 40 + index, finish="stop")
    check(80)
    policy.forget(it.core.buffer.groups["b"])
    it.groups("c", n=2, limit=LIMIT)
    check(2)


def test_remainders_are_exceeded_with_the_chance_that_was_asked_for() -> None:
    rng = np.random.default_rng(1)
    belief = Belief(100_000)
    lengths = np.exp(belief._top + PRIOR.centre + rng.normal(0, np.hypot(PRIOR.width, PRIOR.spread), 200_000))
    for generated in (0, 3_000, 10_000):
        alive = lengths[lengths > generated]
        for chance in (0.5, 0.1):
            remainder = belief.remainders(Evidence((), ()), [generated], 10**6, chance)[0]
            assert np.mean(alive > generated + remainder) == pytest.approx(chance, rel=0.15)


def test_a_finished_sibling_tells_what_is_left() -> None:
    it = hand().groups("a", "b", n=4, limit=LIMIT).up(seqs=2)
    it.answer("a/0", 40, finish="stop")
    assert left(it, "a", 0) < 200
    assert left(it, "b", 0) > 500
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
    generated = list(range(LIMIT))
    for limit in (LIMIT, LIMIT // 3):
        remainders = Belief(LIMIT).remainders(Evidence((), (5,)), generated, limit, RARE)
        assert np.isfinite(remainders).all()
        assert (remainders >= 0).all()
        assert (remainders <= np.maximum(limit - np.array(generated), 0) + 1e-6).all()


@pytest.mark.parametrize("spread", [0.15, 0.5])
def test_the_spread_within_groups_is_learned_though_the_short_ones_end_first(spread: float) -> None:
    """Every response has run for 300 tokens: what is longer is still going."""
    rng = np.random.default_rng(1)
    means = rng.normal(np.log(LIMIT) - 1.5, 0.6, 200)
    lengths = np.exp(means[:, None] + rng.normal(0, spread, (200, 8)))
    belief = Belief(LIMIT)
    belief.learn([_seen(row, 300) for row in lengths])
    assert belief.shape.spread == pytest.approx(spread, rel=0.45)
    assert belief.shape.centre == pytest.approx(-1.5, abs=0.26)
    assert belief.shape.width == pytest.approx(0.6, rel=0.3)


def _seen(lengths: Any, after: int) -> Evidence:
    ended = tuple(max(1, round(length)) for length in lengths if length <= after)
    return Evidence(ended, (after,) * (len(lengths) - len(ended)))


def test_little_evidence_moves_little() -> None:
    belief = Belief(LIMIT)
    belief.learn([Evidence((200,), ())])
    assert belief.shape == pytest.approx(PRIOR, abs=0.3)
    assert isinstance(belief.shape, Shape)


def test_a_run_in_which_siblings_differ_is_less_sure_of_them() -> None:
    alike, unlike = Belief(LIMIT), Belief(LIMIT)
    alike.learn([Evidence((base, base + 1, base + 2), ()) for base in range(20, 400, 10)])
    unlike.learn([Evidence((base, 3 * base, 9 * base), ()) for base in range(20, 100, 3)])
    one = Evidence((100, 110), ())
    assert alike.shape.spread < unlike.shape.spread
    left = [belief.remainders(one, [0], LIMIT, RARE)[0] for belief in (alike, unlike)]
    assert left[0] < 0.7 * left[1]


def test_a_higher_limit_takes_away_nothing_that_was_learned() -> None:
    it = hand().groups(*(f"g{number}" for number in range(12)), n=2, limit=LIMIT).up(seqs=25)
    for number in range(12):
        it.answer(f"g{number}/0", 30 + number, finish="stop")
        it.answer(f"g{number}/1", 30 + number, finish="stop")
    it.groups("before", limit=LIMIT)
    expected = left(it, "before", 0)
    assert expected < 0.5 * LIMIT
    it.groups("after", limit=60 * LIMIT)
    assert left(it, "before", 0) == pytest.approx(expected, rel=0.05)
    assert left(it, "after", 0) < 2 * LIMIT


def test_a_higher_limit_leaves_room_to_learn_what_is_far_below_it() -> None:
    seen = [Evidence((base, base + 1, base + 2), ()) for base in range(20, 60)]
    lower, higher = Belief(100), Belief(100)
    lower.learn(seen)
    higher.learn(seen)
    for limit in (1000, 100_000):
        higher.extend(limit)
        higher.learn(seen)
    likely = [belief.remainders(Evidence((), ()), [0], 100, RARE)[0] for belief in (lower, higher)]
    assert likely[1] == pytest.approx(likely[0], rel=0.25)  # the grid of centres is a quarter apart
    assert (higher.shape.width, higher.shape.spread) == (lower.shape.width, lower.shape.spread)


def test_a_run_teaches_the_policy_and_forgotten_groups_go_on_teaching() -> None:
    it = hand().groups(*(f"g{number}" for number in range(12)), n=2, limit=LIMIT).up(seqs=24)
    policy = it.core.policy
    assert isinstance(policy, Foresight)
    before = policy.belief.shape
    for number in range(12):
        it.answer(f"g{number}/0", 30 + number, finish="stop")
        it.answer(f"g{number}/1", 30 + number, finish="stop")
    assert policy.belief.shape != before
    for group in list(it.core.buffer.groups.values()):
        policy.forget(group)
    policy._learn()
    assert policy.belief.shape.spread < PRIOR.spread
