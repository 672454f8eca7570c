"""A random rollout for each seed: fleet, groups, options, policy and faults.

`python -m tests.core.scenario [lasting] SEED...` runs some, and prints a digest of all events and commands of each.
"""

import random
import sys
from typing import Any

import msgspec

from seer_async.config import resolve
from seer_async.core import Core
from seer_async.events import GroupAdded
from seer_async.policies import find_policy
from seer_async.request import Group, Request
from seer_async.testing import (
    FaultKind,
    Faults,
    LastingWorld,
    LinearCost,
    Mishap,
    Model,
    Reference,
    SimulatedEngine,
    VirtualClock,
    Wish,
    WishKind,
    World,
    random_faults,
)
from seer_async.types import EngineInfo, Prompt

from .tokens import byte_level_tokenizer

POLICIES = ["group-round-robin", "no-context", "oracle", "partial", "seer"]  # others only order work differently
LASTING_POLICIES = ["seer", "foresight", "no-context", "group-round-robin"]  # that need no lengths, and finish


class Scenario:
    """`world` is ready to run; `check` compares what came out of it with the reference."""

    policies = POLICIES

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(f"scenario {seed}")
        self.seed = seed
        self.divided_noise = rng.random() < 0.15  # engines that draw noise anew for each call
        self.says_versions = not self.divided_noise and rng.random() < 0.8
        self.tokenizer = byte_level_tokenizer() if rng.random() < 0.3 else None
        self.model = Model(
            vocab_size=self.tokenizer.get_vocab_size() if self.tokenizer else rng.choice([20, 1000]),
            mean_length=rng.choice([10, 40, 120]),
            sigma=rng.choice([0.3, 0.9]),
        )
        self.groups = self._groups()
        self.config = resolve(self._tree())
        clock = VirtualClock(seed)
        self.engines = self._engines(clock)
        self.world = self._world(clock)

    def _world(self, clock: VirtualClock) -> World:
        seed = self.seed
        return World(
            self.config,
            self.groups,
            self.engines,
            clock,
            seed=seed,
            faults=self._faults(),
            lengths=self._lengths() if find_policy(self.config.scheduler.policy).needs_lengths else None,
            tokenizer=self.tokenizer,
        )

    def run(self) -> None:
        self.world.finish()
        self.check()

    def check(self) -> None:
        world = self.world
        reference = Reference(
            self.model, self.config.sampling, tokenizer=self.tokenizer, position_seeds=not self.divided_noise
        )
        assert world.samples.keys() == self._asked_for()
        assert len({sample.seed for sample in world.samples.values()}) == len(world.samples)
        unbiased = world.core.policy.unbiased
        for sample in world.samples.values():
            assert unbiased or not sample.on_policy
            marked = self.config.rollout.mixed_versions == "mark" and not sample.on_policy
            reference.check(sample, world.audit.accounts[sample.id].group, world.versions, may_mix=marked)

    def _asked_for(self) -> set[str]:
        return {f"{g.prompt.id}/{i}" for g in self.groups for i in range(g.n)}

    def _groups(self) -> list[GroupAdded]:
        rng = self.rng
        groups = []
        forced = rng.random() < 0.2
        for number in range(rng.randint(1, 14)):
            limit = rng.choice([1, 20, 100, 250])
            n = rng.randint(1, 8)
            prompt = Prompt(
                id=f"g{number}", token_ids=[rng.randrange(1, self.model.vocab_size) for _ in range(rng.randint(1, 20))]
            )
            lengths = tuple(rng.randint(1, limit + 5) for _ in range(n)) if forced else None
            groups.append(GroupAdded(prompt=prompt, n=n, limit=limit, forced_lengths=lengths))
        return groups

    def _tree(self) -> dict[str, Any]:
        rng = self.rng
        limit = max(group.limit for group in self.groups)
        policy = self.policies[self.seed % len(self.policies)]
        chunk_size = rng.choice([0, 5, 10, 20, 60])
        whole = not chunk_size or not find_policy(policy).divided
        sampling: dict[str, Any] = {"max_tokens": limit, "logprobs": rng.choice([0, 0, 2])}
        if rng.random() < 0.3:
            sampling["min_tokens"] = rng.randint(0, min(limit, 20))
        if rng.random() < 0.3:
            sampling["stop_token_ids"] = rng.sample(range(1, self.model.vocab_size), 2)
        if rng.random() < 0.1:
            sampling["ignore_eos"] = True
        if self.tokenizer:
            sampling["stop"] = rng.choice([[], ["€"], ["éa", "bb"], ["b€a", " a"]])
            sampling["include_stop_str_in_output"] = rng.random() < 0.5
        return {
            "rollout": {
                "chunk_size": chunk_size,
                "mixed_versions": rng.choice(["restart", "restart", "mark"]),
                "max_attempts": rng.choice([2, 10]),
            },
            "sampling": sampling,
            "scheduler": {
                "policy": policy,
                "probes": rng.choice([0, 1, 1, 2]),
                "fairness": rng.choice([2, 8, 32]),
                "affinity": rng.choice([0.0, 0.25, 2.0]),
            },
            "engine": {
                "kv_fraction": rng.choice([1.0, 1.0, 0.8, 0.4]),
                "stagger": 0.8 * (self.seed % 2),  # not drawn: what came later must not change old seeds
                "max_in_flight": rng.choice([1, 4, 16, 64]),
                "chunk_timeout_s": 900.0 if whole else rng.choice([8.0, 30.0]),  # a queue of whole responses is slow
                "patience_s": rng.choice([4.0, 60.0]),
                "telemetry_s": rng.choice([0.3, 1.0]),
                "eject_after": rng.randint(1, 3),
                "eject_max_s": rng.choice([2.0, 30.0]),
            },
        }

    def _engines(self, clock: VirtualClock) -> list[SimulatedEngine]:
        rng = self.rng
        longest = max(len(g.prompt.token_ids or ()) + g.limit for g in self.groups)
        block = rng.choice([1, 4, 16])
        least = -(-longest // block) + 1  # one block is the engine's own
        scarce = rng.random() < 0.5
        capabilities = frozenset() if self.divided_noise else frozenset({"position_seeds", "continuation"})
        later = random.Random(f"engines of {self.seed}")  # what came later must not change the worlds of old seeds
        shares_prefixes, kv_pool = later.random() < 0.5, later.choice([None, "shm:one"])
        engines = []
        for number in range(rng.randint(1, 6)):
            info = EngineInfo(
                boot="",
                model="model",
                max_model_len=longest,
                block_size=block,
                num_blocks=least * (rng.randint(1, 3) if scarce else 100),
                max_num_seqs=rng.choice([None, 2, 16]),
                vocab_size=self.model.vocab_size,
                weight_version="v0",
                capabilities=capabilities,
                shares_prefixes=shares_prefixes,
                kv_pool=kv_pool,
                dialect="generate" if self.says_versions else "completions",
            )
            cost = LinearCost(base_s=rng.choice([0.01, 0.03]), prefill_token_s=0.0001)
            engines.append(SimulatedEngine(f"e{number}", info, clock, self.model, cost))
        return engines

    def _faults(self):
        rng = self.rng
        names = [engine.name for engine in self.engines]
        often = [FaultKind.KILL, FaultKind.PARTITION, FaultKind.SLOW, FaultKind.LIE, FaultKind.WEIGHTS]
        kinds = rng.sample(often, rng.randint(1, len(often))) * 3 + rng.sample(list(FaultKind), 2)
        odds = dict.fromkeys(Mishap, rng.choice([0.0, 0.01, 0.04]))
        if self.config.engine.chunk_timeout_s > 100:
            del odds[Mishap.HANG]  # it would only wait for the time-out
        return random_faults(
            self.seed,
            names,
            until=rng.choice([1.0, 4.0, 12.0]),
            count=rng.choice([0, 5, 15, 30]),
            kinds=kinds,
            odds=odds,
        )

    def _lengths(self) -> dict[str, int]:
        probe = Core(resolve({}), [], run="world", seed=self.seed)  # it alone derives seeds
        for group in self.groups:
            probe.handle(group, 0.0)
        return {
            request.id: self.model.length(request.group.prompt.token_ids or [], request.seed, "v0")
            for request in probe.buffer.requests.values()
        }


class Lasting(Scenario):
    """The same as a service: a core that lasts, groups that come late and are joined, clients that give up."""

    policies = LASTING_POLICIES

    def _world(self, clock: VirtualClock) -> World:
        return LastingWorld(
            self.config,
            [],
            self.engines,
            clock,
            seed=self.seed,
            faults=self._faults(),
            tokenizer=self.tokenizer,
            wishes=self._wishes(),
        )

    def check(self) -> None:
        super().check()
        core = self.world.core
        assert not core.buffer.groups
        for keeper in (core.context, core.policy):
            kept = [key for value in vars(keeper).values() if isinstance(value, dict | set) for key in value]
            assert not [key for key in kept if isinstance(key, Group | Request)], f"{keeper} remembers what is over"

    def _asked_for(self) -> set[str]:
        return set(self.world.audit.accounts)

    def _groups(self) -> list[GroupAdded]:
        return [msgspec.structs.replace(group, forced_lengths=None) for group in super()._groups()]

    def _engines(self, clock: VirtualClock) -> list[SimulatedEngine]:
        """Only the first is sure to hold every response: without it some are stranded."""
        engines = super()._engines(clock)
        for engine in engines[1:]:
            engine._info = msgspec.structs.replace(engine._info, max_model_len=engine._info.max_model_len // 2 + 1)
        return engines

    def _faults(self) -> Faults:
        """What befalls engines only; a service that has ended is not resumed."""
        faults = super()._faults()
        faults.timed = [
            each for each in faults.timed if each.kind not in {FaultKind.CRASH, FaultKind.DRAIN, FaultKind.ABORT}
        ]
        return faults

    def _wishes(self) -> list[Wish]:
        rng = random.Random(f"wishes {self.seed}")
        until = rng.choice([1.0, 4.0, 12.0])
        wishes = []
        for group in self.groups:
            for _ in range(rng.choice([1, 2, 6])):
                n = rng.randint(1, group.n)
                joining = msgspec.structs.replace(group, n=n)
                wishes.append(Wish(at=rng.uniform(0, until), kind=WishKind.SUBMIT, group=joining))
        whims = [
            Wish(
                at=rng.uniform(0, until),
                kind=rng.choice([WishKind.CANCEL, WishKind.HAND_BACK, WishKind.PAUSE, WishKind.HOLD]),
                engine=rng.choice(self.engines).name,
                count=rng.randint(1, 5),
                seconds=rng.choice([0.05, 0.5, 3.0]),
            )
            for _ in range(rng.choice([0, 3, 10]))
        ]
        return wishes + whims


def trace(seed: int, kind: type[Scenario] = Scenario) -> str:
    """Digest of all events and commands of a scenario."""
    scenario = kind(seed)
    scenario.run()
    return scenario.world.trace


if __name__ == "__main__":
    chosen = Lasting if sys.argv[1:2] == ["lasting"] else Scenario
    for argument in sys.argv[1 + (chosen is Lasting) :]:
        print(trace(int(argument), chosen))
