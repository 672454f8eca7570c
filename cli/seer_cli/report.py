"""`seer report`: run folders as one HTML page, or as JSON or Markdown."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from seer_async.errors import StorageError
from seer_async.report import html_page, mark, markdown_page, read_run, report_on

if TYPE_CHECKING:
    from collections.abc import Sequence

    from seer_async.report import Report


class Format(StrEnum):
    """What a report is written as."""

    HTML = "html"
    JSON = "json"
    MD = "md"


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Run folders; the first is what the others are compared with.", metavar="RUN_DIR..."),
    ],
    *,
    format_: Annotated[Format, typer.Option("--format", help="What to write.")] = Format.HTML,
    out: Annotated[
        Path | None,
        typer.Option(
            help="File to write, - for stdout. [default: report.html in the first run folder; stdout for json and md]",
            show_default=False,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace --out even if it is not a report.")] = False,
) -> None:
    """Report on rollouts: what was fast, what waited, what moved, and how long the tail was.

    The HTML page is one file that loads nothing and runs no script. Several runs are compared in a table and by their
    completion curves. Runs may be going on, interrupted or damaged: what can be read is reported, and what cannot is
    named.

    Examples:
    `seer report runs/20260101-120000`

    `seer report runs/baseline runs/seer --format md`
    """
    names = _names(runs)
    text = _written([report_on(read_run(path), name) for path, name in zip(runs, names, strict=True)], format_)
    if out is None and format_ is Format.HTML:
        out = runs[0] / "report.html"
    if out is None or out == Path("-"):
        sys.stdout.buffer.write(text)
        return
    _write(out, text, force=force)
    typer.echo(f"report in {out}", err=True)


def _names(runs: Sequence[Path]) -> list[str]:
    """The folders' names, or their paths where names are the same."""
    names = [path.resolve().name for path in runs]
    return names if len(set(names)) == len(names) else [str(path) for path in runs]


def _written(reports: Sequence[Report], format_: Format) -> bytes:
    if format_ is Format.JSON:
        return msgspec.json.encode({mark.JSON: 1, "runs": reports}) + b"\n"
    return (html_page(reports) if format_ is Format.HTML else markdown_page(reports)).encode()


def _write(path: Path, text: bytes, *, force: bool) -> None:
    """Replace `path` in one step, unless it holds something that is no report."""
    draft = path.with_name(path.name + ".new")
    try:
        if path.exists() and not force and not _is_report(path):
            raise StorageError(f"{path} is there and is no report; choose another --out, or replace it with --force")
        draft.write_bytes(text)
        draft.replace(path)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}; choose another --out") from error


def _is_report(path: Path) -> bool:
    with path.open("rb") as file:
        return mark.is_report(file.read(mark.HEAD))
