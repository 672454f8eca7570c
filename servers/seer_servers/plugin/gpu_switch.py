"""Whether drafting pays at a batch size, found out by trying: the scheduler's switch of a Model Runner V2 engine.

Even drafts that are never verified cost: the scheduler keeps places for them, the drafter runs, the sampler takes
another path. So each batch size (by powers of two) has its duel. With drafting off, the engine takes the path it takes
without speculation. Steps that mainly prefill, and the time an engine is idle, are left out.
"""

import time
from collections.abc import Mapping
from typing import Any, Protocol

from vllm.v1.core.sched.scheduler import Scheduler

from seer_async.drafting.duel import Duel, Duels
from seer_servers.plugin.gpu_outlook import Outlook
from seer_servers.plugin.patching import Function, Patch

FEW_PREFILLED = 8  # one token in so many may be of a prompt

UPDATE = ("self", "scheduler_output", "model_runner_output")


class Drafter(Protocol):
    """What the switch asks of the speculator: what drafts would bring, and what an operator has decided.

    Not `enabled`, it never drafts; not `adaptive`, it always does.
    """

    outlook: Outlook
    enabled: bool
    adaptive: bool


_heard: list[Drafter] = []  # in this process: the worker's, which on one GPU is the scheduler's process too


def listen_to(drafter: Drafter) -> None:
    """Let the switch know the engine's speculator."""
    _heard[:] = [drafter]


def _guess() -> float | None:
    return _heard[0].outlook.brings if _heard else None


def _decided() -> bool | None:
    """Whether to draft, if that is not the duels' to decide."""
    if not _heard or (_heard[0].enabled and _heard[0].adaptive):
        return None
    return _heard[0].enabled


class Switch:
    """What the scheduler looks up: how many tokens to draft for each request of a batch."""

    def __init__(self, most: int, step_tokens: int) -> None:
        self._most, self._step_tokens = most, step_tokens
        self._duels = Duels(guess=_guess)
        self._last: tuple[float, Mapping[str, int]] = (0.0, {})

    def __getitem__(self, requests: int) -> int:
        """Tokens to draft for each of `requests`."""
        decided = _decided()
        if not (self.duel(requests).drafting if decided is None else decided):
            return 0
        return max(0, min(self._most, self._step_tokens // requests - 1))

    def duel(self, requests: int) -> Duel:
        """The duel at this batch size."""
        return self._duels.at(requests)

    def ended(self, requests: Mapping[str, int], *, drafted: int, sampled: int, now: float) -> None:
        """Count a step that ended at `now` [s]: the tokens of each request, drafted ones among them, and those sampled.

        `requests` is kept until the next step.
        """
        (then, before), self._last = self._last, (now, requests)
        scheduled = sum(requests.values())
        prefilled = scheduled - drafted - len(requests)
        if sampled and prefilled * FEW_PREFILLED <= scheduled and not before.keys().isdisjoint(requests):
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
                scheduler_output.num_scheduled_tokens,
                drafted=sum(map(len, scheduler_output.scheduled_spec_decode_tokens.values())),
                sampled=sum(map(len, model_runner_output.sampled_token_ids or ())),
                now=time.perf_counter(),
            )
        return update(scheduler, scheduler_output, model_runner_output)

    return update_from_output
