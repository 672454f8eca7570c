"""The budget and what it learns from: steps whose cost is known, drafts whose chances are known."""

from __future__ import annotations

import random

import numpy as np
import pytest

from seer_async.drafting.acceptance import Acceptance
from seer_async.drafting.budget import FEW, OFF_AFTER, TRY_EVERY, Budget
from seer_async.drafting.steptime import Profile, StepTime


def taught(cost, batches, drafts=range(0, 40, 5), rounds=40, noise=0.0, profile=None):
    times = StepTime(profile)
    rng = random.Random(0)
    for _ in range(rounds):
        for batch in batches:
            for n in drafts:
                times.learn(batch, n, cost(batch, n) * (1 + rng.uniform(-noise, noise)))
    return times


def machine(batch, n):
    """A step like those of a small model on a core."""
    return 30 + 1.2 * (batch + n) + 0.4 * n + 2 * (n > 0)


class TestStepTime:
    @pytest.mark.parametrize("batch", [1, 4, 16, 64])
    def test_it_learns_what_a_step_costs(self, batch):
        cost = taught(machine, [batch], noise=0.1).cost(batch)
        for n in (0, 1, 10, 30):
            assert cost.of(n) == pytest.approx(machine(batch, n), rel=0.06)

    def test_before_the_first_step_it_says_what_the_profile_says(self):
        cost = StepTime(Profile.fit([(1, 11), (2, 12), (64, 74)])).cost(4)
        assert [cost.of(n) for n in range(3)] == pytest.approx([14, 15, 16])

    def test_it_forgets(self):
        times = taught(machine, [4])
        for _ in range(600):
            times.learn(4, 0, 90)
            times.learn(4, 8, 99)
        assert [times.cost(4).of(n) for n in (0, 8)] == pytest.approx([90, 99], rel=0.03)

    def test_a_step_that_was_held_up_counts_little(self):
        times = taught(machine, [4])
        before = times.cost(4).none
        times.learn(4, 0, 10_000)
        assert times.cost(4).none < 1.05 * before

    def test_drafts_never_seem_to_make_a_step_shorter(self):
        cost = taught(lambda _, n: 50 - n, [8]).cost(8)
        assert 0 < cost.none <= cost.some
        assert cost.each >= 0


def test_what_many_drafts_cost_is_found_out_step_by_step():
    """Before anything is known of drafts they seem to cost next to nothing."""
    budget, drafted = Budget(StepTime(Profile(20, 0.1))), []
    for _ in range(4):
        assert budget.wants_drafts(64)
        drafted.append(sum(budget.allot([[0.9, 0.8]] * 64, [1.0] * 64)))
        budget.times.learn(64, drafted[-1], 26.4 + 0.1 * drafted[-1])
    assert drafted == [FEW, 2 * FEW, 4 * FEW, 8 * FEW]


class TestAcceptance:
    def test_it_learns_by_match_and_share(self):
        acceptance = Acceptance()
        rng = random.Random(1)
        for _ in range(3000):
            acceptance.observe(1, [0.4], rng.random() < 0.1)
            acceptance.observe(20, [1.0], rng.random() < 0.9)
        assert acceptance.probability(1, 0.4) == pytest.approx(0.1, abs=0.05)
        assert acceptance.probability(20, 1.0) == pytest.approx(0.9, abs=0.05)

    def test_only_what_was_verified_counts(self):
        acceptance = Acceptance()
        before = acceptance.probability(4, 1.0)
        for _ in range(100):
            acceptance.observe(2, [1.0, 1.0, 1.0], 0)  # the second and third were never looked at
        assert acceptance.probability(2, 1.0) < 0.1
        assert acceptance.probability(4, 1.0) == before

    def test_survival_falls_along_a_path(self):
        chances = Acceptance().survival(3, [0.9, 0.9, 0.45, 0.45])
        assert all(0 < b < a <= 1 for a, b in zip([1.0, *chances], chances, strict=False))
        assert len(chances) == 4


