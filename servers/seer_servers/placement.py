"""Where each engine of a local fleet runs, on CPU cores or on a GPU that it may share, and which options suit it there.

Invariant: engines of one fleet are not promised the same thing twice. Cores are shared out while there are as many as
engines; engines that share a GPU get fixed parts of its memory, because those that start together cannot measure it.
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
GPU_SHARE = 0.9  # of a shared GPU's memory; the driver and fragmentation take the rest
GPU_OVERHEAD_BYTES = 3 * GIB  # one engine's CUDA context, CUDA graphs and activations, beside its weights
BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # x86 and Arm, as Linux calls them


class Placement(msgspec.Struct, frozen=True):
    """One engine's place: variables for its environment, and the vLLM options that suit it unless others are asked for.

    An option whose value is None is a switch.
    """

    env: dict[str, str]
    options: dict[str, str | None]
    gpu: bool = False


def place(count: int, model: str, kv_bytes: int | None = None) -> list[Placement]:
    """Spread `count` engines that serve `model` over this machine's GPUs, or over its CPU cores where it has none.

    `kv_bytes` is what each is going to keep KV in, if that is known.

    Raises:
        FleetError: The GPUs cannot hold that many engines.
    """
    gpus = visible_gpus()
    return _on_gpus(count, gpus, _weight_bytes(model), kv_bytes) if gpus else _on_cores(count, usable_cores())


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
    memory = {name: int(mib) << 20 for index, mib, uuid in rows for name in (index, uuid)}
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [index for index, _, _ in rows] if allowed is None else allowed.split(",")
    return [(name, memory[name]) for name in names if name in memory]


def has_bfloat16() -> bool:
    """Tell whether this machine's CPU computes in bfloat16; where it does not, float32 is several times as fast."""
    return not BFLOAT16_FLAGS.isdisjoint(Path("/proc/cpuinfo").read_text().split())


def _weight_bytes(model: str) -> int:
    return sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))


def _on_cores(count: int, cores: list[int]) -> list[Placement]:
    each = max(1, len(cores) // count)
    # Compiling takes minutes at every start and gains a fifth (design/fleet.md).
    options = {
        "--kv-cache-memory-bytes": str(CPU_KV_BYTES),
        "--enforce-eager": None,
        "--weight-transfer-config": '{"backend": "seer_files"}',  # the one of all that CPUs have
    }
    if not has_bfloat16():
        options["--dtype"] = "float32"
    shares = [[cores[(i * each + j) % len(cores)] for j in range(each)] for i in range(count)]
    return [Placement(_openmp(share), options) for share in shares]


def _openmp(cores: list[int]) -> dict[str, str]:
    """Return the environment of an engine that computes on `cores`."""
    env = {
        # The model runs in the engine's process: apart, both spin while they wait for each other and waste a core each.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": str(len(cores)),
    }
    if len(cores) > 1:  # one thread needs no neighbours, and runs best wherever there is room
        env |= {"OMP_PLACES": f"{{{','.join(map(str, cores))}}}", "OMP_PROC_BIND": "true"}
    return env


def _on_gpus(count: int, gpus: list[tuple[str, int]], weights: int, asked: int | None) -> list[Placement]:
    placements = []
    for i in range(count):
        gpu, memory = gpus[i % len(gpus)]
        tenants = len(range(i % len(gpus), count, len(gpus)))
        options: dict[str, str | None] = {}
        if tenants > 1 or asked:
            own = weights + GPU_OVERHEAD_BYTES
            share = memory * GPU_SHARE / tenants
            kv_bytes = asked or int(share) - own
            if kv_bytes <= 0 or own + kv_bytes > share:
                raise FleetError(f"{tenants} engines do not fit on GPU {gpu} ({memory / GIB:.0f} GiB): start fewer.")
            options["--kv-cache-memory-bytes"] = str(kv_bytes)
            # vLLM wants so much to be free when it starts: beside an engine that already runs, its usual 0.92 are not.
            options["--gpu-memory-utilization"] = f"{(own + kv_bytes) / memory:.3f}"
        placements.append(Placement({"CUDA_VISIBLE_DEVICES": gpu}, options, gpu=True))
    return placements
