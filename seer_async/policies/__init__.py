"""Scheduling policies: which waiting request goes next, and to which engine.

A policy is one module in this package that defines one `Policy` subclass, or any importable class named on the command
line as `package.module:Class`. The core calls it synchronously after every event; a policy never awaits, reads a clock
or draws a random number.
"""

from __future__ import annotations

import importlib
import pkgutil

from seer_async.errors import ConfigError
from seer_async.policies.base import Policy

__all__ = ["Policy", "find_policy", "policy_names"]

_NOT_POLICIES = {"base", "queues"}


def policy_names() -> list[str]:
    """Names of the policies that ship with Seer."""
    return sorted(m.name.replace("_", "-") for m in pkgutil.iter_modules(__path__) if m.name not in _NOT_POLICIES)


def find_policy(name: str) -> type[Policy]:
    """The policy class of that name.

    Raises:
        ConfigError: There is none; lists the names.
    """
    module_name, _, class_name = name.partition(":")
    if not class_name:
        if name not in policy_names():
            raise ConfigError(
                f"unknown policy {name!r}; choose one of {', '.join(policy_names())}, or package.module:Class"
            )
        module_name = f"{__name__}.{name.replace('-', '_')}"
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"cannot import policy {name!r}: {error}") from error
    for value in [getattr(module, class_name, None)] if class_name else vars(module).values():
        if (
            isinstance(value, type)
            and issubclass(value, Policy)
            and value is not Policy
            and (class_name or value.name == name)
        ):
            return value
    raise ConfigError(f"{module_name} defines no policy class {class_name or name!r}")
