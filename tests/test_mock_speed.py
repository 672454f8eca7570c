"""The mock's speed and KV memory: monotone, within bounds, and every job ends once."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seer_servers.mock import KV, Speed
from seer_servers.mock.speed import Job, PrefixCache, Simulation


def lone_seconds(job, speed, kv=KV()):  # noqa: B008 - it is immutable
    simulation = Simulation(speed, kv)
    simulation.add(job)
    simulation.advance(0.0)
    return simulation.next_event()


def test_a_lone_job_takes_its_prefill_and_its_steps():
    speed = Speed(step_ms=10, per_request_ms=1, prefill_rate=1000)
    assert lone_seconds(Job(500, 100), speed) == pytest.approx(0.5 + 100 * 0.011)
    assert lone_seconds(Job(500, 100, cached=400), speed) == pytest.approx(0.1 + 100 * 0.011)


def test_at_time_scale_zero_a_job_is_done_at_once():
    simulation = Simulation(Speed(time_scale=0), KV())
    job = Job(500, 100)
    simulation.add(job)
    assert simulation.advance(0.0) == [job]


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 500), st.integers(1, 500))
def test_more_work_never_ends_sooner(batch, more, length, longer):
    def seconds(size, tokens):
        simulation = Simulation(Speed(), KV(num_blocks=1_000_000))
        for _ in range(size):
            simulation.add(Job(10, tokens))
        simulation.advance(0.0)
        return simulation.next_event()

    assert seconds(batch, length) < seconds(batch + more, length)
    assert seconds(batch, length) < seconds(batch, length + longer)


def test_a_large_batch_is_slower_per_request_and_faster_in_all():
    def rate(size):
        simulation = Simulation(Speed(prefill_rate=1e9), KV(num_blocks=1_000_000))
        for _ in range(size):
            simulation.add(Job(10, 100))
        simulation.advance(0.0)
        return 100 / simulation.next_event()

    assert rate(200) < rate(1)
    assert 200 * rate(200) > 50 * rate(1)


@settings(max_examples=200, deadline=None)
@given(
    jobs=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 100), st.floats(0, 0.5)), min_size=1, max_size=30),
    removals=st.sets(st.integers(0, 29)),
    steps=st.lists(st.floats(0.001, 0.3), min_size=1, max_size=20),
)
def test_jobs_end_once_within_the_memory_and_never_lose_tokens(jobs, removals, steps):
    kv = KV(num_blocks=10, block_size=16, max_num_seqs=8)
    simulation = Simulation(Speed(prefill_rate=5000), kv)
    now, ended, alive, progress = 0.0, [], {}, {}
    for n, (size, length, gap) in enumerate(jobs):
        now += gap
        ended += simulation.advance(now)
        job = Job(size, length)
        alive[job] = n
        simulation.add(job)
        ended += simulation.advance(now)
        for job, order in list(alive.items()):
            assert progress.get(job, 0) <= simulation.generated(job) <= job.length
            progress[job] = simulation.generated(job)
            if order in removals and job not in ended:
                simulation.remove(job)
                assert simulation.generated(job) == progress[job]
                del alive[job]
        assert simulation.used <= kv.capacity + 1e-3
        assert simulation.used == pytest.approx(
            sum(job.held + simulation._steps - job.entered for job in simulation.running)
        )
        assert len(simulation.running) <= kv.max_num_seqs
        assert not simulation.running.keys() & simulation.waiting.keys()
    while (due := simulation.next_event()) is not None:
        now = max(now, due) + steps[len(ended) % len(steps)]
        ended += simulation.advance(now)
    assert len(set(ended)) == len(ended)
    assert set(ended) == set(alive)
    assert not simulation.waiting
    assert all(simulation.generated(job) == job.length for job in ended)


def test_growth_beyond_the_memory_preempts_the_youngest():
    simulation = Simulation(Speed(step_ms=10, per_request_ms=0, prefill_rate=1e9), KV(num_blocks=10, block_size=10))
    old, young, late = Job(20, 60), Job(20, 60), Job(50, 10)
    for job in (old, young, late):
        simulation.add(job)
    simulation.advance(0.0)
    assert (list(simulation.running), list(simulation.waiting)) == ([old, young], [late])
    simulation.advance(0.31)  # 2 x (20 + 30) tokens fill the 100
    assert (list(simulation.running), list(simulation.waiting)) == ([old], [young, late])
    assert (simulation.preemptions, simulation.generated(young)) == (1, 30)
    assert simulation.recomputed == 20 + 30
    assert simulation.advance(0.601) == [old]
    assert (list(simulation.running), list(simulation.waiting)) == ([young], [late])
    assert simulation.advance(1.1) == [young, late]


def test_a_response_that_turns_out_shorter_ends_sooner():
    simulation = Simulation(Speed(step_ms=10, per_request_ms=0, prefill_rate=1e9), KV())
    job = Job(10, 100)
    simulation.add(job)
    simulation.advance(0.205)
    simulation.resize(job, 50)
    assert simulation.advance(0.495) == []
    assert simulation.advance(0.505) == [job]


def test_the_prefix_cache_knows_whole_prefixes_by_salt_until_memory_runs_out():
    cache = PrefixCache(KV(num_blocks=4, block_size=16))
    cache.store("a", 1, 40)
    assert cache.lookup("a", 1, 40) == 32
    assert cache.lookup("b", 1, 40) == 0
    cache.store("a", 2, 40)
    assert cache.lookup("a", 1, 40) == 0
    assert (cache.queries, cache.hits) == (120, 32)
