"""The paper's measurements, again: which contenders on which workloads, and what the paper saw there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from seer_async.errors import UsageError
from seer_async.simulation.contest import contest
from seer_async.simulation.outcome import Figures
from seer_async.simulation.presets import KIMI_K2, MOONLIGHT, PAPER, QWEN2_VL, Setting
from seer_async.simulation.run import Setup

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


BASELINE = "group-round-robin"


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One contender in one workload. What the paper saw is relative to the baseline, like `speed` and `tail`."""

    figures: Figures
    speed: float
    tail: float
    paper_speed: float | None = None
    paper_tail: float | None = None


class _Case(msgspec.Struct, frozen=True):
    setting: Setting
    seen: dict[str, tuple[float | None, float | None]]  # speed and tail in the paper, by contender
    changes: dict[str, Any] = {}


def _correlated(correlation: float) -> dict[str, Any]:
    return {"correlation": correlation, "name": f"{QWEN2_VL.shape.name} r={correlation}"}


_DIVIDED, _SEER, _DRAFTED, _BOUND = "no-context+pool", "seer+pool", "seer+pool+grouped", "oracle+pool"
_KNOWING, _KNOWS = "seer_async.simulation.knowing", ("Outlived", "FirstEnded", "Longest")
_UNSEEN: tuple[float | None, float | None] = (None, None)

_STUDIES = {
    "ablation": [
        _Case(
            setting,
            {
                BASELINE: (1.0, None),
                _DIVIDED: (divided, None),
                _SEER: (context, None),
                _DRAFTED: (drafted, None),
            },
        )
        for setting, divided, context, drafted in (
            (MOONLIGHT, 1.41, 1.47, 1.90),
            (QWEN2_VL, 1.42, 1.56, 2.04),
            (KIMI_K2, 1.16, 1.27, 1.53),
        )
    ],
    "tail": [
        _Case(setting, {BASELINE: (1.0, 1.0), _DRAFTED: (before / after, tail / tail_before)})
        for setting, before, tail_before, after, tail in (
            (MOONLIGHT, 3910, 1817, 2181, 278),
            (QWEN2_VL, 3957, 2301, 1922, 123),
            (KIMI_K2, 12202, 3144, 8267, 850),
        )
    ],
    "scheduling": [
        _Case(
            QWEN2_VL,
            {
                BASELINE: (1.0, 1.0),
                "streamrl": (None, None),
                _DIVIDED: (1.42, 0.79),
                _SEER: (1.56, 0.11),
                "partial+pool": (None, None),
                _BOUND: (1.63, 0.0),
            },
        )
    ],
    "acceptance": [
        _Case(
            setting,
            {BASELINE: (1.0, None), f"{BASELINE}+suffix": (suffix, None), f"{BASELINE}+grouped": (grouped, None)},
        )
        for setting, suffix, grouped in ((MOONLIGHT, 1.18, 1.26), (QWEN2_VL, None, 1.38), (KIMI_K2, None, 1.25))
    ],
    "policies": [
        _Case(setting, dict.fromkeys((BASELINE, _SEER, "foresight+pool", _BOUND), _UNSEEN)) for setting in PAPER
    ],
    "knowledge": [
        _Case(
            setting,
            dict.fromkeys(
                (BASELINE, "foresight+pool", *(f"{_KNOWING}:{name}+pool" for name in _KNOWS), _BOUND), _UNSEEN
            ),
        )
        for setting in PAPER
    ],
    "correlation": [
        _Case(
            QWEN2_VL,
            dict.fromkeys((BASELINE, _DIVIDED, _SEER, "foresight+pool", _BOUND), _UNSEEN),
            _correlated(correlation),
        )
        for correlation in (0.6, 0.75, 0.9, 0.95, 0.98)
    ],
}
STUDIES = tuple(_STUDIES)


def study(name: str, *, seed: int, scale: float = 1.0) -> Iterator[Row]:
    """The rows of a study, as soon as they are known. `scale` is the share of the paper's instances and requests.

    Raises:
        UsageError: There is no such study; lists the names.
    """
    if name not in _STUDIES:
        raise UsageError(f"unknown study {name!r}; give one of {', '.join(STUDIES)}")
    return (row for case in _STUDIES[name] for row in _rows(case, seed, scale))


def _rows(case: _Case, seed: int, scale: float) -> Iterator[Row]:
    setup = scaled(case.setting, seed=seed, scale=scale, changes=case.changes)
    base: Figures | None = None
    for figures, seen in zip(contest(setup, list(case.seen)), case.seen.values(), strict=True):
        base = base or figures
        yield Row(
            figures=figures,
            speed=figures.throughput / base.throughput,
            tail=figures.tail_s / base.tail_s,
            paper_speed=seen[0],
            paper_tail=seen[1],
        )


def scaled(setting: Setting, *, seed: int, scale: float = 1.0, changes: Mapping[str, Any] | None = None) -> Setup:
    """A setting with a share of its instances and of its requests; `changes` are to its shape, by field."""
    shape, fleet, changes = setting.shape, setting.fleet, changes or {}
    instances = max(1, round(fleet.instances * scale))
    requests = round(shape.requests * instances / fleet.instances)
    return Setup(
        workload=msgspec.structs.replace(shape, **{"requests": requests, **changes}).generate(seed),
        engine=fleet.engine,
        instances=instances,
        chunk_size=fleet.chunk_size,
        seed=seed,
    )
