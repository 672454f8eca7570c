"""Machine output: one JSON object on stdout, for results and errors alike."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any

import msgspec
import typer
from rich.console import Console

from seer_async.errors import SeerError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from rich.table import Table


def print_json(value: Mapping[str, Any]) -> None:
    """Write one object, on one line."""
    sys.stdout.buffer.write(msgspec.json.encode(value) + b"\n")
    sys.stdout.buffer.flush()


def print_table(table: Table, *, width: int) -> None:
    """Write a table on stdout, that wide where stdout is no terminal with a width of its own."""
    Console(width=None if sys.stdout.isatty() else width).print(table)


@contextlib.contextmanager
def machine_errors(*, as_json: bool) -> Iterator[None]:
    """With `as_json`, turn a `SeerError` into {"error", "message", "exit_code"} on stdout."""
    try:
        yield
    except SeerError as error:
        if not as_json:
            raise
        print_json({"error": type(error).__name__, "message": str(error), "exit_code": error.exit_code})
        raise typer.Exit(error.exit_code) from None
