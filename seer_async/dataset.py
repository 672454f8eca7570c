"""Datasets: JSONL in, prompts out, and every fault named by file, line, field and remedy.

Invariant: ids are unique in a dataset. A line without an id gets its line number, so that resuming and reporting
always have a name for it.
"""

from __future__ import annotations

from importlib.resources import as_file, files
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec

from seer_async.errors import DatasetError
from seer_async.types import Message, Prompt

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

_SOURCES = ("prompt", "messages", "prompt_token_ids")
_HIGHEST_TOKEN_ID = 2**31 - 1


def default_dataset() -> Path:
    """The prompt set that ships with Seer."""
    with as_file(files("seer_async") / "prompts" / "default.jsonl") as path:
        return path


def read_dataset(path: Path, limit: int | None = None) -> list[Prompt]:
    """The first `limit` prompts of a JSONL file (all when None). Blank lines are skipped.

    Raises:
        DatasetError: A line is wrong, or there is none.
    """
    return parse_lines(str(path), _lines(path), limit)


def parse_lines(name: str, lines: Iterable[tuple[int, bytes]], limit: int | None = None) -> list[Prompt]:
    """The first `limit` prompts of a dataset's numbered lines; `name` is what errors call it.

    Raises:
        DatasetError: A line is wrong, or there is none.
    """
    prompts: list[Prompt] = []
    seen: dict[str, int] = {}
    for number, line in lines:
        if limit is not None and len(prompts) >= limit:
            break
        prompt = _Line(f"{name}:{number}", number).prompt(line)
        if (first := seen.setdefault(prompt.id, number)) != number:
            raise DatasetError(f"{name}:{number}: id {prompt.id!r} is already on line {first}; make ids unique")
        prompts.append(prompt)
    if not prompts:
        raise DatasetError(f"{name} holds no prompts; write one JSON object a line, for example {_EXAMPLE}")
    return prompts


def numbered(lines: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers, from 1, without the blank ones."""
    return ((number, line) for number, line in enumerate(lines, 1) if line.strip())


_EXAMPLE = '{"prompt": "Why is the sky blue?"}'


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with path.open("rb") as file:
            yield from numbered(file)
    except OSError as error:
        raise DatasetError(f"cannot read dataset {path}: {error.strerror}") from error


class _Line:
    """One line being read; knows how to blame it."""

    def __init__(self, where: str, number: int) -> None:
        self._where = where
        self._number = number

    def _wrong(self, what: str) -> NoReturn:
        raise DatasetError(f"{self._where}: {what}")

    def prompt(self, line: bytes) -> Prompt:
        fields = self._object(line)
        given = [name for name in _SOURCES if fields.get(name) is not None]
        if len(given) != 1:
            found = f"both {given[0]!r} and {given[1]!r}" if given else "none of them"
            self._wrong(f'give exactly one of "prompt", "messages" and "prompt_token_ids" (found {found})')
        return Prompt(
            id=self._id(fields.pop("id", None)),
            line=self._number,
            text=self._text(fields.pop("prompt", None)),
            messages=self._messages(fields.pop("messages", None)),
            token_ids=self._token_ids(fields.pop("prompt_token_ids", None)),
            extra=fields or None,
        )

    def _object(self, line: bytes) -> dict[str, Any]:
        try:
            fields = msgspec.json.decode(line)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            self._wrong(f"not valid JSON ({error}); write one JSON object a line")
        if not isinstance(fields, dict):
            self._wrong(f"a line must be a JSON object, for example {_EXAMPLE}")
        return fields

    def _id(self, value: Any) -> str:
        if value is None:
            return f"line-{self._number}"
        if isinstance(value, bool) or not isinstance(value, str | int) or str(value) == "":
            self._wrong("field 'id' must be a non-empty string or an integer")
        return str(value)

    def _text(self, value: Any) -> str | None:
        if value is not None and (not isinstance(value, str) or not value):
            self._wrong("field 'prompt' must be a non-empty string")
        return value

    def _messages(self, value: Any) -> list[Message] | None:
        if value is None:
            return None
        try:
            messages = msgspec.convert(value, list[Message])
        except msgspec.ValidationError as error:
            self._wrong(f'field \'messages\' must be a list of {{"role", "content"}} objects: {error}')
        if not messages:
            self._wrong("field 'messages' must not be empty")
        return messages

    def _token_ids(self, value: Any) -> list[int] | None:
        if value is None:
            return None
        ok = isinstance(value, list) and value and all(type(t) is int and 0 <= t <= _HIGHEST_TOKEN_ID for t in value)
        if not ok:
            self._wrong("field 'prompt_token_ids' must be a non-empty list of token ids (integers from 0)")
        return list(value)
