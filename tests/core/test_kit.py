"""The test kit itself: what is wrong with it would be blamed on the core, or hide what is wrong there."""

import statistics

import pytest

from seer_async.config import resolve
from seer_async.events import GroupAdded
from seer_async.testing import (
    Fault,
    FaultKind,
    Faults,
    LinearCost,
    Mishap,
    Model,
    SimulatedEngine,
    VirtualClock,
    Work,
    World,
    random_faults,
)
from seer_async.testing.model import EOS
from seer_async.types import ChunkReply, EngineInfo, Prompt, VersionSpan

PROMPT = [5, 6, 7]

# Clock


def test_time_goes_from_one_timer_to_the_next() -> None:
    clock = VirtualClock()
    seen: list[tuple[str, float]] = []
    clock.after(2.0, lambda: seen.append(("b", clock.now)))
    clock.after(1.0, lambda: clock.after(0.5, lambda: seen.append(("a", clock.now))))
    clock.after(1.2, lambda: seen.append(("never", clock.now))).cancel()
    while clock.step():
        pass
    assert seen == [("a", 1.5), ("b", 2.0)]


def test_what_is_due_together_comes_in_an_order_drawn_from_the_seed() -> None:
    def order(seed: int) -> list[int]:
        clock = VirtualClock(seed)
        seen: list[int] = []
        for n in range(10):
            clock.after(1.0, lambda n=n: seen.append(n))
        while clock.step():
            pass
        return seen

    assert order(1) == order(1) != order(2)
    assert sorted(order(1)) == list(range(10))


# Model


def generate(prefix: list[int], most: int, *, seed: int = 1, version: str = "v", **options: object):
    return Model().generate(prefix, prompt_len=len(PROMPT), seed=seed, version=version, max_tokens=most, **options)


def test_a_response_does_not_depend_on_its_cuts() -> None:
    whole = generate(PROMPT, 500, min_tokens=20, stop_token_ids=(3, 4))
    for size in (1, 2, 7):
        tokens: list[int] = []
        logprobs: list[float] = []
        finish = "length"
        while finish == "length":
            part = generate(PROMPT + tokens, size, min_tokens=20 - len(tokens), stop_token_ids=(3, 4))
            tokens, logprobs, finish = tokens + part.token_ids, logprobs + part.logprobs, part.finish_reason
        assert (tokens, logprobs) == (whole.token_ids, whole.logprobs)


def test_every_token_depends_on_prefix_seed_and_weights() -> None:
    base = generate(PROMPT, 20, ignore_eos=True).token_ids
    for other in (
        generate([5, 6, 8], 20, ignore_eos=True),
        generate(PROMPT, 20, ignore_eos=True, seed=2),
        generate(PROMPT, 20, ignore_eos=True, version="w"),
    ):
        assert sum(a == b for a, b in zip(base, other.token_ids, strict=True)) < 3
    foreign = generate([*PROMPT, base[0] + 1, *base[1:5]], 10, ignore_eos=True)
    assert foreign.token_ids != base[5:15]


def test_min_tokens_holds_back_every_end() -> None:
    model = Model(vocab_size=20, mean_length=2.0)
    for seed in range(50):
        response = model.generate(
            PROMPT, prompt_len=3, seed=seed, version="v", max_tokens=60, min_tokens=30, stop_token_ids=(7, 8)
        )
        ends = {EOS, 7, 8}
        assert not ends & set(response.token_ids[:30])
        assert response.token_ids[-1] in ends or len(response.token_ids) == 60
        assert not ends & set(response.token_ids[30:-1])


