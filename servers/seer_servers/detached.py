"""A supervised fleet, seen from the commands that start and end it.

Invariants: a fleet is started by whoever holds its folder's lock, and the lock goes to the supervisor without being
free in between; a process is signalled only while the lock says that it is the fleet's supervisor; engines that lost
theirs end by themselves (process.py) and are waited for, never killed by a number out of a file.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from seer_async.errors import FleetError
from seer_servers.fleetfile import FleetFile, FleetFolder, here
from seer_servers.process import GRACE_S
from seer_servers.supervisor import Order, Report

if TYPE_CHECKING:
    from collections.abc import Callable

END_S = 2 * GRACE_S + 10  # the engines, then the pool's services
_POLL_S = 0.1


def claim(folder: FleetFolder) -> int:
    """Take the folder's lock for a new fleet, and clear away what a supervisor that was killed left there.

    Raises:
        FleetError: The fleet runs already; says what to do.
    """
    lock = folder.claim()
    if lock is None:
        raise FleetError(
            f"fleet {folder.name} runs already: look at it with `seer fleet status {folder.name}`, end it with "
            f"`seer fleet down {folder.name}`, or choose another name"
        )
    lost = folder.read()
    if lost is not None and not here(lost):
        raise FleetError(f"fleet {folder.name} was started on {lost.host}: use that machine, or another name")
    folder.clear()
    if lost is not None:
        _await_orphans(lost)
    return lock


def _await_orphans(lost: FleetFile) -> None:
    groups = [engine.pid for engine in lost.engines if engine.pid]
    deadline = time.monotonic() + GRACE_S + 5
    while left := [group for group in groups if _lives(group)]:
        if time.monotonic() > deadline:
            raise FleetError(f"engines of fleet {lost.name} do not end: look at the process groups {left}")
        time.sleep(_POLL_S)


def _lives(group: int) -> bool:
    """Whether a process group has a member that is no zombie: there may be nobody who reaps those."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, leader = stat.read_text().rpartition(")")[2].split()[:3]
            if int(leader) == group and state not in "ZX":
                return True
    return False


def start(folder: FleetFolder, lock: int, order: Order, say: Callable[[str], None]) -> None:
    """Start a supervisor, which takes the lock over, and return when the fleet is up; `say` is told what happens.

    Raises:
        FleetError: The fleet does not start; nothing is left running. Nor is it when this is interrupted.
    """
    supervisor = _supervisor(folder, lock)
    assert supervisor.stdin
    try:
        with supervisor.stdin as orders:
            orders.write(msgspec.json.encode(order))
        _follow(supervisor, say)
    except BaseException:
        supervisor.terminate()
        supervisor.wait()
        raise


def _supervisor(folder: FleetFolder, lock: int) -> subprocess.Popen[bytes]:
    with (folder.logs / "fleet.log").open("ab") as log:
        supervisor = subprocess.Popen(  # noqa: S603 - our own words, no shell
            [sys.executable, "-m", "seer_servers.supervisor", str(lock)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            pass_fds=[lock],
            start_new_session=True,  # out of reach of the terminal's Ctrl-C and of its end
        )
    os.close(lock)
    return supervisor


def _follow(supervisor: subprocess.Popen[bytes], say: Callable[[str], None]) -> None:
    assert supervisor.stdout
    for line in supervisor.stdout:
        report = msgspec.json.decode(line, type=Report)
        if report.kind == "failed":
            raise FleetError(report.text)
        say(report.text)
        if report.kind == "up":
            return
    raise FleetError("the fleet's supervisor ended without a word: look into logs/fleet.log in the fleet's folder")


def end(folder: FleetFolder, say: Callable[[str], None]) -> bool:
    """End the fleet, or clear away what is left of it; False if there was nothing to end.

    Raises:
        FleetError: It runs on another machine, or does not end.
    """
    if folder.held:
        fleet = _file_of_holder(folder)
        if not here(fleet):
            raise FleetError(f"fleet {folder.name} runs on {fleet.host}: put it down there")
        say(f"fleet {folder.name} is stopping")
        _end_supervisor(folder, fleet)
    elif not folder.file.exists():
        return False
    os.close(claim(folder))
    return True


def _file_of_holder(folder: FleetFolder) -> FleetFile:
    """What the lock's holder wrote; one that has only just begun needs a moment."""
    deadline = time.monotonic() + END_S
    while folder.held and time.monotonic() < deadline:
        if (fleet := folder.read()) is not None and (not here(fleet) or _has_open(fleet.pid, folder.lock)):
            return fleet
        time.sleep(_POLL_S)
    raise FleetError(f"fleet {folder.name} is starting or ending just now: try again")


def _has_open(pid: int | None, file: Path) -> bool:
    """Whether a process has `file` open: a number that somebody else has by now does not."""
    with contextlib.suppress(OSError):
        return any(each.samefile(file) for each in Path(f"/proc/{pid}/fd").iterdir() if each.exists())
    return False


def _end_supervisor(folder: FleetFolder, fleet: FleetFile) -> None:
    """SIGTERM, and SIGKILL where that does not help: its engines end either way."""
    assert fleet.pid is not None
    for how in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.kill(fleet.pid, how)
        if _let_go(folder):
            return
    raise FleetError(f"fleet {folder.name} does not end: look at its supervisor, process {fleet.pid}")


def _let_go(folder: FleetFolder) -> bool:
    deadline = time.monotonic() + END_S
    while folder.held and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return not folder.held
