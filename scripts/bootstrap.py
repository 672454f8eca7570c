# noqa: INP001 - a script, run by path before anything is installed
"""Make `.venv` hold all that Seer needs on this machine, and have the default model ready in the user's cache.

Invariants: only the standard library is used, so a bare Python 3.11 to 3.13 runs it, and an older one still parses it
and is told what is wrong; nothing but `.venv` and the caches of pip and Seer is written; `.venv/seer-setup` names what
`.venv` was completed from, so a second run changes nothing; whatever a person can mend ends in one sentence.
"""

import sys

try:
    import tomllib
except ImportError:  # what Python 3.11 brought is the first thing that an older one lacks
    VERSION = ".".join(map(str, sys.version_info[:3]))
    sys.exit("seer setup: this is Python " + VERSION + " and Seer needs 3.11 to 3.13: run `make PYTHON=python3.12`.")

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import platform
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "seer-setup"
LOG = VENV / "setup.log"

NEWEST_PYTHON = (3, 13)  # the newest that vLLM's compiled parts are published for
FREE_GB = {"cpu": 6, "gpu": 20}  # while pip unpacks a wheel, it and its content are both on disk
# vLLM imports these where it finds them, and their published wheels need the CUDA libraries that a CPU build lacks.
CUDA_ONLY = {"torchaudio", "torchcodec", "torchvision"}
# Mooncake's wheel loads these and does not bring them: Debian's packages, unpacked where seer_servers looks for them.
LIBRARY_PACKAGES = ("libibverbs1", "librdmacm1", "libnl-3-200", "libnl-route-3-200")
LIBRARIES = VENV / "lib" / "mooncake"
DISK_FULL = "the disk is full (pip also needs room in $TMPDIR): free some space and run the same again."


class SetupError(Exception):
    """Setup cannot go on; the message is one sentence that says what to do."""


def say(text: str) -> None:
    """Write `text` as it is, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


@contextlib.contextmanager
def step(what: str) -> Iterator[None]:
    """Say what is being done, and in the same line how many seconds it took."""
    say(f"seer setup: {what} ... ")
    started = time.monotonic()
    try:
        yield
    except BaseException:
        say("failed\n")
        raise
    say(f"{time.monotonic() - started:.1f} s\n")


def run(*command: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `command` to its end, its output captured in one piece."""
    words = [str(word) for word in command]
    return subprocess.run(  # noqa: S603 - our own words, no shell
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        cwd=cwd or ROOT,
        check=False,
    )


def build_kind() -> str:
    """Return "gpu" where NVIDIA's driver answers, else "cpu"."""
    return "gpu" if shutil.which("nvidia-smi") and run("nvidia-smi", "-L").returncode == 0 else "cpu"


def check_python() -> None:
    """Refuse an interpreter that cannot hold the installation.

    Raises:
        SetupError: It is too new, or its venv or ensurepip module is missing.
    """
    version = platform.python_version()
    if sys.version_info[:2] > NEWEST_PYTHON:
        raise SetupError(f"this is Python {version} and Seer needs 3.11 to 3.13: run `make PYTHON=python3.12`.")
    for module in ("venv", "ensurepip"):
        if importlib.util.find_spec(module) is None:
            raise SetupError(
                f"this Python has no {module} module: install the system package that brings it "
                "(python3-venv on Debian and Ubuntu) and run the same again."
            )


def check_disk(kind: str) -> None:
    """Refuse a disk that would fill up after minutes.

    Raises:
        SetupError: Too little is free.
    """
    free = shutil.disk_usage(ROOT).free / 1e9
    if free < FREE_GB[kind]:
        raise SetupError(f"{free:.1f} GB are free in {ROOT} and setup needs {FREE_GB[kind]}: free some or move Seer.")


def create_venv(base: str) -> None:
    """Create `.venv`, keeping one that an earlier run made for the same `base` and did not complete.

    Raises:
        SetupError: The venv module failed.
    """
    if not (PYTHON.exists() and STAMP.is_file() and STAMP.read_text().startswith(base)):
        with step(f"creating .venv with Python {platform.python_version()}"):
            made = run(sys.executable, "-m", "venv", "--clear", VENV)
            if made.returncode != 0:
                raise SetupError(f"{VENV} cannot be made: {made.stdout.strip().splitlines()[-1]}")
    STAMP.write_text(base)


def pip_install(*arguments: str | Path) -> None:
    """Install with the virtual environment's pip, which follows the user's own pip configuration.

    Raises:
        SetupError: It failed; what pip printed is in `.venv/setup.log`.
    """
    done = run(PYTHON, "-m", "pip", "--no-input", "--disable-pip-version-check", "install", *arguments)
    LOG.write_text(done.stdout)
    if done.returncode != 0:
        raise SetupError(explain(done.stdout))


