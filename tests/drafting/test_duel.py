"""The duel keeps the faster side, tries the other now and then, and is not fooled by noise and drift."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

from seer_async.drafting.duel import COST, COUNTED, FIRST, LOOK, SETTLE, WARM_UP, Duel, Duels


def play(
    duel: Duel, steps: int, on: float, off: float, *, noise: float = 0.0, drift: float = 0.0, seed: int = 0
) -> float:
    """Steps that drafted, of `steps` whose true times are `on` and `off`; a step gives one token."""
    rng, drafted = random.Random(seed), 0
    for number in range(steps):
        drafting = duel.drafting
        drafted += drafting
        wait = (on if drafting else off) * (1 + drift * number) * rng.lognormvariate(0, noise)
        duel.step(drafted=drafting, wait=wait, tokens=1.0)
    return drafted / steps


def bursts(rng: random.Random, requests: int, mean: float) -> float:
    """Tokens of a request and step: a draft of eight is right or it is not."""
    return 1 + sum(8 for _ in range(requests) if rng.random() < (mean - 1) / 8) / requests


def speed(
    duel: Duel, steps: int, *, requests: int, costs: float, brings: float, noise: float = 0.1, seed: int = 0
) -> float:
    """How much faster than without drafts, if a step with drafts costs and brings so many times as much."""
    rng, time, tokens = random.Random(seed), 0.0, 0.0
    for _ in range(steps):
        drafting = duel.drafting
        wait = (costs if drafting else 1.0) * rng.lognormvariate(0, noise)
        got = bursts(rng, requests, brings) if drafting else 1.0
        duel.step(drafted=drafting, wait=wait, tokens=got)
        time += costs if drafting else 1.0
        tokens += got
    return tokens / time


@pytest.mark.parametrize("requests", [1, 2, 8, 64, 256])
def test_the_faster_side_stays(requests: int) -> None:
    assert play(Duel(requests), 20_000, on=0.8, off=1.0) > 0.93
    assert play(Duel(requests), 20_000, on=1.25, off=1.0) < 0.025


@pytest.mark.parametrize("requests", [1, 8, 64, 256])
@pytest.mark.parametrize("costs", [1.05, 1.15, 1.4, 2.0])
def test_a_short_run_loses_a_hundredth_at_most(requests: int, costs: float) -> None:
    """Nothing is ever right, so each drafted step is lost; even the first trial is in the account."""
    speeds = [speed(Duel(requests), 2_000, requests=requests, costs=costs, brings=1.0, seed=s) for s in range(10)]
    assert sum(speeds) / 10 > (0.99 if requests > 1 else 0.988), "what drafts bring to one request varies"


@pytest.mark.parametrize("requests", [1, 8, 64, 256])
def test_a_short_run_keeps_nine_tenths_of_a_gain(requests: int) -> None:
    speeds = [speed(Duel(requests), 2_000, requests=requests, costs=1.2, brings=1.2 * 1.3, seed=s) for s in range(20)]
    assert sum(speeds) / 20 > 1 + (0.9 if requests > 1 else 0.85) * 0.3


@pytest.mark.parametrize("loss", [0.03, 0.1, 0.4, 2.0])
def test_what_trials_cost_is_bounded(loss: float) -> None:
    steps = 50_000
    lost = play(Duel(64), steps, on=1 + loss, off=1.0) * loss
    assert lost < 1.2 * COST


def test_a_clear_loss_is_seen_in_a_few_steps() -> None:
    duel = Duel(64)
    assert play(duel, 300, on=1.5, off=1.0, noise=0.02) * 300 == pytest.approx(SETTLE + LOOK, abs=1)


def test_a_clear_win_is_seen_in_a_few_steps() -> None:
    """Half of a short rollout's steps would otherwise go by without the drafts that win."""
    duel = Duel(64, trusting=True)
    assert (1 - play(duel, 250, on=0.6, off=1.0, noise=0.02)) * 250 == pytest.approx(SETTLE + LOOK, abs=1)


def test_a_tie_is_no_win() -> None:
    assert play(Duel(8), 20_000, on=1.0, off=1.0) < 0.3


