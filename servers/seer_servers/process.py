"""A child process, its descendants, and the promise that they end with their owner.

Invariants: the child leads no life of its own. Between owner and child stands a guard (this file, run as a program)
whose standard input is a pipe that only the owner holds open, so the pipe ends with the owner however the owner ends,
SIGKILL included. Then, and when the child exits or the guard is told to end, the child is asked to end and the whole
process group (guard, child, descendants) is killed. Nobody needs the owner's help to die. Socket files of vLLM lie in
a folder that goes with the guard.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

GRACE_S = 10.0  # from asking to killing; a vLLM server at rest ends in 1 to 3 s
SOCKETS_ENV = "VLLM_RPC_BASE_PATH"  # where vLLM makes its sockets' files, which it does not remove
POLL_S = 0.5  # how long a guard may overlook that its child has exited
TAIL_BYTES = 64 * 1024
_UNPRINTABLE = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|[^\x20-\x7e\t]")
_TROUBLE = re.compile(r"\w*(?:Error|Exception|Killed)\b|\berror:|\bexited with\b")


class Process:
    """One life of a child: started once, waited for, stopped once."""

    def __init__(self, child: asyncio.subprocess.Process, log: Path, log_start: int) -> None:
        self._child = child
        self._log = log
        self._log_start = log_start

    @classmethod
    async def start(cls, command: Sequence[str], env: Mapping[str, str], log: Path) -> Process:
        """Start `command` under a guard; both outputs are appended to `log`, whose folder is made."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            start = output.tell()  # before the child, which shares the file's position, writes
            child = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "seer_servers.process", *command),
                stdin=asyncio.subprocess.PIPE,
                stdout=output,
                stderr=output,
                env=dict(env),
                start_new_session=True,  # one group to kill, and out of reach of the terminal's Ctrl-C
            )
            return cls(child, log, start)

    @property
    def pid(self) -> int:
        """The guard's process id, which is also the id of the process group."""
        return self._child.pid

    @property
    def alive(self) -> bool:
        """Whether the guard still runs."""
        return self._child.returncode is None

    async def wait(self) -> None:
        """Return when the child and everything it started are gone."""
        await self._child.wait()
        self.kill()  # a guard that was killed itself could not do it

    async def stop(self) -> None:
        """Ask the child to end, kill it and its descendants after `GRACE_S` seconds, and wait for that."""
        if self._child.stdin:
            self._child.stdin.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GRACE_S + 2 * POLL_S):
                await self._child.wait()
        self.kill()
        await self._child.wait()

    def kill(self) -> None:
        """Kill the whole process group at once, as a crash would."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def last_words(self, count: int = 3) -> str:
        """Return the lines of this life's log that best tell why it ended: the last errors, else the last lines."""
        with self._log.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, size - TAIL_BYTES))
            text = log.read().decode(errors="replace")
        lines = [line for raw in text.splitlines() if (line := _UNPRINTABLE.sub("", raw).strip())]
        trouble = [line for line in lines if _TROUBLE.search(line) and " WARNING " not in line]
        return "\n".join((trouble or lines)[-count:])


def guard(command: Sequence[str]) -> None:
    """Run `command` until it exits, standard input ends or the owner is gone; then kill the process group, us too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    try:
        with tempfile.TemporaryDirectory(prefix="seer-", ignore_cleanup_errors=True) as sockets:
            _watch(command, {SOCKETS_ENV: sockets} | os.environ)
    finally:
        os.killpg(0, signal.SIGKILL)


def _watch(command: Sequence[str], env: Mapping[str, str]) -> None:
    owner = os.getppid()
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=env)  # noqa: S603 - our owner's words, no shell
    try:
        # The pipe tells at once; the parent's id also tells when somebody else has inherited the pipe's other end.
        while child.poll() is None and os.getppid() == owner and not select.select([0], [], [], POLL_S)[0]:
            pass
        if child.returncode is not None:
            print(f"exited with code {child.returncode}", flush=True)  # noqa: T201 - goes to the log
    finally:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(GRACE_S)


if __name__ == "__main__":
    guard(sys.argv[1:])
