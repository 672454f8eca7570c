"""Wrapping vLLM's own functions: first checked, then all of a capability's patches or none."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Function = Callable[..., Any]


class UnsupportedVllmError(Exception):
    """This vLLM is not the one that a patch was written for."""


@dataclass(frozen=True)
class Patch:
    """One function of vLLM's and what to put around it.

    `parameters` are the names it took when the patch was written; `around` gets the function and returns
    its replacement.
    """

    owner: Any
    name: str
    parameters: tuple[str, ...]
    around: Callable[[Function], Function]

    def check(self) -> None:
        """Raise `UnsupportedVllmError` if the function is gone or takes other parameters."""
        check_signature(self.owner, self.name, self.parameters)

    def apply(self) -> None:
        """Put the replacement in place."""
        function = getattr(self.owner, self.name)
        setattr(self.owner, self.name, functools.wraps(function)(self.around(function)))


def check_signature(owner: Any, name: str, parameters: tuple[str, ...]) -> None:
    """Raise `UnsupportedVllmError` unless `owner.name` is a function of exactly these parameters."""
    function = getattr(owner, name, None)
    if function is None:
        raise UnsupportedVllmError(f"{owner.__name__}.{name} is missing")
    found = tuple(inspect.signature(function).parameters)
    if found != parameters:
        raise UnsupportedVllmError(f"{owner.__name__}.{name} takes {found}, not {parameters}")


def apply_all(patches: tuple[Patch, ...]) -> None:
    """Apply the patches, or raise `UnsupportedVllmError` before the first if one of them does not fit."""
    for patch in patches:
        patch.check()
    for patch in patches:
        patch.apply()
