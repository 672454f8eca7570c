"""The `seer` command: what its subcommands are, and how errors become exit codes."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

from seer_async import __version__
from seer_async.errors import SeerError

if TYPE_CHECKING:
    from typer._click import Command, Context

_LONGEST = 4000  # characters of a line
_MODULES = {
    "rollout": "rollout",
    "serve": "serve",
    "report": "report",
    "simulate": "simulate",
    "mock-engine": "mock",
    "draft-server": "draftserver",
    "fleet": "fleet",
    "bench": "bench",
}


class _Commands(TyperGroup):
    """The subcommands, each imported when it is asked for: a rollout need not wait for what only benchmarks use."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings | {"commands": dict.fromkeys(_MODULES)})

    def get_command(self, ctx: Context, cmd_name: str) -> Command | None:
        """Return a subcommand, None if there is none of that name."""
        if self.commands.get(cmd_name) is None and cmd_name in _MODULES:
            self.commands[cmd_name] = _load(cmd_name)
        return super().get_command(ctx, cmd_name)


def _load(name: str) -> Command:
    found = getattr(import_module(f"seer_cli.{_MODULES[name]}"), name.replace("-", "_"))
    alone = typer.Typer(rich_markup_mode="markdown", add_completion=False)
    if isinstance(found, typer.Typer):
        alone.add_typer(found, name=name)
        return typer.main.get_group(alone).commands[name]
    alone.command(name)(found)
    return typer.main.get_command(alone)


app = typer.Typer(
    name="seer",
    cls=_Commands,
    help="Strictly on-policy rollouts for RL on fleets of vLLM servers: divided, context-aware, exact.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


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
        _say(str(error))
        sys.exit(error.exit_code)


def _say(error: str) -> None:
    """One error on stderr; it may quote what a server said."""
    from seer_cli.panel import clean  # noqa: PLC0415 - only where something went wrong

    sys.stderr.write("seer: " + "\n".join(clean(line, _LONGEST) for line in error.splitlines()) + "\n")


if __name__ == "__main__":
    main()