def test_lengths_are_heavy_tailed_and_alike_within_a_group() -> None:
    model = Model(mean_length=100.0, sigma=0.9, correlation=0.75)
    groups = [[model.length([group], seed, "v") for seed in range(8)] for group in range(1, 400)]
    lengths = sorted(length for group in groups for length in group)
    assert 85 < statistics.mean(lengths) < 115
    assert lengths[-len(lengths) // 100] > 4 * statistics.median(lengths)
    assert statistics.correlation([g[0] for g in groups], [statistics.mean(g[1:]) for g in groups]) > 0.6


# Engine


class Bench:
    """One engine with a step of exactly a second, and what it answers."""

    def __init__(self, *, blocks: int = 100, seqs: int | None = None, cost: LinearCost | None = None) -> None:
        self.clock = VirtualClock()
        info = EngineInfo(
            boot="", model="m", max_model_len=1000, block_size=10, num_blocks=blocks + 1, max_num_seqs=seqs
        )
        cost = cost or LinearCost(base_s=1.0, sequence_s=0.0, prefill_token_s=0.0)
        self.engine = SimulatedEngine("e", info, self.clock, Model(), cost)
        self.engine.start()
        self.answers: dict[str, tuple[float, ChunkReply | None]] = {}

    def submit(self, name: str, most: int = 10, *, prefix: list[int] = PROMPT, seed: int = 1) -> str | None:
        params = {
            "max_tokens": most,
            "seed": seed,
            "ignore_eos": True,
            "logprobs": 0,
            "extra_args": {"seer_prompt_len": 3},
        }

        def done(reply: ChunkReply | None) -> None:
            self.answers[name] = (self.clock.now, reply)

        return self.engine.submit(Work(name, prefix, params, done))

    def run(self, until: float = 1e9) -> None:
        waiting = [True]
        self.clock.after(until - self.clock.now, waiting.clear)
        while waiting:
            self.clock.step()

    def when(self, name: str) -> float:
        return self.answers[name][0]

    def reply(self, name: str) -> ChunkReply:
        reply = self.answers[name][1]
        assert reply is not None
        return reply


def test_a_step_gives_every_running_call_a_token() -> None:
    bench = Bench()
    bench.submit("a", 10)
    bench.run(until=4.0)
    bench.submit("b", 3)
    bench.run()
    assert (bench.when("a"), bench.when("b")) == (pytest.approx(10.0), pytest.approx(7.0))
    assert bench.reply("a").token_ids == generate(PROMPT, 10, ignore_eos=True, version="unknown").token_ids


def test_the_cost_model_sees_batch_and_context() -> None:
    bench = Bench(cost=LinearCost(base_s=1.0, sequence_s=0.5, context_token_s=0.0, prefill_token_s=0.1))
    bench.submit("a", 10)
    bench.submit("b", 10, seed=2)  # its prompt is cached
    bench.run()
    assert bench.when("b") == pytest.approx(0.3 + 10 * 2.0)
    assert bench.engine.stats().cached_tokens == 3
    assert bench.engine.stats().prompt_tokens == 6


def test_a_slow_engine_takes_longer_from_then_on() -> None:
    bench = Bench()
    bench.submit("a", 10)
    bench.run(until=4.0)
    bench.engine.slow_down(3.0)
    bench.run()
    assert bench.when("a") == pytest.approx(4 + 6 * 3.0)


def test_calls_beyond_the_seats_wait_in_the_engine() -> None:
    bench = Bench(seqs=1)
    bench.submit("a", 10)
    bench.submit("b", 5)
    stats = bench.engine.stats()
    assert (stats.running, stats.waiting) == (1, 1)
    bench.run()
    assert (bench.when("a"), bench.when("b")) == (pytest.approx(10.0), pytest.approx(15.0))


def test_the_youngest_is_preempted_when_memory_is_full_and_loses_no_token() -> None:
    bench = Bench(blocks=5)
    for n in range(3):
        bench.submit(f"{n}", 30, seed=n)  # 33 tokens each, where 50 fit
    bench.run(until=10.0)
    assert bench.engine.stats().kv_used == pytest.approx(39 / 50)
    bench.run()
    assert bench.engine.stats().preemptions >= 2
    assert bench.when("0") == pytest.approx(30.0)
    for n in range(3):
        expected = generate(PROMPT, 30, ignore_eos=True, version="unknown", seed=n).token_ids
        assert bench.reply(f"{n}").token_ids == expected


def test_calls_whose_bounds_fit_are_never_preempted() -> None:
    bench = Bench(blocks=8)
    for n in range(2):
        bench.submit(f"{n}", 37, seed=n)  # 40 tokens each, which is all there is
    bench.run()
    assert bench.engine.stats().preemptions == 0


def test_a_call_that_can_never_fit_is_refused() -> None:
    assert "more than the engine holds" in (Bench(blocks=2).submit("a", 18) or "")
    assert Bench(blocks=2).submit("a", 17) is None


def test_new_weights_sample_every_token_after_them() -> None:
    bench = Bench()
    bench.submit("a", 10)
    bench.run(until=4.5)
    bench.engine.update_weights("new")
    bench.run()
    reply = bench.reply("a")
    assert reply.versions == (VersionSpan("unknown", 0, 4), VersionSpan("new", 4, 10))
    before = generate(PROMPT, 4, ignore_eos=True, version="unknown").token_ids
    assert reply.token_ids == before + generate(PROMPT + before, 6, ignore_eos=True, version="new").token_ids


def test_a_killed_engine_answers_nothing_and_forgets_everything() -> None:
    bench = Bench(seqs=1)
    bench.submit("a", 10)
    bench.submit("b", 10)
    bench.run(until=3.0)
    boot = bench.engine.boot
    bench.engine.kill()
    assert bench.answers == {"a": (3.0, None), "b": (3.0, None)}
    bench.engine.start()
    assert bench.engine.boot != boot
    assert bench.engine.stats().generated_tokens == 0
    bench.run()
    assert bench.when("a") == 3.0


def test_an_aborted_call_gives_its_room_back() -> None:
    bench = Bench(seqs=1)
    bench.submit("a", 10)
    bench.submit("b", 5)
    bench.run(until=4.0)
    bench.engine.abort("a")
    bench.run()
    assert bench.when("b") == pytest.approx(9.0)
    assert "a" not in bench.answers
    assert bench.engine.stats().generated_tokens == 9


# World


def peaceful(
    policy: str = "seer",
    *,
    faults: Faults | None = None,
    seed: int = 0,
    blocks: int = 40,
    chunk: int = 16,
    mean: float = 60.0,
    stagger: float = 0.8,
) -> World:
    config = resolve(
        {"rollout": {"chunk_size": chunk}, "scheduler": {"policy": policy}, "engine": {"stagger": stagger}}
    )
    clock = VirtualClock(seed)
    info = EngineInfo(
        boot="",
        model="m",
        max_model_len=300,
        block_size=16,
        num_blocks=blocks,
        capabilities=frozenset({"position_seeds"}),
    )
    engines = [SimulatedEngine(name, info, clock, Model(mean_length=mean)) for name in ("x", "y")]
    groups = [GroupAdded(prompt=Prompt(id=f"g{n}", token_ids=[n + 1] * 20), n=4, limit=200) for n in range(8)]
    return World(config, groups, engines, clock, seed=seed, faults=faults)


def test_in_peace_nothing_is_sent_twice_and_nothing_is_preempted() -> None:
    world = peaceful()
    world.finish()
    chunks = sum(len(sample.chunks) for sample in world.samples.values())
    assert world.audit.seen["Dispatch"] == world.audit.seen["Record"] == chunks
    assert world.lives == 1
    assert sum(engine.preemptions for engine in world.engines.values()) == 0


def test_whole_responses_in_the_engines_queue_are_preempted() -> None:
    world = peaceful("group-round-robin")
    world.finish()
    assert sum(engine.preemptions for engine in world.engines.values()) > 0


def test_a_dead_orchestrator_is_followed_by_another_on_the_same_journal() -> None:
    world = peaceful()
    world.crash(60)
    world.finish()
    assert world.lives == 2
    assert world.audit.seen["Restored"] > 0
    assert {key: s.token_ids for key, s in world.samples.items()} == {
        key: s.token_ids for key, s in finished(peaceful()).samples.items()
    }


def finished(world: World) -> World:
    world.finish()
    return world


@pytest.mark.parametrize("kind", list(FaultKind))
def test_every_kind_of_fault_happens(kind: FaultKind) -> None:
    calm = finished(peaceful())
    engine = "x" if kind in {FaultKind.KILL, FaultKind.SLOW, FaultKind.PARTITION, FaultKind.LIE} else None
    fault = Fault(at=0.5, kind=kind, engine=engine, seconds=4.0, factor=30.0)
    world = finished(peaceful(faults=Faults([fault])))
    assert world.trace != calm.trace
    assert world.samples.keys() == calm.samples.keys()


@pytest.mark.parametrize("mishap", list(Mishap))
def test_every_kind_of_mishap_happens(mishap: Mishap) -> None:
    fault = Fault(at=0.4, kind=FaultKind.KILL, engine="x", seconds=1.0)  # something to cancel, for the deaf
    calm = finished(peaceful(faults=Faults([fault]), stagger=0.0))
    world = finished(peaceful(faults=Faults([fault], {mishap: 0.2}), stagger=0.0))
    assert world.trace != calm.trace
    assert world.samples.keys() == calm.samples.keys()


def test_a_schedule_of_faults_is_drawn_from_its_seed() -> None:
    def draw(seed: int) -> list[Fault]:
        return random_faults(seed, ["x", "y"], until=10.0, count=9, kinds=list(FaultKind), odds={}).timed

    assert draw(1) == draw(1) != draw(2)
    assert all(0 <= fault.at <= 10.0 for fault in draw(1))
