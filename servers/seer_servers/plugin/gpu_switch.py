"""Whether drafting pays at a batch size, found out by trying: the scheduler's switch of a Model Runner V2 engine.

Even drafts that are never verified cost: the scheduler keeps places for them, the drafter runs, the sampler takes
another path. So for each batch size (by powers of two) steps with and without drafts are timed in turn, and what was
faster stays, for longer and longer while trials agree. With drafting off, the engine takes the path it takes without
speculation.

The measure is the time that one request waits for one token: a step's time times its requests, over the step's tokens.
Steps that mainly prefill, and the time an engine is idle, are left out.
"""

import time
from collections import deque
from collections.abc import Collection
from statistics import median
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler

from seer_servers.plugin.patching import Function, Patch

WINDOW = 8  # steps whose time is taken together
WINDOWS = 16  # the latest ones are compared, by their median
SETTLE = 4  # steps under way when the switch turns
TRIAL = SETTLE + 96  # steps
PATIENCE = 1024  # steps before the other way is tried again; doubled while trials agree
MAX_PATIENCE = 8192
FEW_PREFILLED = 8  # one token in so many may be of a prompt

UPDATE = ("self", "scheduler_output", "model_runner_output")


class Duel:
    """Drafting against not drafting, at one batch size."""

    def __init__(self) -> None:
        self.drafting = True
        self._waits: dict[bool, deque[float]] = {True: deque(maxlen=WINDOWS), False: deque(maxlen=WINDOWS)}
        self._trying = True
        self._patience = PATIENCE
        self._left, self._settle = TRIAL, SETTLE
        self._steps, self._wait, self._tokens = 0, 0.0, 0.0

    def step(self, *, drafted: bool, wait: float, tokens: float) -> None:
        """Count a step: `wait` seconds, `tokens` for each request."""
        if drafted != self.drafting:
            return  # it was under way when the switch turned
        self._left -= 1
        self._settle -= 1
        if self._settle < 0:
            self._steps, self._wait, self._tokens = self._steps + 1, self._wait + wait, self._tokens + tokens
            if self._steps == WINDOW:
                self._waits[self.drafting].append(self._wait / self._tokens)
                self._steps, self._wait, self._tokens = 0, 0.0, 0.0
        if self._left <= 0:
            self._turn()

    def _turn(self) -> None:
        if self._trying and all(self._waits.values()):
            best = median(self._waits[True]) < median(self._waits[False])
            agrees = best != self.drafting  # the one that was not on trial has won again
            self._patience = min(self._patience * 2, MAX_PATIENCE) if agrees else PATIENCE
            self._trying, self.drafting = False, best
            self._restart(self._patience)
        else:
            self._trying, self.drafting = True, not self.drafting
            self._waits[self.drafting].clear()
            self._restart(TRIAL)

    def _restart(self, steps: int) -> None:
        self._left, self._settle = steps, SETTLE
        self._steps, self._wait, self._tokens = 0, 0.0, 0.0


class Switch:
    """What the scheduler looks up: how many tokens to draft for each request of a batch."""

    def __init__(self, most: int, step_tokens: int) -> None:
        self._most, self._step_tokens = most, step_tokens
        self._duels: dict[int, Duel] = {}
        self._last: tuple[float, frozenset[str]] = (0.0, frozenset())

    def __getitem__(self, requests: int) -> int:
        """Tokens to draft for each of `requests`."""
        if not self.duel(requests).drafting:
            return 0
        return max(0, min(self._most, self._step_tokens // requests - 1))

    def duel(self, requests: int) -> Duel:
        """The duel at this batch size."""
        size = (requests - 1).bit_length()
        if size not in self._duels:
            self._duels[size] = Duel()
        return self._duels[size]

    def ended(self, requests: Collection[str], *, drafted: int, scheduled: int, sampled: int, now: float) -> None:
        """Count a step that ended at `now` [s]: tokens drafted for it, scheduled in it and sampled by it."""
        (then, before), self._last = self._last, (now, frozenset(requests))
        prefilled = scheduled - drafted - len(requests)
        if sampled and prefilled * FEW_PREFILLED <= scheduled and not before.isdisjoint(requests):
            self.duel(len(requests)).step(drafted=drafted > 0, wait=now - then, tokens=sampled / len(requests))


def patches() -> tuple[Patch, ...]:
    """Patches for the scheduler of an engine that drafts."""
    return (
        Patch(Scheduler, "schedule", ("self", "throttle_prefills"), _around_schedule),
        Patch(Scheduler, "update_from_output", UPDATE, _around_update),
    )


def _around_schedule(schedule: Function) -> Function:
    def _schedule(scheduler: Any, *arguments: Any, **keywords: Any) -> Any:
        if scheduler.dynamic_sd_lookup is None:
            limit = scheduler.scheduler_config.max_num_batched_tokens
            scheduler.dynamic_sd_lookup = Switch(scheduler.num_spec_tokens, limit)
        return schedule(scheduler, *arguments, **keywords)

    return _schedule


def _around_update(update: Function) -> Function:
    def update_from_output(scheduler: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        switch = scheduler.dynamic_sd_lookup
        if isinstance(switch, Switch):
            switch.ended(
                scheduler_output.num_scheduled_tokens.keys(),
                drafted=sum(map(len, scheduler_output.scheduled_spec_decode_tokens.values())),
                scheduled=scheduler_output.total_num_scheduled_tokens,
                sampled=sum(map(len, model_runner_output.sampled_token_ids or ())),
                now=time.perf_counter(),
            )
        return update(scheduler, scheduler_output, model_runner_output)

    return update_from_output
