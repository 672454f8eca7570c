"""`seer bench drafts`: ratios are taken within a repeat, and a turn never asks a prompt twice."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from seer_async.errors import FleetError, UsageError
from seer_async.types import Prompt
from seer_cli import bench, specbench
from seer_cli.main import app
from seer_cli.specbench import Point, Turn, measure_drafts, score_table, scores, spread
from seer_servers.fleet import EngineSpec

if TYPE_CHECKING:
    from pathlib import Path


def turn(contender: str, repeat: int, seconds: float, **counted: int) -> Turn:
    counts = dict.fromkeys(("drafted", "accepted", "drafts", "steps", "steps_off"), 0) | counted
    return Turn(
        contender=contender, point=Point(8, 0.6), repeat=repeat, tokens=100, seconds=seconds, cpu_s=seconds, **counts
    )


def test_ratios_are_of_one_repeat_and_steps_off_of_all() -> None:
    turns = [
        turn("none", 0, 10.0),
        turn("grouped", 0, 8.0, drafts=20, accepted=10, steps=60, steps_off=60),
        turn("grouped", 1, 4.0, drafts=20, accepted=30, steps=40, steps_off=15),
        turn("none", 1, 4.4),
    ]
    none, grouped = scores(turns)
    assert none.speedup == 1.0
    assert grouped.speedup == pytest.approx((1.25 + 1.1) / 2)
    assert grouped.speedups == pytest.approx((1.1, 1.25))
    assert grouped.tokens_per_draft == 2.0
    assert grouped.off_share == 0.75
    assert none.off_share == 0
    assert score_table(turns).row_count == 2


def test_names_are_checked_before_anything_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "local_spec", lambda _: pytest.fail("something was started"))
    with pytest.raises(UsageError, match="--contender bogus: give one of none, grouped, suffix, ngram, again"):
        CliRunner().invoke(
            app, ["bench", "drafts", "--contender", "grouped", "--contender", "bogus"], catch_exceptions=False
        )


async def measure(folder: Path, prompts: int, contenders: list[str], batches: tuple[int, ...], groups: int) -> None:
    """A measurement of so many prompts, as far as it gets."""
    await measure_drafts(
        EngineSpec(model="m"),
        folder,
        [Prompt(id=str(number), text="?") for number in range(prompts)],
        contenders=contenders,
        points=[Point(batch, 0.6) for batch in batches],
        siblings=8,
        max_tokens=8,
        repeats=1,
        waves=2,
        groups=groups,
        say=print,
        keep=print,
    )


@pytest.mark.parametrize(("batches", "groups"), [((1, 16), 1), ((1,), 4)], ids=["for its waves", "at least"])
async def test_a_turn_needs_as_many_prompts_as_groups(tmp_path: Path, batches: tuple[int, ...], groups: int) -> None:
    with pytest.raises(UsageError, match="needs 4 prompts and there are 3"):
        await measure(tmp_path, 3, ["none"], batches, groups)


@pytest.mark.parametrize("count", [1, 2, 3, 16, 74, 200])
def test_every_turn_has_prompts_from_all_over_the_dataset(count: int) -> None:
    prompts = [Prompt(id=str(number), text="?") for number in range(count)]
    order = [int(prompt.id) for prompt in spread(prompts)]
    assert sorted(order) == list(range(count))
    if count >= 16:
        for start in range(count - 4):
            places = sorted(order[start : start + 4])
            gaps = [b - a for a, b in zip(places, [*places[1:], places[0] + count], strict=True)]
            assert max(gaps) < count / 2


async def test_again_is_one_more_engine_without_drafts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: list[str] = []

    def fleet(specs: list[EngineSpec], *_: object, **__: object) -> None:
        started.extend(spec.draft for spec in specs)
        raise FleetError("no engine is started in this test")

    monkeypatch.setattr(specbench, "LocalFleet", fleet)
    with pytest.raises(FleetError):
        await measure(tmp_path, 1, ["none", "grouped", "again"], (1,), 1)
    assert started == ["none", "grouped", "none"]
