"""The duel keeps the faster side, tries the other now and then, and is not fooled by noise and drift."""

from __future__ import annotations

import random

import pytest

from seer_async.drafting.duel import COST, LONGEST, Duel


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


@pytest.mark.parametrize("requests", [1, 2, 8, 64, 256])
def test_the_faster_side_stays(requests: int) -> None:
    assert play(Duel(requests), 20_000, on=0.8, off=1.0) > 0.93
    assert play(Duel(requests), 20_000, on=1.25, off=1.0) < 0.07


@pytest.mark.parametrize("loss", [0.03, 0.1, 0.4, 2.0])
def test_what_trials_cost_is_bounded(loss: float) -> None:
    steps = 50_000
    lost = play(Duel(64), steps, on=1 + loss, off=1.0) * loss
    assert lost < 1.5 * max(COST, loss * 48 / LONGEST)


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
        duel.step(drafted=False, wait=1.0, tokens=1.0)
    assert duel.drafting


def test_drafts_that_bring_less_are_noticed_at_once() -> None:
    """Long before the next trial is due: a step costs a fifth more, and brings half a token less than it did."""
    duel, drafted = Duel(64), 0
    for number in range(4_000):
        drafting = duel.drafting
        drafted += drafting and number >= 3_000
        brings = 1.0 if not drafting else 1.5 if number < 3_000 else 1.05
        duel.step(drafted=drafting, wait=1.2 if drafting else 1.0, tokens=brings)
    assert drafted < 200
