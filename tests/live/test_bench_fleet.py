"""`seer bench fleet` over mock engines and a real vllm-router: every contender does the same work, and is judged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from typer.testing import CliRunner

from seer_async.errors import SeerError
from seer_async.types import EngineStats
from seer_async.workload import heavy_tailed_lengths
from seer_cli.contest import parse_entry
from seer_cli.fleetbench import _tokens
from seer_cli.main import app
from seer_cli.watch import Watch
from tests.live.engines import mock_engines

if TYPE_CHECKING:
    from pathlib import Path

    from tests.live.engines import MockProcess

GROUPS, N = 6, 4
ENGINE = ["--step-ms", "2", "--max-num-seqs", "8"]


def bench(engines: list[MockProcess], *options: str) -> Any:
    servers = [word for engine in engines for word in ("--server", engine.url)]
    done = CliRunner().invoke(app, ["bench", "fleet", *servers, *options, "--json"])
    assert done.exit_code == 0, done.output
    return msgspec.json.decode(done.stdout)


@pytest.mark.timeout(600)
def test_contenders_do_the_same_work(tmp_path: Path) -> None:
    names = ["group-round-robin", "vllm-router:power_of_two", "vllm-router:consistent_hash", "seer", "oracle"]
    options = [word for name in names for word in ("-c", name)]
    sizes = ["--groups", str(GROUPS), "-n", str(N), "--mean", "60", "--longest", "200", "--repeats", "2"]
    with mock_engines(ENGINE, ENGINE) as engines:
        result = bench(engines, *options, *sizes, "--out", str(tmp_path / "result.json"))

    assert msgspec.json.decode((tmp_path / "result.json").read_bytes()) == result
    runs = result["runs"]
    assert [run["contender"] for run in runs] == names + names[1:] + names[:1]  # another begins every round
    for number in range(2):
        assert len({run["outcome"]["tokens"] for run in runs if run["round"] == number}) == 1
    for run in runs:
        assert run["failed"] == 0
        assert 0 < run["outcome"]["tail_s"] < run["outcome"]["seconds"]
        assert run["outcome"]["throughput"] == pytest.approx(run["outcome"]["tokens"] / run["outcome"]["seconds"])
        assert all(0 <= share <= 1 for share in run["idle"].values())
        assert run["prefilled"] >= run["prompts"] > 0
        assert run["recomputed"] == run["preemptions"] == 0
    assert {run["migrations"] for run in runs if run["contender"] == "group-round-robin"} == {0}
    # A step takes 2 ms, of which the answer to a call of one token that came late takes its share of 64 away.
    assert result["solo_step_s"] > 0.001


@pytest.mark.timeout(600)
def test_what_preempted_requests_compute_again_is_counted() -> None:
    scarce = ["--step-ms", "2", "--num-blocks", "48", "--block-size", "16", "--max-model-len", "512"]
    with mock_engines(scarce) as engines:
        options = ["--groups", str(GROUPS), "-n", str(N), "--mean", "60", "--longest", "200", "--repeats", "1"]
        options += ["--set", "engine.stagger=0"]  # or seer relies on the order in which calls end
        baseline, seer = bench(engines, "-c", "group-round-robin", "-c", "seer", *options)["runs"]
    assert baseline["preemptions"] > 0
    assert baseline["recomputed"] > 30 * baseline["preemptions"]  # a prompt, and what it had generated
    assert seer["preemptions"] == seer["recomputed"] == 0
    assert seer["prefilled"] > seer["prompts"] == baseline["prompts"]  # no pool: continuations are prefilled


def test_an_engine_that_does_not_say_what_it_computed_again_leaves_a_question_mark() -> None:
    def reading(preemptions: int, recomputed: int | None) -> EngineStats:
        return EngineStats(
            boot="b",
            running=0,
            waiting=0,
            kv_used=0.0,
            preemptions=preemptions,
            generated_tokens=0,
            prompt_tokens=0,
            cached_tokens=0,
            recomputed_tokens=recomputed,
        )

    def watched(*readings: EngineStats) -> int | None:
        watch = Watch({"e": None})  # type: ignore[dict-item]  # it is not asked
        watch._readings = [(float(at), {"e": stats}) for at, stats in enumerate(readings)]
        return watch.recomputed()

    assert watched(reading(2, 50), reading(5, 170)) == 120
    assert watched(reading(2, None), reading(2, None)) == 0
    assert watched(reading(2, None), reading(3, None)) is None
    assert [_tokens(figures) for figures in ([10, 30, 20], [10, None, 20])] == ["20", "?"]


@pytest.mark.timeout(600)
def test_lengths_of_a_recorded_run(tmp_path: Path) -> None:
    lengths = heavy_tailed_lengths([f"g{i}" for i in range(GROUPS)], N, mean=40, longest=90, seed=3)
    lines = [
        {"group": name.split("/")[0], "token_ids": [5] * length, "prompt_token_ids": [7] * 9, "finish_reason": "stop"}
        for name, length in lengths.items()
    ]
    (tmp_path / "samples.jsonl").write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))
    with mock_engines(ENGINE) as engines:
        result = bench(engines, "-c", "seer", "--trace", str(tmp_path), "-n", str(N), "--repeats", "1")
    assert result["runs"][0]["outcome"]["tokens"] == sum(lengths.values())


def test_what_cannot_be_compared() -> None:
    assert parse_entry("seer+pool+grouped").draft == "grouped"
    assert parse_entry("vllm-router:round_robin").router == "round_robin"
    for options, said in (
        (["-c", "seer+magic"], "magic"),
        (["-c", "seer+grouped", "--server", "http://127.0.0.1:1"], "--server KIND=URL"),
        (["-c", "seer", "--groups", "10000"], "--groups"),
        (["-c", "seer", "--trace", "/nowhere"], "/nowhere"),
        (["-c", "seer", "-c", "partial+pool", "--groups", "57"], r"partial\+pool starts twice .* --groups 56 at most"),
    ):
        with pytest.raises(SeerError, match=said):
            CliRunner().invoke(app, ["bench", "fleet", *options], catch_exceptions=False)
