"""What the clients of `seer serve` have in common: requests, answers, and when to try again. Nothing here waits."""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING, Any, TypeVar

import httpx
import msgspec

from seer_async.api import DONE, RUNNING, RolloutStatus
from seer_async.errors import BusyError, SeerError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_CALL_S = 300.0  # a dataset is tokenised before the server answers
_UPDATE_S = 1830.0  # the server gives its engines half an hour
_QUIET_S = 40.0  # the server says something every ten seconds
_CONNECT_S = 10.0
_FIRST_DELAY_S, _MOST_DELAY_S = 0.1, 5.0
_BUSY_STATUSES = {429, 502, 503, 504}

FINE = 300  # statuses below are
GONE = (httpx.TransportError, BusyError)  # worth another attempt
STREAM_TIMEOUT = httpx.Timeout(_QUIET_S, connect=_CONNECT_S)

T = TypeVar("T")
PromptLike = str | dict[str, Any] | list[int]


class RolloutError(SeerError):
    """A rollout ended before it was done; `status` says how."""

    def __init__(self, status: RolloutStatus) -> None:
        super().__init__(f"rollout {status.id} is {status.status}{': ' if status.error else ''}{status.error}")
        self.status = status


class Patience:
    """How long to wait before the next attempt, and when to give up: after `limit_s` without progress."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self.progress()

    def progress(self) -> None:
        """Something has come."""
        self._since = time.monotonic()
        self._next = _FIRST_DELAY_S

    def delay(self, error: Exception) -> float:
        """Seconds; raises SeerError when patience is at its end."""
        self._next = min(_MOST_DELAY_S, 2 * self._next)
        wait = error.retry_after if isinstance(error, BusyError) else self._next
        if time.monotonic() + wait > self._since + self._limit_s:
            raise SeerError(f"no progress in {self._limit_s:g} s: {error or type(error).__name__}") from error
        return wait


class Lines:
    """Cuts a stream of bytes into lines; blank ones only say that the server is there."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def feed(self, part: bytes) -> Sequence[bytes]:
        """The lines that `part` completes."""
        *lines, rest = part.split(b"\n")
        if lines:
            lines[0] = b"".join([*self._parts, lines[0]])
            self._parts.clear()
        self._parts.append(rest)
        return [line for line in lines if line]


def client_options(url: str, api_key: str | None) -> dict[str, Any]:
    """What an httpx client is made with."""
    return {
        "base_url": url.rstrip("/"),
        "headers": {"Authorization": f"Bearer {api_key}"} if api_key else {},
        "timeout": httpx.Timeout(_CALL_S, connect=_CONNECT_S),
    }


def begin_options(prompts: Iterable[PromptLike], given: dict[str, Any], sampling: dict[str, Any]) -> dict[str, Any]:
    """What the call that begins a rollout is made with; it may be repeated. Of `given`, None is left out."""
    options = {name: value for name, value in given.items() if value is not None}
    body = {"prompts": [_fields(prompt) for prompt in prompts], "sampling": sampling} | options
    headers = {"Content-Type": "application/json", "Idempotency-Key": secrets.token_hex()}
    return {"content": msgspec.json.encode(body), "headers": headers}


def update_calls(version: str, info: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The calls of a weight update, in order: paths, and what they are made with."""
    bodies = {
        "/start_weight_update": {},
        "/update_weights": {"update_info": info},
        "/finish_weight_update": {"weight_version": version},
    }
    return [(path, {"json": body, "timeout": _UPDATE_S}) for path, body in bodies.items()]


def _fields(prompt: PromptLike) -> dict[str, Any]:
    if isinstance(prompt, str):
        return {"prompt": prompt}
    return prompt if isinstance(prompt, dict) else {"prompt_token_ids": prompt}


def samples_path(rollout: str, by: str, after: int) -> str:
    """Where items of a rollout are."""
    return f"/v1/rollouts/{rollout}/samples?by={by}&after={after}"


def decoded(reply: httpx.Response, kind: type[T]) -> T:
    """What an answer says; errors as `check`."""
    check(reply)
    return msgspec.json.decode(reply.content, type=kind)


def check(reply: httpx.Response) -> None:
    """Raise what an error says: BusyError where another attempt may help, SeerError otherwise."""
    if reply.status_code < FINE:
        return
    message = f"{reply.request.method} {reply.request.url.path} answered {reply.status_code}: {_said(reply.content)}"
    if reply.status_code in _BUSY_STATUSES:
        raise BusyError(message, retry_after=_seconds(reply.headers.get("Retry-After")))
    raise SeerError(message)


def _said(body: bytes) -> str:
    try:
        return str(msgspec.json.decode(body)["error"]["message"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return body[:200].decode(errors="replace")


def _seconds(text: str | None) -> float:
    return float(text) if text and text.isascii() and text.isdigit() else 1.0


def ended(status: RolloutStatus, by: str, number: int) -> bool:
    """Whether a reader that has `number` items has them all."""
    if status.status == RUNNING or number < (status.groups_done if by == "group" else status.spooled):
        return False
    if status.status != DONE:
        raise RolloutError(status)
    return True
