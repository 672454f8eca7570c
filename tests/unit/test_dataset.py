"""Every fault of a dataset is named by line, field and remedy."""

from pathlib import Path

import pytest

from seer_async.dataset import default_dataset, read_dataset
from seer_async.errors import DatasetError
from seer_async.types import Message


def dataset(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_three_forms_and_passed_through_fields(tmp_path: Path) -> None:
    path = dataset(
        tmp_path,
        '{"prompt": "hi", "answer": 4}',
        "",
        '{"id": "chat", "messages": [{"role": "user", "content": "hi"}]}',
        '{"id": 7, "prompt_token_ids": [1, 2]}',
    )
    one, two, three = read_dataset(path)
    assert (one.id, one.text, one.extra, one.line) == ("line-1", "hi", {"answer": 4}, 1)
    assert (two.id, two.messages, two.extra) == ("chat", [Message("user", "hi")], None)
    assert (three.id, three.token_ids) == ("7", [1, 2])


def test_limit_reads_no_further(tmp_path: Path) -> None:
    assert len(read_dataset(dataset(tmp_path, '{"prompt": "a"}', "broken"), limit=1)) == 1


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (['{"prompt": "a"}', '{"prompt": '], r"data.jsonl:2: not valid JSON"),
        (["[1]"], r":1: a line must be a JSON object"),
        (["[" * 5000], r":1: not valid JSON"),
        (['{"text": "a"}'], r":1: give exactly one of .*found none"),
        (['{"prompt": "a", "prompt_token_ids": [1]}'], r":1: give exactly one of .*found both"),
        (['{"prompt": ""}'], r"field 'prompt' must be a non-empty string"),
        (['{"prompt": 3}'], r"field 'prompt' must be"),
        (['{"messages": [{"role": "user"}]}'], r"field 'messages' must be .*content"),
        (['{"messages": []}'], r"'messages' must not be empty"),
        (['{"prompt_token_ids": [1, -1]}'], r"field 'prompt_token_ids' must be"),
        (['{"prompt_token_ids": [true]}'], r"field 'prompt_token_ids' must be"),
        (['{"id": "x", "prompt": "a"}', '{"id": "x", "prompt": "b"}'], r":2: id 'x' is already on line 1"),
        (['{"id": [], "prompt": "a"}'], r"field 'id' must be"),
        ([""], r"holds no prompts"),
    ],
)
def test_faults(tmp_path: Path, lines: list[str], says: str) -> None:
    with pytest.raises(DatasetError, match=says):
        read_dataset(dataset(tmp_path, *lines))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="cannot read dataset"):
        read_dataset(tmp_path / "none.jsonl")


def test_the_default_set_is_readable() -> None:
    assert len(read_dataset(default_dataset())) >= 64