def test_noise_and_growing_contexts_do_not_fool_it() -> None:
    shares = [play(Duel(8), 8_000, on=1.1, off=1.0, noise=0.5, drift=1e-3, seed=seed) for seed in range(40)]
    assert sum(shares) / 40 < 0.2
    shares = [play(Duel(8), 8_000, on=0.8, off=1.0, noise=0.5, drift=1e-3, seed=seed) for seed in range(40)]
    assert sum(shares) / 40 > 0.8


def test_it_turns_when_things_change() -> None:
    duel = Duel(16)
    assert play(duel, 10_000, on=1.2, off=1.0) < 0.1
    assert play(duel, 20_000, on=0.6, off=1.0) > 0.8
    assert play(duel, 20_000, on=1.2, off=1.0) < 0.3


def test_steps_of_the_other_side_are_not_counted() -> None:
    duel = Duel(8)
    for _ in range(1000):
        duel.step(drafted=True, wait=1.0, tokens=1.0)
    assert not duel.drafting


def test_drafts_that_bring_less_are_noticed_at_once() -> None:
    """Long before the next trial is due: a step costs a fifth more, and brings half a token less than it did."""
    duel, drafted = Duel(64), 0
    for number in range(4_000):
        drafting = duel.drafting
        drafted += drafting and number >= 3_000
        brings = 1.0 if not drafting else 1.5 if number < 3_000 else 1.05
        duel.step(drafted=drafting, wait=1.2 if drafting else 1.0, tokens=brings)
    assert drafted < 200


def test_drafts_that_clearly_pay_no_more_end_without_a_trial() -> None:
    """The texts have changed: a step costs twice as much as one without drafts, and brings next to nothing."""
    duel = Duel(64)
    play_tokens(duel, 1_000, costs=2.0, brings=2.5)
    assert duel.drafting
    assert play_tokens(duel, 1_000, costs=2.0, brings=1.05) <= SETTLE + 2 * COUNTED


def play_tokens(duel: Duel, steps: int, *, costs: float, brings: float) -> int:
    """Steps that drafted."""
    drafted = 0
    for _ in range(steps):
        drafting = duel.drafting
        drafted += drafting
        duel.step(drafted=drafting, wait=costs if drafting else 1.0, tokens=brings if drafting else 1.0)
    return drafted


def test_a_trial_that_was_won_by_a_slow_machine_is_held_again_when_texts_change() -> None:
    """Steps without drafts took twice their time in the trial, so drafts seemed to need one token only."""
    duel, drafted = Duel(8), 0
    for number in range(3_000):
        drafting = duel.drafting
        drafted += drafting and number >= 300
        slow = 2.0 if number < 100 else 1.6
        wait = slow * 1.2 if drafting else 2.0 * slow if number < 100 else 1.0
        duel.step(drafted=drafting, wait=wait, tokens=(2.6 if number < 300 else 1.1) if drafting else 1.0)
    assert drafted < 100


def test_a_step_that_hangs_decides_nothing() -> None:
    """Something is compiled in the middle of a trial, for a hundred times a step: drafts are not to pay for it."""
    duel, count = Duel(8), 0
    for _ in range(1_000):
        drafting = duel.drafting
        count += drafting
        hangs = drafting and count % 12 == 0
        duel.step(drafted=drafting, wait=100.0 if hangs else 1.2 if drafting else 1.0, tokens=1.8 if drafting else 1.0)
    assert count > 0.9 * 1_000 - FIRST


def test_the_first_drafts_of_all_say_nothing() -> None:
    """Code and kernels are loaded while they are made."""
    duels, costs = Duels(), 0
    for _ in range(1_000):
        duel = duels.at(8)
        drafting = duel.drafting
        costs += drafting
        wait = 1.0 if not drafting else 3.0 if costs <= WARM_UP else 1.2
        duel.step(drafted=drafting, wait=wait, tokens=1.8 if drafting else 1.0)
    assert costs > 0.9 * 1_000 - FIRST


