"""What calls hold together until each has ended, against a plain count of every step."""

from __future__ import annotations

import random

import pytest

from seer_async.occupancy import Occupancy

from .hand import Hand
from .test_kit import peaceful


def held(calls: list[tuple[int, int]], step: int, now: int, slope: float) -> float:
    """Blocks at `step` of calls (end, blocks); one that should have ended before `now` may hold all it may."""
    overdue = sum(blocks for end, blocks in calls if end <= now)
    return overdue + sum(blocks - slope * (end - step) for end, blocks in calls if now < end and step <= end)


@pytest.mark.parametrize("seed", range(50))
def test_the_peak_is_that_of_a_count_of_every_step(seed: int) -> None:
    rng = random.Random(seed)
    slope = rng.choice([0.0, 1 / 16, 0.8 / 16, 1 / 32])
    occupancy, calls, now = Occupancy(), dict[int, tuple[int, int]](), 0
    for number in range(60):
        now += rng.randrange(10)
        end, blocks = now + rng.randint(1, 100), rng.randint(7, 40)
        known = list(calls.values())
        expected = max(held([*known, (end, blocks)], step, now, slope) for step in range(now + 1, end + 1))
        assert occupancy.peak_with(blocks, end, now, slope) == pytest.approx(expected)
        if rng.random() < 0.8:
            occupancy.add(number, blocks, end)
            calls[number] = end, blocks
        if calls and rng.random() < 0.4:
            gone = rng.choice(list(calls))
            occupancy.remove(gone)
            del calls[gone]


def test_an_overdue_call_counts_in_full_until_it_is_gone() -> None:
    occupancy = Occupancy()
    occupancy.add(1, 10, 100)
    assert occupancy.peak_with(10, 180, now=20, slope=0.1) == pytest.approx(12)
    assert occupancy.peak_with(10, 280, now=120, slope=0.1) == 20
    occupancy.remove(1)
    assert occupancy.peak_with(10, 280, now=120, slope=0.1) == 10


def test_more_calls_fit_where_they_end_one_after_the_other_and_none_is_preempted() -> None:
    """The same work on the same engines with little KV: more calls at once, sooner done, and no preemption."""
    (plain_s, plain_batch), (seconds, batch) = worked(0.0), worked(0.8)
    assert batch > 1.1 * plain_batch
    assert seconds < plain_s


def worked(stagger: float) -> tuple[float, float]:
    """Seconds that ten runs take, and the mean number of calls in flight."""
    seconds = busy = 0.0
    for seed in range(10):
        world = peaceful(seed=seed, blocks=50, chunk=64, mean=160.0, stagger=stagger)
        world.finish()
        assert sum(engine.preemptions for engine in world.engines.values()) == 0
        seconds += world.clock.now
        busy += sum(chunk.end - chunk.start for sample in world.samples.values() for chunk in sample.chunks)
    return seconds, busy / seconds


def test_first_chunks_differ_so_that_later_ones_do_not_end_together() -> None:
    hand = Hand(engine={"stagger": 0.8}, rollout={"chunk_size": 100}).groups("a", "b", n=4, limit=400).up()
    first = [call.max_tokens for call in hand.sent]
    assert len(set(first)) == len(first) == 8
    assert all(25 <= tokens <= 100 for tokens in first)
    hand.answer("a/0")
    assert hand.sent[-1].max_tokens == 100


def test_preemptions_cost_reliance_where_bounds_did_not_fit_together() -> None:
    hand = Hand(engine={"stagger": 0.8}, rollout={"chunk_size": 64}).groups("a", n=8, limit=400).up(blocks=20)
    instance = hand.core.instances["a"]
    hand.report("a", preemptions=0)
    capacity = instance.capacity
    instance._peak_reserved = capacity + 1  # as if more had been admitted than fits together
    hand.report("a", preemptions=1)
    assert instance.capacity == capacity
    hand.report("a", preemptions=2)
    assert instance.capacity < capacity
