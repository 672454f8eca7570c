"""What the GPU kernels' interpreter takes, a compiler may not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="the plug-in runs inside vLLM")
pytest.importorskip("triton", reason="the kernels are Triton's")

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "servers/seer_servers/plugin/gpu_kernels.py"


@pytest.mark.timeout(600)
def test_all_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-m", "tests.vllm.compile_kernels"]
    done = subprocess.run(command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr
    written = re.findall(r"^def (_\w+_kernel)\(", KERNELS.read_text(), re.MULTILINE)
    assert set(done.stdout.split()) == set(written)
    assert len(written) > 5
