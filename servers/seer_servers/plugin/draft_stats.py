"""What the drafter counts, and how the API process sees it.

The worker writes its counts to a file of its own now and then (a rename, so never half a page); asking the worker would
stop the engine for a step. Counts are totals since the engine's start. Of several workers (ranks that draft alike, or
data-parallel ones behind one API process) the first that comes writes.

Invariant: nothing that goes wrong with the file reaches the engine.
"""

import atexit
import fcntl
import json
import os
import shutil
import tempfile
import time
import uuid
from pathlib import Path
from typing import IO, Any

from vllm.logger import init_logger

logger = init_logger("vllm.seer")

STATS_ENV = "SEER_DRAFT_STATS"  # set by the API process for its workers
PUBLISH_S = 0.5
MAX_GROUPS = 256  # the latest ones have their acceptance told apart


class DraftStats:
    """Counts of one drafter."""

    def __init__(self) -> None:
        self.steps = 0
        self._seconds = 0.0
        self._steps_off = 0
        self._switch_offs = 0
        self._drafted: list[int] = []  # by position
        self._accepted: list[int] = []
        self._requests = 0  # drafts verified, one a request and step
        self._groups: dict[str, list[int]] = {}  # [verified drafts, drafted tokens, accepted tokens]

    def step(self, seconds: float, *, off: bool, switch_offs: int) -> None:
        """Count a step that the drafter took `seconds` of."""
        self.steps += 1
        self._seconds += seconds
        self._steps_off += off
        self._switch_offs = switch_offs

    def verified(self, group: str, drafted: int, accepted: int) -> None:
        """Count one request's draft."""
        while len(self._drafted) < drafted:
            self._drafted.append(0)
            self._accepted.append(0)
        for position in range(drafted):
            self._drafted[position] += 1
            self._accepted[position] += position < accepted
        self._requests += 1
        counts = self._groups.pop(group, None) or [0, 0, 0]
        self._groups[group] = [counts[0] + 1, counts[1] + drafted, counts[2] + accepted]
        if len(self._groups) > MAX_GROUPS:
            del self._groups[next(iter(self._groups))]

    def page(self) -> dict[str, Any]:
        """The counts. `draft_s` is the drafter's own time; `accepted[i]` of `drafted[i]` tokens at position i."""
        return {
            "steps": self.steps,
            "steps_off": self._steps_off,
            "switch_offs": self._switch_offs,
            "draft_s": self._seconds,
            "verified": self._requests,
            "drafted": self._drafted,
            "accepted": self._accepted,
            "by_group": self._groups,
        }


class Publisher:
    """Shows one drafter's counts to the API process, twice a second at most."""

    def __init__(self) -> None:
        path = os.environ.get(STATS_ENV)
        self._path = Path(path) if path else None
        self._published = 0.0
        self._lock: IO[str] | None = None  # kept open: closed, it is another's
        self._failed = False

    def due(self) -> bool:
        """Whether it is time for a page; then the next pause begins."""
        now = time.monotonic()
        if self._path is None or now - self._published < PUBLISH_S:
            return False
        self._published = now
        return True

    def publish(self, page: dict[str, Any]) -> None:
        """Replace the page, unless another process writes it; a disk that is full costs the counts, not the engine."""
        assert self._path is not None, "due() comes first"
        try:
            self._path.parent.mkdir(mode=0o700, exist_ok=True)
            if self._is_mine(self._path):
                temporary = self._path.with_suffix(".new")
                temporary.write_text(json.dumps(page), encoding="utf-8")
                temporary.replace(self._path)
        except OSError as error:
            if not self._failed:
                logger.warning("Seer drafting: its counts cannot be shown (%s); drafting goes on.", error)
            self._failed = True

    def _is_mine(self, path: Path) -> bool:
        """Whether this process writes the page: the first that asks, until it ends."""
        self._lock = self._lock or path.with_suffix(".lock").open("w", encoding="utf-8")
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def read_page() -> dict[str, Any] | None:
    """The worker's last page; None before the first, or in an engine that does not draft."""
    path = os.environ.get(STATS_ENV)
    try:
        page: dict[str, Any] | None = json.loads(Path(path).read_text(encoding="utf-8")) if path else None
    except OSError:
        return None
    return page


def announce() -> None:
    """Choose the file, in the first process of an engine: those that it starts inherit the name."""
    if STATS_ENV not in os.environ:
        folder = Path(tempfile.gettempdir()) / f"seer-drafts-{uuid.uuid4().hex}"
        os.environ[STATS_ENV] = str(folder / "stats.json")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
