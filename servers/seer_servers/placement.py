"""Where each engine of a local fleet runs: its own CPU cores, or a GPU that it may have to share.

Invariant: what the engines of one fleet are given never overlaps, as long as there are as many cores as engines; with
more engines than GPUs each gets a fixed share of the memory, because engines that start together cannot measure it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import msgspec

from seer_async.errors import FleetError

GIB = 1 << 30
CPU_KV_BYTES = GIB
GPU_SHARE = 0.9  # of a shared GPU's memory, which leaves the driver and fragmentation the rest
GPU_OVERHEAD_BYTES = 3 * GIB  # a CUDA context, CUDA graphs and activations of one engine, beside its weights


class Placement(msgspec.Struct, frozen=True):
    """One engine's place: variables for its environment, and bytes for its KV cache (None: vLLM measures)."""

    env: dict[str, str]
    kv_bytes: int | None


def place(count: int, model: str) -> list[Placement]:
    """Spread `count` engines that serve `model` over this machine's GPUs, or over its CPU cores where it has none.

    Raises:
        FleetError: The GPUs cannot hold that many engines.
    """
    gpus = visible_gpus()
    return _on_gpus(count, gpus, _weight_bytes(model)) if gpus else _on_cores(count, usable_cores())


def usable_cores() -> list[int]:
    """Return the ids of the CPU cores that this process may use."""
    return sorted(os.sched_getaffinity(0))


def visible_gpus() -> list[tuple[str, int]]:
    """Return (id, bytes of memory) of each GPU this process may use; none where NVIDIA's driver does not answer."""
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=index,memory.total,uuid", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)  # noqa: S603 - fixed words, no shell
    if done.returncode != 0:
        return []
    rows = [[field.strip() for field in line.split(",")] for line in done.stdout.splitlines()]
    memory = {index: int(mib) << 20 for index, mib, _ in rows} | {uuid: int(mib) << 20 for _, mib, uuid in rows}
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [index for index, _, _ in rows] if allowed is None else allowed.split(",")
    return [(name, memory[name]) for name in names if name in memory]


def _weight_bytes(model: str) -> int:
    return sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))


def _on_cores(count: int, cores: list[int]) -> list[Placement]:
    each = max(1, len(cores) // count)
    placements = []
    for i in range(count):
        mine = [cores[(i * each + j) % len(cores)] for j in range(each)]
        placements.append(Placement({"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, mine))}, CPU_KV_BYTES))
    return placements


def _on_gpus(count: int, gpus: list[tuple[str, int]], weights: int) -> list[Placement]:
    placements = []
    for i in range(count):
        gpu, memory = gpus[i % len(gpus)]
        tenants = len(range(i % len(gpus), count, len(gpus)))
        kv_bytes = None if tenants == 1 else int(memory * GPU_SHARE / tenants) - weights - GPU_OVERHEAD_BYTES
        if kv_bytes is not None and kv_bytes <= 0:
            raise FleetError(f"{tenants} engines do not fit on GPU {gpu} ({memory / GIB:.0f} GiB): start fewer.")
        placements.append(Placement({"CUDA_VISIBLE_DEVICES": gpu}, kv_bytes))
    return placements
