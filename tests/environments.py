"""Trainers' own packages, each in an environment of its own, because their requirements contradict ours.

An environment is made by pip from the package index the first time, and stays in the user's cache. Invariant: one that
is used is whole, because its folder gets the file `whole` last; who makes it holds a lock.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import subprocess
import sys
import sysconfig
import venv
from typing import TYPE_CHECKING, Any

import pytest

from seer_servers.model import models_folder

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_INSTALL_S = 240
_RUN_S = 280


class Environment:
    """A Python with some packages, in which scripts of the tests run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def run(self, script: Path, *arguments: str, cwd: Path | None = None) -> Any:
        """Run a script of the tests; returns the JSON value on the last line that it prints."""
        command = [str(self._folder / "bin" / "python"), str(script), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_RUN_S, check=False, cwd=cwd)
        assert done.returncode == 0, f"{script.name} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        return json.loads(done.stdout.splitlines()[-1])


def environment(name: str, *pip: str, beside_ours: bool = False) -> Environment:
    """The environment that `pip install` with these arguments makes; `beside_ours`: on top of our own packages."""
    digest = hashlib.sha256(repr((pip, beside_ours, sys.version, sys.prefix)).encode()).hexdigest()[:12]
    folder = models_folder().parent / "tests" / f"{name}-{digest}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "whole").exists():
            shutil.rmtree(folder, ignore_errors=True)
            _make(folder, pip, beside_ours=beside_ours)
            (folder / "whole").touch()
    return Environment(folder)


def _make(folder: Path, pip: Sequence[str], *, beside_ours: bool) -> None:
    venv.create(folder, symlinks=True)
    if beside_ours:
        names = sysconfig.get_path("purelib", vars={"base": str(folder)})
        (folder / names / "ours.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = str(folder / "bin" / "python")
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", *pip]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_INSTALL_S, check=False)
    except subprocess.TimeoutExpired:
        pytest.fail(f"the package index did not serve {' '.join(pip)} within {_INSTALL_S} s")
    if done.returncode:
        pytest.fail(f"cannot install {' '.join(pip)}, which this test runs:\n{done.stderr[-2000:]}")
