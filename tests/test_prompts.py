"""The prompt set that ships with the package: shape, ids, characters, and a varied mix in every prefix."""

import unicodedata
from pathlib import Path
from typing import Literal

import msgspec
import pytest

import seer_async

PROMPTS = Path(seer_async.__file__).parent / "prompts" / "default.jsonl"


class Message(msgspec.Struct, forbid_unknown_fields=True):
    role: Literal["user"]
    content: str


class Prompt(msgspec.Struct, forbid_unknown_fields=True):
    id: str
    messages: list[Message]
    category: str
    difficulty: Literal["easy", "medium", "hard"]
    answer: str | None


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    decoder = msgspec.json.Decoder(Prompt)
    return decoder.decode_lines(PROMPTS.read_bytes())


def texts(prompt: Prompt) -> list[str]:
    fields = [prompt.id, prompt.category, *(message.content for message in prompt.messages)]
    return fields if prompt.answer is None else [*fields, prompt.answer]


def test_one_object_a_line() -> None:
    raw = PROMPTS.read_bytes()
    lines = raw.split(b"\n")
    assert lines.pop() == b"", "the file must end with exactly one newline"
    assert len(lines) >= 64
    assert all(line.startswith(b"{") and line.endswith(b"}") for line in lines)


def test_ids_are_unique(prompts: list[Prompt]) -> None:
    ids = [prompt.id for prompt in prompts]
    assert len(set(ids)) == len(ids)


def test_contents_are_unique(prompts: list[Prompt]) -> None:
    contents = [prompt.messages[0].content for prompt in prompts]
    assert len(set(contents)) == len(contents)


def test_one_user_message_each(prompts: list[Prompt]) -> None:
    assert [prompt.id for prompt in prompts if len(prompt.messages) != 1] == []


def test_no_text_is_empty_or_padded(prompts: list[Prompt]) -> None:
    assert [prompt.id for prompt in prompts if any(not t or t != t.strip() for t in texts(prompt))] == []


def test_no_control_characters(prompts: list[Prompt]) -> None:
    def bad(text: str) -> bool:
        # "C*" covers control, format, surrogate, private-use and unassigned; a prompt may have line breaks.
        return any(unicodedata.category(char).startswith("C") for char in text.replace("\n", ""))

    assert [prompt.id for prompt in prompts if any(map(bad, texts(prompt)))] == []


def test_text_is_normalised(prompts: list[Prompt]) -> None:
    # An equal text in another normal form would be other token ids.
    assert all(unicodedata.is_normalized("NFC", text) for prompt in prompts for text in texts(prompt))


@pytest.mark.parametrize(("limit", "categories"), [(8, 5), (16, 10), (64, 12)])
def test_every_prefix_is_a_mix(prompts: list[Prompt], limit: int, categories: int) -> None:
    prefix = prompts[:limit]
    assert len({prompt.category for prompt in prefix}) >= categories
    assert {prompt.difficulty for prompt in prefix} == {"easy", "medium", "hard"}


def test_answers_are_given_where_there_is_one(prompts: list[Prompt]) -> None:
    exact = {"arithmetic", "word_problem", "logic", "yes_no", "extraction"}
    assert [prompt.id for prompt in prompts if prompt.category in exact and prompt.answer is None] == []
    assert any(prompt.answer is None for prompt in prompts)


def test_yes_no_answers(prompts: list[Prompt]) -> None:
    answers = {prompt.answer for prompt in prompts if prompt.category == "yes_no"}
    assert answers == {"yes", "no"}
