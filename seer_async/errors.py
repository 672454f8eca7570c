"""Errors, named after the boundary they cross.

`SeerError` and its children are for the person who runs Seer: one sentence on what is wrong and what to do.
`EngineError` never reaches that person as such: it tells the core what happened to one call.
"""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar, Self


class SeerError(Exception):
    """Base of all errors meant for the user; `exit_code` is what the CLI exits with."""

    exit_code: ClassVar[int] = 1


class UsageError(SeerError):
    """The command, the config or the dataset is wrong."""

    exit_code = 2


class ConfigError(UsageError):
    """A config key or value is wrong; the message names the key's path."""


class DatasetError(UsageError):
    """A dataset line is wrong; the message names file, line, field and remedy."""


class FleetError(SeerError):
    """No usable engine is left, or none could be attached."""

    exit_code = 4


class StorageError(SeerError):
    """The run folder cannot be written or does not hold what it should."""

    exit_code = 5

    @classmethod
    def of(cls, name: str, error: OSError) -> Self:
        """The disk has refused a write to the run folder `name`."""
        reason = error.strerror or error
        return cls(f"cannot write {name}: {reason}; make room, then continue with --resume {name}")


class RefusedError(SeerError):
    """A request to the service can never be sampled as it is."""


class BusyError(SeerError):
    """The service holds as much as it may; `retry_after` is in seconds."""

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class FailureKind(StrEnum):
    """What happened to a call, as far as the next decision depends on it."""

    CONNECTION = "connection"  # refused, reset or closed in the middle
    TIMEOUT = "timeout"
    SERVER = "server"  # 5xx
    BUSY = "busy"  # 429, or 503 with Retry-After: not the engine's fault
    REJECTED = "rejected"  # any other 4xx: the call's fault, never counts against the engine
    BAD_REPLY = "bad_reply"  # 200, but not what was asked for


class EngineError(Exception):
    """One call to an engine failed.

    Attributes:
        kind: What happened.
        retry_after: Seconds the engine asked us to wait, if it did.
        status: The HTTP status of its answer; 0 if there was none, or a good one.
    """

    def __init__(self, kind: FailureKind, message: str, *, retry_after: float | None = None, status: int = 0) -> None:
        super().__init__(message)
        self.kind = kind
        self.retry_after = retry_after
        self.status = status
