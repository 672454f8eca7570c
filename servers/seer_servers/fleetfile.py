"""Fleet files: where the engines of a fleet are; and the folder of a fleet that was started on this machine.

A fleet file is JSON: a list of URLs, or an object with the fields of `FleetFile`, of which only `engines` is required.

Invariants: whoever runs a fleet holds the lock of its folder for as long, so a fleet whose lock is free has nobody who
looks after it; `fleet.json` is replaced atomically, and while the lock is held it is the holder's; the lock file stays,
because to remove it is a race.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import socket
import time
from pathlib import Path

import msgspec

from seer_async.address import require_distinct
from seer_async.errors import FleetError, StorageError, UsageError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_KEPT = {"logs", "lock"}
_PROBE_S = 0.3  # others hold the lock that long at most to see whether it is free
_POLL_S = 0.05


class Engine(msgspec.Struct, frozen=True, kw_only=True):
    """One engine. All but `url` is written by the supervisor: `pid` is the group of its processes, `epoch` their life.

    `state` is "starting", "up", "dead" (and about to start again) or "given up".
    """

    url: str
    name: str = ""
    state: str = ""
    epoch: int | None = None
    pid: int | None = None


class FleetFile(msgspec.Struct, frozen=True, kw_only=True):
    """What a fleet file says. `host` and `pid` are where the supervisor runs, `started` is in Unix seconds."""

    engines: list[Engine]
    name: str = ""
    host: str = ""
    pid: int | None = None
    started: float | None = None
    model: str = ""
    kv_pool: str = ""

    @property
    def urls(self) -> list[str]:
        """The engines' base URLs."""
        return [engine.url for engine in self.engines]


def read_fleet_file(path: Path) -> FleetFile:
    """Read a fleet file, whoever wrote it.

    Raises:
        UsageError: It is missing or wrong; names the file and the place in it.
    """
    remedy = 'it must be a JSON list of URLs, or {"engines": [{"url": "http://HOST:PORT"}, ...]}'
    try:
        said = msgspec.json.decode(path.read_bytes(), type=list[str] | FleetFile)
    except OSError as error:
        raise UsageError(f"cannot read fleet file {path}: {error.strerror or error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"fleet file {path}: {error}; {remedy}") from error
    fleet = said if isinstance(said, FleetFile) else FleetFile(engines=[Engine(url=url) for url in said])
    _check(path, fleet.urls)
    return fleet


def _check(path: Path, urls: list[str]) -> None:
    if not urls:
        raise UsageError(f"fleet file {path} lists no engine; give at least one URL")
    try:
        require_distinct(urls)
    except UsageError as error:
        raise UsageError(f"fleet file {path}: {error}") from None


class FleetFolder:
    """The folder of the fleet `name`: `fleet.json`, the lock, and logs."""

    def __init__(self, name: str) -> None:
        """Name the folder, which need not exist.

        Raises:
            UsageError: That is no name for a fleet.
        """
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"{name!r} is no name for a fleet: use letters, digits, dots, dashes and underscores, 64 at most"
            )
        self.name = name
        self.path = fleets_folder() / name
        self.file = self.path / "fleet.json"
        self.logs = self.path / "logs"
        self.lock = self.path / "lock"

    def claim(self) -> int | None:
        """Take the lock, which lasts until the descriptor that is returned is closed everywhere; None if it is held.

        Raises:
            StorageError: The folder cannot be written.
        """
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            self.path.chmod(0o700)
            lock = os.open(self.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StorageError(
                f"the fleet's folder {self.path} cannot be written: {error.strerror}; mend that, or set XDG_STATE_HOME"
            ) from error
        deadline = time.monotonic() + _PROBE_S
        while not _locked(lock, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                os.close(lock)
                return None
            time.sleep(_POLL_S)
        return lock

    @property
    def held(self) -> bool:
        """Whether somebody runs this fleet, or is starting or ending it."""
        try:
            lock = os.open(self.lock, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            return not _locked(lock, fcntl.LOCK_SH)
        finally:
            os.close(lock)

    def read(self) -> FleetFile | None:
        """Return what the fleet's supervisor wrote last, None if it wrote nothing or has tidied up."""
        try:
            return read_fleet_file(self.file)
        except UsageError:
            if self.file.exists():
                raise
            return None

    def write(self, fleet: FleetFile) -> None:
        """Replace what `read` returns."""
        new = self.file.with_suffix(".new")
        new.write_bytes(msgspec.json.format(msgspec.json.encode(fleet), indent=2) + b"\n")
        new.replace(self.file)

    def clear(self) -> None:
        """Remove everything but the logs, `fleet.json` first; for the lock's holder."""
        self.file.unlink(missing_ok=True)
        for each in self.path.iterdir():
            if each.name not in _KEPT:
                shutil.rmtree(each) if each.is_dir() and not each.is_symlink() else each.unlink(missing_ok=True)


def _locked(lock: int, kind: int) -> bool:
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
        return True
    return False


def fleets_folder() -> Path:
    """Return where the fleets of this user are: `seer/fleets` among the programs' state."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "seer" / "fleets"


def known_fleets() -> list[str]:
    """Return the names of the fleets that run here, or did and were not put down."""
    folders = sorted(fleets_folder().glob("*/lock"))
    names = [folder.parent.name for folder in folders if _NAME.fullmatch(folder.parent.name)]
    return [name for name in names if FleetFolder(name).file.exists() or FleetFolder(name).held]


def is_path(name_or_file: str) -> bool:
    """Tell a fleet file's path from a fleet's name."""
    return "/" in name_or_file or name_or_file.endswith(".json")


def here(fleet: FleetFile) -> bool:
    """Whether the supervisor of the fleet runs, or ran, on this machine; a home folder may be shared by many."""
    return fleet.host in {"", socket.gethostname()}


def fleet_urls(name_or_file: str) -> list[str]:
    """Return the URLs of a fleet file, or of the fleet of that name, which must run on this machine.

    Raises:
        UsageError: The file is missing or wrong.
        FleetError: The fleet does not run.
    """
    if is_path(name_or_file):
        return read_fleet_file(Path(name_or_file)).urls
    folder = FleetFolder(name_or_file)
    fleet = folder.read() if folder.held else None
    if fleet is None:
        raise FleetError(
            f"fleet {name_or_file} does not run: start it with `seer fleet up {name_or_file}`, or name a fleet file "
            "(a path with a slash, or ending in .json)"
        )
    if not here(fleet):
        raise FleetError(f"fleet {name_or_file} runs on {fleet.host}, and its engines are reached from there only")
    return fleet.urls
