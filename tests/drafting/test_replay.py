"""The replay of recorded groups, on groups whose answer is known."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("numba")

from seer_cli.draftbench import SIBLINGS, Response, measure
from seer_cli.main import main

PROMPT = [900, 901]


def group(*responses, name="g"):
    return [Response(name, PROMPT, list(tokens)) for tokens in responses]


def lengths(groups, **options):
    found = measure(groups, **{"responses": 16, "most": 8, "seed": 0} | options)
    return {(item.siblings, item.paths): item.length for item in found}


def test_a_sibling_that_says_the_same_is_worth_eight_tokens_a_step():
    found = lengths([group(range(30), range(30))])
    assert found[0, 1] == 1.0  # it never repeats itself
    # One token before the sibling is recognised; then three times eight and the bonus token; then the last two.
    assert found[1, 1] == 30 / 5
    assert lengths([group(range(30), range(30))], most=4)[1, 1] == pytest.approx(30 / 7)


def test_a_response_that_repeats_itself_needs_no_sibling():
    found = lengths([group([1, 2, 3] * 10, [1, 2, 3] * 10)])
    assert found[0, 1] > 2.0


def test_more_paths_find_what_the_minority_said():
    common, rare = [1, 2, 3, 4], [1, 2, 5, 6]
    groups = [group(rare, common, common, common, rare)]
    assert lengths(groups)[5, 2] > lengths(groups)[5, 1]


def test_more_siblings_do_not_make_it_worse():
    found = lengths([group(*[[i, *range(20), i + 1, *range(20, 40)] for i in range(100, 132, 2)])])
    column = [found[siblings, 1] for siblings in SIBLINGS]
    assert column == sorted(column)
    assert column[0] < column[-1]


class TestCommand:
    @pytest.fixture
    def record(self, tmp_path):
        def record(folder, temperature, *responses):
            path = tmp_path / folder
            path.mkdir()
            lines = [{"group": "g", "prompt_token_ids": PROMPT, "token_ids": list(tokens)} for tokens in responses]
            (path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            if temperature is not None:
                facts = {"run": folder, "seer": "0", "seed": 0, "dataset": "", "groups": 1, "samples": 2}
                config = {"sampling": {"temperature": temperature}}
                info = facts | {"command": [], "started": 0.0, "config": config}
                (path / "run.json").write_text(json.dumps(info))
            return path

        return record

    @pytest.fixture
    def replay(self, monkeypatch, capsys):
        def replay(*arguments):
            monkeypatch.setattr("sys.argv", ["seer", "bench", "replay", *map(str, arguments)])
            with pytest.raises(SystemExit) as stop:
                main()
            assert stop.value.code in {0, 2}
            return capsys.readouterr()

        return replay

    def test_folders_of_one_temperature_are_one_table(self, record, replay):
        same = range(30)
        folders = record("a", 0.6, same, same), record("b", 1.0, same, range(50, 80)), record("c", 0.6, same, same)
        found = json.loads(replay(*folders, "--json").out)["recordings"]
        assert [(each["name"], each["groups"]) for each in found] == [("T=0.6", 2), ("T=1.0", 1)]
        assert [each["acceptance"][3]["length"] for each in found] == [6.0, 1.0]

    def test_the_table_stands_beside_the_paper(self, record, replay):
        said = replay(record("a", None, range(30), range(30)) / "samples.jsonl").out
        assert "6.00 (2.04)" in said
        assert "no group has more than 1 siblings to give" in " ".join(said.split())

    def test_what_is_no_recording_is_said_in_one_sentence(self, record, replay, tmp_path):
        assert "neither a run folder nor a samples.jsonl" in replay(tmp_path).err
        assert "no group with at least 2 responses" in replay(record("single", 1.0, range(30))).err
        broken = record("broken", 1.0, range(30), range(30))
        with (broken / "samples.jsonl").open("a") as file:
            file.write("{}\n")
        assert "line 3 is no sample" in replay(broken).err
        (broken / "run.json").write_text("{}")
        assert "run.json is not what a rollout writes" in replay(broken).err