def explain(output: str) -> str:
    """Return, for what a failed pip printed, the one sentence that a person needs."""
    if re.search(r"No space left|Errno 28|Disk quota exceeded", output):
        return DISK_FULL
    if re.search(r"connection broken by|Max retries exceeded|Temporary failure in name resolution", output):
        return "the package index cannot be reached: check the network and pip's settings, and run the same again."
    if re.search(r"No matching distribution found for torch\b", output):
        return (
            "pip finds no CPU build of the PyTorch that vLLM needs: add PyTorch's index of CPU wheels to pip's "
            "settings (PIP_EXTRA_INDEX_URL) and run the same again."
        )
    errors = [line for line in output.splitlines() if line.startswith("ERROR:")]
    return f"pip failed, see {LOG}: {errors[-1].removeprefix('ERROR: ') if errors else 'it gave no reason'}"


def engine_requirements(engine: str) -> Iterator[str]:
    """Yield the requirements of the installed distribution `engine`, less those that only a CUDA build can load."""
    site_packages = [str(path) for path in VENV.glob("lib/python*/site-packages")]
    (distribution,) = importlib.metadata.distributions(name=engine.partition("==")[0], path=site_packages)
    for requirement in distribution.requires or ():
        name = re.match(r"[\w.-]+", requirement)
        if name and name[0] not in CUDA_ONLY:
            yield requirement


def install_cpu() -> None:
    """Install vLLM's CPU build alone, then in one resolution all that it and Seer need."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    engine, *others = extras["cpu"]
    with step(f"installing {engine}"):
        pip_install("--no-deps", engine)
    requirements = VENV / "requirements.txt"
    requirements.write_text("\n".join([*others, *engine_requirements(engine)]))
    with step("installing PyTorch for CPUs, Seer and what they need (minutes)"):
        pip_install("--requirement", requirements, "--editable", ".[dev,mooncake]")
    install_libraries()


def install_gpu() -> None:
    """Install Seer with vLLM's CUDA build, all of which pip resolves by itself."""
    with step("installing vLLM for CUDA, Seer and what they need (many minutes)"):
        pip_install("--editable", ".[dev,gpu]")


def missing_libraries() -> list[str]:
    """Return the shared libraries that are neither the system's nor unpacked in `.venv`."""
    missing = []
    for name in ("libibverbs.so.1", "librdmacm.so.1"):
        try:
            ctypes.CDLL(name)
        except OSError:
            if not (LIBRARIES / name).exists():
                missing.append(name)
    return missing


def install_libraries() -> None:
    """Unpack the shared libraries that Mooncake needs into `.venv`, where the system lacks them; needs no root.

    Only the mooncake KV pool needs them, so a system that is not Debian's is told and setup goes on.
    """
    if not missing_libraries():
        return
    with step("unpacking Mooncake's shared libraries"), tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if shutil.which("apt-get") and shutil.which("dpkg-deb"):
            run("apt-get", "download", *LIBRARY_PACKAGES, cwd=folder)
        for package in folder.glob("*.deb"):
            run("dpkg-deb", "--extract", package, folder)
        LIBRARIES.mkdir(parents=True, exist_ok=True)
        for library in folder.glob("**/lib/*/lib*.so.*"):  # of /lib and /usr/lib
            shutil.copy2(library, LIBRARIES, follow_symlinks=False)
    missing = missing_libraries()
    if missing:
        say(f"seer setup: {' and '.join(missing)} must be installed by hand before --kv-pool mooncake can be used\n")


def prepare_venv() -> None:
    """Bring `.venv` to what pyproject.toml, this script, the interpreter and the machine ask for."""
    kind = build_kind()
    # A moved virtual environment does not work, so its path is part of what it was made for.
    base = f"{kind} {platform.python_version()} {VENV}\n"
    inputs = (ROOT / "pyproject.toml").read_bytes() + Path(__file__).read_bytes()
    complete = base + hashlib.sha256(inputs).hexdigest() + "\n"
    if PYTHON.exists() and STAMP.is_file() and STAMP.read_text() == complete:
        return
    check_python()
    check_disk(kind)
    create_venv(base)
    install_gpu() if kind == "gpu" else install_cpu()
    STAMP.write_text(complete)


def prepare_model() -> None:
    """Have the installed Seer fetch and convert the default model, unless it is in the cache.

    Raises:
        SetupError: It could not; the message is Seer's own.
    """
    if run(PYTHON, "-m", "seer_servers.model", "--check").returncode == 0:
        return
    with step("fetching and converting the default model"):
        made = run(PYTHON, "-m", "seer_servers.model")
        if made.returncode != 0:
            raise SetupError(made.stdout.strip().splitlines()[-1])


def main() -> int:
    """Set up; return the process's exit code."""
    try:
        with Path(__file__).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # a second `make` waits, and finds the work done
            prepare_venv()
            prepare_model()
    except SetupError as error:
        sys.stderr.write(f"seer setup: {error}\n")
        return 1
    except OSError as error:
        remedy = DISK_FULL if error.errno == errno.ENOSPC else f"{error}: mend that and run the same again."
        sys.stderr.write(f"seer setup: {remedy}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("seer setup: stopped; the same command goes on from here.\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
