"""How the command line becomes a config: options are short names for config keys, and win over everything else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from seer_async.config import Config, Tree, merge, parse_setting, read_toml, resolve

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

VllmArgs = Annotated[
    list[str] | None,
    typer.Option(
        "--vllm-arg",
        help="One more argument for each engine, for example --vllm-arg=--seed --vllm-arg=7; repeatable.",
        show_default=False,
    ),
]


def config_from(file: Path | None, settings: Sequence[str], options: Mapping[str, Any]) -> Config:
    """The resolved config; `options` maps config paths to values, None (or an empty list) where not given."""
    trees: list[Tree] = [read_toml(file)] if file else []
    trees += [parse_setting(text) for text in settings]
    return resolve(*trees, given(options))


def given(options: Mapping[str, Any]) -> Tree:
    """The options that were given, as nested tables."""
    tree: Tree = {}
    for path, value in options.items():
        if value is not None and value != []:
            section, _, key = path.partition(".")
            tree = merge(tree, {section: {key: value}})
    return tree
