"""True lengths, for the oracle and for runs that replay another run's lengths.

A file of lengths is a samples.jsonl, or JSONL with `id` ("group/index") and `length` a line.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from seer_async.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from seer_async.config import Config
    from seer_async.types import Prompt


class _Line(msgspec.Struct):
    id: str
    length: int | None = None
    token_ids: list[int] | None = None


def read_lengths(path: Path) -> dict[str, int]:
    """Lengths in generated tokens, by request id.

    Raises:
        UsageError: The file cannot be read, or a line says no length.
    """
    lengths: dict[str, int] = {}
    try:
        with path.open("rb") as file:
            for number, text in enumerate(file, 1):
                lengths.update([_length(msgspec.json.decode(text, type=_Line), number)])
    except (OSError, msgspec.DecodeError, ValueError) as error:
        raise UsageError(f"cannot read lengths from {path}: {error}; give a samples.jsonl of a finished run") from error
    return lengths


def lengths_for(config: Config, prompts: Sequence[Prompt]) -> dict[str, int]:
    """The lengths that a config names, if it names any.

    Raises:
        UsageError: They cannot be read, or `force_lengths` lacks one.
    """
    scheduler = config.scheduler
    lengths = read_lengths(Path(scheduler.lengths)) if scheduler.lengths else {}
    if scheduler.force_lengths:
        wanted = (f"{prompt.id}/{index}" for prompt in prompts for index in range(config.rollout.n))
        if missing := next((request for request in wanted if request not in lengths), None):
            raise UsageError(f"scheduler.lengths must name every response to force its length, but lacks {missing!r}")
    return lengths


def _length(line: _Line, number: int) -> tuple[str, int]:
    length = line.length if line.length is not None else len(line.token_ids or ())
    if length < 1:
        raise ValueError(f"line {number} has neither a length nor token_ids")
    return line.id, length
