"""The `seer` command: what its subcommands are, and how errors become exit codes."""

from __future__ import annotations

import sys

import typer

from seer_async import __version__
from seer_async.errors import SeerError
from seer_cli.bench import bench
from seer_cli.draftserver import draft_server
from seer_cli.fleet import fleet
from seer_cli.mock import mock_engine
from seer_cli.report import report
from seer_cli.rollout import rollout
from seer_cli.serve import serve
from seer_cli.simulate import simulate

app = typer.Typer(
    name="seer",
    help="Strictly on-policy rollouts for RL on fleets of vLLM servers: divided, context-aware, exact.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
app.command("rollout")(rollout)
app.command("serve")(serve)
app.command("report")(report)
app.command("simulate")(simulate)
app.command("mock-engine")(mock_engine)
app.command("draft-server")(draft_server)
app.add_typer(fleet, name="fleet")
app.add_typer(bench, name="bench")


def _version(value: bool) -> None:  # noqa: FBT001 - Typer's callback signature
    if value:
        typer.echo(f"seer {__version__}")
        raise typer.Exit


@app.callback()
def seer(
    version: bool = typer.Option(  # noqa: FBT001 - Typer makes a flag of it
        False,  # noqa: FBT003 - the flag's default
        "--version",
        callback=_version,
        is_eager=True,
        help="Print the version and exit.",
    ),
) -> None:
    """Strictly on-policy rollouts for RL on fleets of vLLM servers."""


def main() -> None:
    """Run the command line; a `SeerError` is one line on stderr and its exit code."""
    try:
        app()
    except SeerError as error:
        sys.stderr.write(f"seer: {error}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
