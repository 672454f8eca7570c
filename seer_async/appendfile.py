"""A file of lines that is only ever appended to.

Invariant: after `append` returns, the whole line is with the operating system; after it raises, the file ends where it
did before, so a full disk never leaves half a line.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


class AppendFile:
    """An open file to append lines to; `mode` is that of a new file."""

    def __init__(self, path: Path, mode: int = 0o644) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, mode)
        self._size = os.fstat(self._file).st_size

    def append(self, line: bytes) -> None:
        """Write one line, its newline included; raises OSError when the disk refuses."""
        written = 0
        try:
            while written < len(line):
                written += os.write(self._file, line[written:] if written else line)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._size)
            raise
        self._size += written

    def sync(self) -> None:
        """Wait until everything is on the disk, so that it outlives a power cut."""
        os.fsync(self._file)

    def close(self) -> None:
        """Close the file; further appends fail."""
        os.close(self._file)
