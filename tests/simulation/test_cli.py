"""`seer simulate` from the command line."""

from pathlib import Path

import msgspec
from typer.testing import CliRunner

from seer_cli.main import app
from seer_cli.simulate import _CONTENDERS

runner = CliRunner()


def simulate(*args: str) -> dict:
    result = runner.invoke(app, ["simulate", "--json", *args])
    assert result.exit_code == 0, result.output
    return msgspec.json.decode(result.stdout.splitlines()[-1])


def test_all_contenders_on_the_default_workload(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    value = simulate("--out", str(out))
    assert [figures["contender"] for figures in value["figures"]] == list(_CONTENDERS)
    assert msgspec.json.decode(out.read_bytes()) == value


def test_what_if() -> None:
    def seconds(*args: str) -> float:
        return simulate("-c", "seer+pool", *args)["figures"][0]["total_s"]

    usual = seconds()
    assert seconds("--kv-tokens", "100000") < usual
    assert seconds("--instances", "4") < usual
    assert len({usual, seconds("--chunk-size", "16"), seconds("--probes", "3"), seconds("--estimate", "mean")}) == 4


def test_a_table_names_every_contender() -> None:
    result = runner.invoke(app, ["simulate", "-c", "seer", "-c", "oracle"])
    assert result.exit_code == 0
    assert "seer" in result.stdout
    assert "oracle" in result.stdout


def test_a_study_says_what_the_paper_saw() -> None:
    rows = simulate("--study", "tail", "--scale", "0.01")["rows"]
    assert [row["figures"]["workload"] for row in rows] == [
        w for w in ("moonlight", "qwen2-vl-72b", "kimi-k2") for _ in "12"
    ]
    assert [round(row["paper_tail"], 2) for row in rows[1::2]] == [0.15, 0.05, 0.27]


def test_a_table_says_what_did_not_finish() -> None:
    result = runner.invoke(app, ["simulate", "-c", "seer", "-c", "group-round-robin", "--kv-tokens", "100"])
    assert result.exit_code == 0
    assert "seer: 189 of 192 responses did not finish" in result.stdout
    assert "group-round-robin: 192 of 192" in result.stdout
    assert "did not finish" in result.stderr


def test_mistakes_say_what_to_give() -> None:
    for args, message in (
        (["--workload", "none"], "moonlight"),
        (["--study", "none"], "ablation"),
        (["-c", "seer+magic"], "+pool"),
        (["-c", "seer+suffix+grouped"], "+grouped or +suffix"),
        (["--estimate", "none"], "optimistic"),
        (["--workload", "no/such/run"], "finished run"),
        (["--workload", "no/such/run", "--scale", "1"], "leave out --scale"),
        (["--study", "tail", "-w", "cpu", "-c", "seer"], "leave out --workload, --contender"),
        (["--study", "tail", "--kv-tokens", "9", "--probes", "1"], "leave out --kv-tokens, --probes"),
    ):
        result = runner.invoke(app, ["simulate", "--json", *args])
        assert result.exit_code == 2, result.output
        assert message in msgspec.json.decode(result.stdout.splitlines()[-1])["message"]