def test_a_trusting_start_drafts_until_it_has_lost() -> None:
    duels = Duels(trusting=True)
    assert duels.at(1).drafting
    assert play(duels.at(64), 2_000, on=1.2, off=1.0) < 0.1
    assert play(duels.at(8), 2_000, on=0.8, off=1.0) > 0.9


class TestGuess:
    def test_it_is_not_tried_where_it_would_not_pay(self) -> None:
        assert play(Duel(8, guess=lambda: 1.05), 4_000, on=1.2, off=1.0) == 0

    def test_it_is_tried_nevertheless_now_and_then(self) -> None:
        assert play(Duel(8, guess=lambda: 1.05), 10_000, on=0.7, off=1.0) > 0.4

    def test_a_good_one_is_followed_on_credit(self) -> None:
        """Drafting pays as soon as siblings have spoken; the purse is in debt from a trial before."""

        def drafted(guesses: Callable[[float], float | None]) -> int:
            now = [1.0]
            duel, count = Duel(8, guess=lambda: guesses(now[0])), 0
            for number in range(3_000):
                now[0] = 1.0 if number < 1_000 else 2.0
                drafting = duel.drafting
                count += drafting
                duel.step(drafted=drafting, wait=1.5 if drafting else 1.0, tokens=now[0] if drafting else 1.0)
            return count

        assert drafted(lambda brings: brings) > 0.85 * 2_000
        assert drafted(lambda _: None) < drafted(lambda brings: brings)

    def test_no_guess_is_a_reason_to_wait_for_the_purse_only(self) -> None:
        assert play(Duel(8, guess=lambda: None), 2_000, on=0.7, off=1.0) > 0.9


class TestBatchSizes:
    def test_they_are_told_apart(self) -> None:
        duels = Duels()
        for requests, on in ((64, 1.4), (4, 0.7)):
            play(duels.at(requests), 3_000, on=on, off=1.0)
        assert not duels.at(64).drafting
        assert duels.at(4).drafting
        assert duels.at(33) is duels.at(64)
        assert duels.at(32) is not duels.at(64)

    def test_they_pay_from_one_purse(self) -> None:
        """A batch that drains, again and again: each size is new, or was tried long ago."""
        duels, drafted, steps = Duels(), 0.0, 0
        for _ in range(10):
            for requests in (256, 128, 64, 32, 16, 8, 4, 2, 1):
                drafted += 300 * play(duels.at(requests), 300, on=1.5, off=1.0)
                steps += 300
        assert drafted * 0.5 < 1.5 * COST * steps

    def test_where_a_larger_batch_won_a_smaller_one_begins_with_drafts(self) -> None:
        duels = Duels()
        assert play(duels.at(64), 2_000, on=0.8, off=1.0) > 0.8
        assert duels.at(32).drafting
        assert not duels.at(8).drafting, "nothing is known of its neighbour"
        assert play(duels.at(32), 3_000, on=1.3, off=1.0) * 3_000 < FIRST + 3 * (SETTLE + COUNTED)

    def test_where_a_larger_batch_has_won_since_a_smaller_one_is_tried_again(self) -> None:
        """Even on credit: texts have changed. Without a win it waits for the purse, or for a guess."""

        def drafted(larger: float) -> float:
            duels = Duels(guess=lambda: 1.0)
            play(duels.at(64), 1_000, on=2.0, off=1.0)
            play(duels.at(32), 1_000, on=2.0, off=1.0)
            assert not duels.at(64).drafting
            play(duels.at(64), 6_000, on=larger, off=1.0)
            return play(duels.at(32), 500, on=0.7, off=1.0)

        assert drafted(0.7) > 0.8
        assert drafted(1.3) < 0.1

    def test_a_win_is_followed_once(self) -> None:
        duels = Duels(guess=lambda: 1.0)
        play(duels.at(32), 1_000, on=1.5, off=1.0)
        play(duels.at(64), 6_000, on=0.7, off=1.0)
        assert duels.at(64).drafting
        assert 0 < play(duels.at(32), 3_000, on=1.5, off=1.0) * 3_000 < SETTLE + COUNTED
