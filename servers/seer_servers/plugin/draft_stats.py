"""What the drafter counts, and how the API process sees it.

The worker writes its counts to a file of its own now and then (a rename, so never half a page); asking the worker would
stop the engine for a step. Counts are totals since the engine's start.
"""

import atexit
import json
import os
import shutil
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

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
        self._published = 0.0

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

    def publish(self, **more: Any) -> None:
        """Show the counts, and `more`, to the API process."""
        path = os.environ.get(STATS_ENV)
        now = time.monotonic()
        if path and now - self._published >= PUBLISH_S:
            self._published = now
            write_page(Path(path), self.page() | more)


def write_page(path: Path, page: dict[str, Any]) -> None:
    """Replace the page."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(page), encoding="utf-8")
    temporary.replace(path)


def read_page() -> dict[str, Any] | None:
    """The worker's last page; None before the first, or in an engine that does not draft."""
    path = os.environ.get(STATS_ENV)
    try:
        page: dict[str, Any] | None = json.loads(Path(path).read_text(encoding="utf-8")) if path else None
    except FileNotFoundError:
        return None
    return page


def announce() -> None:
    """Choose the file, in the first process of an engine: those that it starts inherit the name."""
    if STATS_ENV not in os.environ:
        folder = Path(tempfile.gettempdir()) / f"seer-drafts-{uuid.uuid4().hex}"
        os.environ[STATS_ENV] = str(folder / "stats.json")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
