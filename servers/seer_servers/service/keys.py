"""Who may call: bearer keys, compared in constant time, replaced without a restart.

Invariant: keys are kept as digests only, and never appear in a message. A key file that cannot be read, or holds no
key, changes nothing: the keys of before stay valid.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from seer_async.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from seer_async.config import ServeConfig

_LOOK_S = 1.0


class Keys:
    """The keys that `config` names; without any, everybody on this machine may call.

    Raises:
        ConfigError: They cannot be read, or there are none and the host can be reached from elsewhere.
    """

    def __init__(self, config: ServeConfig) -> None:
        self._file = Path(config.api_key_file) if config.api_key_file else None
        self._fixed = _from_environment(config.api_key_env)
        self._stamp: tuple[int, ...] = ()
        self._looked = 0.0
        self._from_file: list[bytes] = []
        if self._file and not self._reload():
            raise ConfigError(f"serve.api_key_file: {self._file} cannot be read or holds no key")
        if not self and not _is_loopback(config.host):
            raise ConfigError(
                f"--host {config.host} can be reached from elsewhere: set --api-key-env (or serve.api_key_file), "
                "or use 127.0.0.1"
            )

    def __bool__(self) -> bool:
        return bool(self._fixed or self._from_file)

    def accept(self, authorization: str) -> bool:
        """Whether an Authorization header holds a valid key."""
        if not self:
            return True
        self._look()
        scheme, _, key = authorization.partition(" ")
        digest = _digest(key.strip())
        matches = [hmac.compare_digest(digest, known) for known in (*self._fixed, *self._from_file)]
        return scheme.lower() == "bearer" and any(matches)

    def _reload(self) -> bool:
        """Read the key file again; False if that gave no keys."""
        if self._file is None:
            return False
        try:
            self._stamp = _stamp(self._file)
            found = _digests(self._file.read_text(encoding="utf-8").splitlines())
        except (OSError, UnicodeDecodeError):
            return False
        self._from_file = found or self._from_file
        return bool(found)

    def _look(self) -> None:
        """Notice a changed file, at most once a second."""
        now = time.monotonic()
        if self._file and now - self._looked >= _LOOK_S:
            self._looked = now
            try:
                changed = _stamp(self._file) != self._stamp
            except OSError:
                return
            if changed:
                self._reload()


def _from_environment(variable: str | None) -> list[bytes]:
    if variable is None:
        return []
    if keys := _digests(os.environ.get(variable, "").split(",")):
        return keys
    raise ConfigError(f"--api-key-env {variable}: that environment variable is not set or holds no key")


def _digests(keys: Iterable[str]) -> list[bytes]:
    return [_digest(key.strip()) for key in keys if key.strip()]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _stamp(path: Path) -> tuple[int, ...]:
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
