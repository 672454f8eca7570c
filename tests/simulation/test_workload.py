"""Generated workloads are of the paper's shape; recorded ones are what was recorded."""

from pathlib import Path

import msgspec
import pytest

from seer_async.errors import UsageError
from seer_async.simulation.presets import PAPER, SETTINGS
from seer_async.simulation.workload import Shape, recorded


@pytest.mark.parametrize(
    ("name", "requests", "n", "mean", "limit"),
    [
        ("moonlight", 3200, 8, 22386, 65536),
        ("qwen2-vl-72b", 9600, 16, 7615, 40960),
        ("kimi-k2", 6400, 8, 38959, 98304),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_papers_workloads(name: str, requests: int, n: int, mean: int, limit: int, seed: int) -> None:
    work = SETTINGS[name].shape.generate(seed)
    assert work.requests == requests
    assert {len(group.lengths) for group in work.groups} == {n}
    assert work.tokens / requests == pytest.approx(mean, rel=1e-3)
    assert max(work.lengths) == limit == work.limit
    assert min(work.lengths) < mean / 10  # heavy-tailed


@pytest.mark.parametrize("wanted", [0.3, 0.75, 0.95])
def test_groups_share_what_they_should_of_the_variance(wanted: float) -> None:
    shape = Shape(name="w", requests=16_000, n=8, mean=1000, limit=1_000_000, correlation=wanted)
    assert shape.generate(3).correlation == pytest.approx(wanted, abs=0.03)


def test_a_seed_is_a_workload() -> None:
    shape = PAPER[0].shape
    assert shape.generate(5) == shape.generate(5) != shape.generate(6)


def test_a_recorded_run(tmp_path: Path) -> None:
    lines = [
        {"group": "a", "token_ids": [1] * 5, "prompt_token_ids": [1, 2], "finish_reason": "stop"},
        {"group": "a", "token_ids": [1] * 9, "prompt_token_ids": [1, 2], "finish_reason": "length"},
        {"group": "b", "token_ids": [], "prompt_token_ids": [1], "finish_reason": "error"},
    ]
    (tmp_path / "samples.jsonl").write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))
    work = recorded(tmp_path)
    assert [(group.id, group.prompt, group.lengths) for group in work.groups] == [("a", 2, (5, 9))]
    assert work.limit == 9


def test_no_recorded_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give the folder of a finished run"):
        recorded(tmp_path)