class TestBudget:
    def expected_rate(self, survival, counts, batch):
        worth = batch + sum(sum(path[:count]) for path, count in zip(survival, counts, strict=True))
        return worth / machine(batch, sum(counts))

    def drawn(self, rng, batch):
        return [list(np.cumprod([rng.uniform(0.2, 1) for _ in range(rng.randrange(9))])) for _ in range(batch)]

    @pytest.mark.parametrize("batch", [1, 2, 5, 12])
    def test_no_other_choice_is_faster(self, batch):
        rng = random.Random(batch)
        times = taught(machine, [batch])
        for _ in range(20):
            budget = Budget(times)
            budget.wants_drafts(4)
            survival = self.drawn(rng, batch)
            best = self.expected_rate(survival, budget.allot(survival, [1.0] * batch), batch)
            for _ in range(60):
                other = [rng.randint(0, len(path)) for path in survival]
                assert self.expected_rate(survival, other, batch) <= best * 1.03  # the margin, and a fitted model

    def test_a_full_batch_drafts_less_than_a_lone_request(self):
        path = [0.5, 0.25, 0.12]
        lone = Budget(taught(machine, [1]))
        full = Budget(taught(machine, [64], drafts=range(0, 200, 20)))
        lone.wants_drafts(1), full.wants_drafts(64)
        assert lone.allot([path], [1.0]) == [3]
        assert sum(full.allot([path] * 64, [1.0] * 64)) == 0

    def test_the_urgent_go_first(self):
        budget = Budget(taught(machine, [16], drafts=range(0, 60, 6)))
        budget.wants_drafts(4)
        counts = budget.allot([[0.5, 0.3]] * 16, [2.0] * 4 + [1.0] * 12)
        assert min(counts[:4]) > max(counts[4:])

    def test_it_switches_itself_off_and_tries_again(self):
        budget = Budget(taught(lambda batch, n: 10 + 100 * n, [4]))
        drafted = []
        for _ in range(OFF_AFTER):
            assert budget.wants_drafts(4)
            drafted.append(sum(budget.allot([[0.3]] * 4, [1.0] * 4)))
        assert sum(drafted) == 0
        assert budget.off
        assert budget.switch_offs == 1
        tries = [budget.wants_drafts(4) for _ in range(4 * TRY_EVERY)]
        assert sum(tries) == 4
        while not budget.wants_drafts(4):
            pass
        assert sum(budget.allot([[0.3]] * 4, [1.0] * 4)) == 1, "a try costs as little as it can"

    def test_it_comes_back_when_it_pays(self):
        budget = Budget(taught(machine, [1]))
        for _ in range(OFF_AFTER):
            budget.wants_drafts(4)
            budget.allot([[]], [1.0])
        assert budget.off
        while not budget.wants_drafts(4):
            pass
        assert budget.allot([[0.9, 0.8]], [1.0]) == [2]
        assert not budget.off

    def test_the_clock_has_the_last_word(self):
        """Whatever the model believes: where steps with drafts are no faster, there are none, but for trials."""
        for pays in (True, False):
            budget, allowed = Budget(StepTime(Profile(30, 0.1))), 0
            for _ in range(4000):
                if drafting := budget.wants_drafts(16):
                    budget.allot([[0.8, 0.6]] * 16, [1.0] * 16)
                allowed += drafting
                budget.learn(16, 20 * drafting, 30 if drafting else 16, (50 if pays else 90) if drafting else 40)
            assert (allowed > 3500) if pays else (allowed < 700)
            assert budget.off != pays

    def test_while_it_is_off_it_looks_whether_drafts_would_pay(self):
        """Other texts, or siblings that were not there before: it does not wait until a trial is due."""
        budget, looks, since = Budget(StepTime(Profile(30, 0.1))), 0, 0
        for step in range(2000):
            pays = step >= 1000
            looked = budget.wants_drafts(4)
            counts = budget.allot([[0.8, 0.6] if pays else [0.1, 0.01]] * 4, [1.0] * 4) if looked else [0]
            looks += looked and 500 <= step < 1000
            since += step >= 1200 and not any(counts)
            budget.learn(4, sum(counts), 4 + sum(counts) * (0.7 if pays else 0.05), 40 if any(counts) else 30)
        assert 20 < looks < 80
        assert since < 100

    def test_each_batch_size_has_its_own_duel(self):
        budget = Budget(StepTime(Profile(30, 0.1)))
        for _ in range(1000):
            for batch, slow in ((1, 35), (16, 90)):
                drafting = budget.wants_drafts(batch)
                budget.learn(batch, batch * drafting, batch * (1 + drafting), slow if drafting else 30)
        assert budget.wants_drafts(1)
        assert not budget.wants_drafts(16)
