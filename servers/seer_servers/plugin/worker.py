"""Puts the patches into each worker process and lets the worker report what it can do.

The patches wait for `WorkerWrapperBase.init_device`: by then vLLM has put its platform's own kernels in place,
has not built the model runner, and knows which of its two runners it will build. No other process pays for the
import of a runner. The API server asks the workers themselves: `collective_rpc("seer_support")`.
"""

import functools
import uuid
from collections.abc import Callable
from typing import Any

import vllm
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.logger import init_logger
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.worker_base import WorkerWrapperBase

from seer_servers.plugin import continuation, drafting, seeds, verification
from seer_servers.plugin.patching import Function, Patch, UnsupportedVllmError, apply_all, check_signature

logger = init_logger("vllm.seer")

SUPPORTED_RELEASE = "0.32."
TRANSFER = "seer_files"  # as --weight-transfer-config names it
BOOT_ID = str(uuid.uuid4())  # names this life of the worker process


@functools.cache  # vLLM may call the plug-in again in the same process
def hook() -> None:
    """Have the workers of this process patch it before they build their model runner, and let them read checkpoints."""
    apply_all(
        (
            Patch(WorkerWrapperBase, "init_device", ("self",), _around_init_device),
            *drafting.scheduler_patches(NewRequestData),
        )
    )
    WeightTransferEngineFactory.register_engine(TRANSFER, "seer_servers.plugin.checkpoints", "CheckpointFiles")


def _around_init_device(init_device: Function) -> Function:
    def _init_device(wrapper: Any) -> Any:
        wrapper.seer_support = functools.partial(dict, support(wrapper.vllm_config))
        wrapper.seer_draft_config = lambda changes: drafting.configure(wrapper.worker.model_runner, changes)
        result = init_device(wrapper)
        drafting.profile_when_warm(wrapper.worker)
        return result

    return _init_device


def support(config: Any) -> dict[str, Any]:
    """Patch this process for a worker of `config`; returns its boot_id, runner and capabilities."""
    v2 = bool(config.use_v2_model_runner)
    installers = _V2 if v2 else _V1
    held = [name for name, install in installers.items() if _succeeds(name, install)]
    if config.speculative_config is not None:
        exact = _succeeds("drafts", functools.partial(_v2_drafts, config) if v2 else _v1_drafts)
        if not exact and "position_seeds" in held:
            # vLLM's own rejection sampler: lossless, but which of a position's draws is used depends on the drafts.
            held.remove("position_seeds")
        held += ["drafts"] if exact else []
    return {"boot_id": BOOT_ID, "runner": "v2" if v2 else "v1", "capabilities": held}


def _succeeds(name: str, install: Callable[[], None]) -> bool:
    try:
        if not vllm.__version__.startswith(SUPPORTED_RELEASE):
            raise UnsupportedVllmError(f"this is vLLM {vllm.__version__}")  # noqa: TRY301 - one way to say no
        install()
    except Exception as error:  # noqa: BLE001 - whatever it is, the engine starts without the capability
        logger.warning("Seer capability %s is off: %s. Install vLLM 0.32.0 to have it.", name, error)
        return False
    return True


# The runners are imported where they are patched: each is heavy, and a worker has only one.


def _v1_classes() -> tuple[type, type]:
    from vllm.v1.worker.gpu_input_batch import CachedRequestState  # noqa: PLC0415
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner  # noqa: PLC0415

    return GPUModelRunner, CachedRequestState


@functools.cache
def _v1_seeds() -> None:
    apply_all(seeds.v1_patches(*_v1_classes()))


@functools.cache
def _v1_continuation() -> None:
    apply_all(continuation.v1_patches(*_v1_classes()))


@functools.cache
def _v1_drafts() -> None:
    from vllm.v1.sample import rejection_sampler  # noqa: PLC0415

    apply_all((*verification.v1_patches(rejection_sampler), *drafting.v1_patches(_v1_classes()[0])))


def _v2_seeds() -> None:
    """Nothing to patch, but the sampler must still be the one that seeds.py speaks of."""
    from vllm.v1.worker.gpu.sample.sampler import Sampler  # noqa: PLC0415

    check_signature(Sampler, "_sample_random", seeds.V2_SAMPLE_RANDOM)


@functools.cache
def _v2_continuation() -> None:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner  # noqa: PLC0415

    apply_all(continuation.v2_patches(GPUModelRunner))


def _v2_drafts(config: Any) -> None:
    from seer_servers.plugin import gpu_drafting  # noqa: PLC0415 - it needs Triton

    if not gpu_drafting.wanted(config):
        raise UnsupportedVllmError("this engine drafts by other means than Seer's")
    gpu_drafting.install(config)


_V1: dict[str, Callable[[], None]] = {"position_seeds": _v1_seeds, "continuation": _v1_continuation}
_V2: dict[str, Callable[[], None]] = {"position_seeds": _v2_seeds, "continuation": _v2_continuation}
