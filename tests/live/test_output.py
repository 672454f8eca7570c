"""samples.jsonl as others read it: they infer a column's type from the first lines and hold all lines to it.

`datasets` and pyarrow are there because trl, which other tests use, depends on them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import datasets
import pyarrow.json
import pytest

from seer_async.dataset import default_dataset, parse_lines, read_dataset
from tests.live.engines import mock_engines
from tests.runs import roll, samples

if TYPE_CHECKING:
    from pathlib import Path

TREE: dict[str, Any] = {
    "rollout": {"n": 2, "chunk_size": 16, "max_attempts": 1},
    "sampling": {"max_tokens": 64, "seed": 3, "logprobs": 1},
    "engine": {"telemetry_s": 0.1},
}
FAST = ["--step-ms", "1", "--mean-length", "30"]


def loaded(path: Path) -> list[dict[str, Any]]:
    found = datasets.load_dataset(
        "json", data_files=str(path / "samples.jsonl"), split="train", cache_dir=str(path / "cache")
    )
    return list(found)


async def test_datasets_reads_what_a_run_writes(tmp_path: Path) -> None:
    lines = [
        b'{"id": "text", "prompt": "x", "answer": "1", "more": {"a": null}}',
        b'{"id": "chat", "messages": [{"role": "user", "content": "x"}], "answer": "one"}',
        b'{"id": "ids", "prompt_token_ids": [5, 6], "answer": null, "tags": ["a"]}',
        b'{"id": "none", "prompt": "y"}',
    ]
    prompts = parse_lines("test", enumerate(lines, 1))
    with mock_engines([*FAST, "--fault", "error-500:0.2"]) as (engine,):
        await roll(tmp_path / "run", [engine.url], prompts, TREE | {"engine": {"patience_s": 5.0}})
    written = samples(tmp_path / "run")
    assert {bool(sample["error"]) for sample in written.values()} == {True, False}
    read = {row["id"]: row for row in loaded(tmp_path / "run")}
    assert read.keys() == written.keys()
    for name, row in read.items():
        assert {key: row[key] for key in ("token_ids", "text", "error")} == {
            key: written[name][key] for key in ("token_ids", "text", "error")
        }
        assert (row["extra"] or {}).get("answer") == (written[name]["extra"] or {}).get("answer")
    assert pyarrow.json.read_json(tmp_path / "run" / "samples.jsonl").num_rows == len(written)


async def test_and_of_the_prompts_that_ship(tmp_path: Path) -> None:
    prompts = read_dataset(default_dataset())
    with mock_engines(FAST) as (engine,):
        await roll(tmp_path / "run", [engine.url], prompts, TREE)
    assert len(loaded(tmp_path / "run")) == 2 * len(prompts)


async def test_a_field_that_changes_its_type_is_not_ours_to_mend(tmp_path: Path) -> None:
    """README says so. `datasets` forgives it within a block of lines, and fails where another block begins."""
    prompts = parse_lines("test", enumerate([b'{"prompt": "x", "answer": 1}', b'{"prompt": "x", "answer": "one"}'], 1))
    with mock_engines(FAST) as (engine,):
        await roll(tmp_path / "run", [engine.url], prompts, TREE)
    with pytest.raises(pyarrow.ArrowInvalid, match=r"/extra/answer.*changed from number to string"):
        pyarrow.json.read_json(tmp_path / "run" / "samples.jsonl")
