"""The pool as a vLLM KV connector, loaded by module path: no fork, no registration.

    --kv-transfer-config '{"kv_connector": "SeerShmConnector", "kv_role": "kv_both",
      "kv_connector_module_path": "seer_servers.kvpool.shm.connector", "kv_load_failure_policy": "recompute",
      "kv_connector_extra_config": {"root": "/dev/shm/seer-me", "capacity_bytes": 4294967296}}'

Invariants: this file only translates; the scheduler's half decides (`scheduler_side`), the workers' half moves bytes
(`worker_side`). What the pool cannot serve is refused when the engine starts, never found out by wrong output.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.logger import init_logger

from seer_servers.kvpool.shm.fingerprint import fingerprint
from seer_servers.kvpool.shm.ledger import Ledger
from seer_servers.kvpool.shm.plan import Plan
from seer_servers.kvpool.shm.scheduler_side import SchedulerSide
from seer_servers.kvpool.shm.settings import Settings
from seer_servers.kvpool.shm.store import Store
from seer_servers.kvpool.shm.view import publish_fingerprint
from seer_servers.kvpool.shm.worker_side import WorkerSide

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from seer_servers.kvpool.shm.worker_side import Cache

logger = init_logger("vllm.seer")
_JANITOR_CHECK_STEPS = 64


class SeerShmConnector(KVConnectorBase_V1):  # type: ignore[misc]  # vLLM is not typed
    """Blocks in shared memory, for all engines of this host that name the same `root`.

    Raises:
        ValueError: The engine has something that the pool cannot serve; says what to change.
    """

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        _check(vllm_config, kv_cache_config)
        settings = Settings.of(self._kv_transfer_config)
        self._store = Store(settings.root, settings.spill)
        self._ledger = Ledger(settings.root)
        self._row = self._ledger.join(str(self._kv_transfer_config.engine_id))
        self._worker: WorkerSide | None = None
        self._scheduler: SchedulerSide | None = None
        # A copy within memory is short, and goes before the step that needs it; one to a GPU must not hold it up.
        self._between_steps = vllm_config.device_config.device_type != "cpu"
        self._bad: set[int] = set()
        self._steps = 0
        if role == KVConnectorRole.SCHEDULER:
            self._janitor = Janitors(settings)
            mark = fingerprint(vllm_config, kv_cache_config)
            publish_fingerprint(settings.root, str(self._kv_transfer_config.engine_id), mark)
            self._scheduler = SchedulerSide(
                self._store,
                self._row,
                mark,
                block_size=vllm_config.cache_config.block_size,
                ranks=vllm_config.parallel_config.tensor_parallel_size,
                between_steps=self._between_steps,
            )

    @property
    def requires_kv_delivery(self) -> bool:
        """A block that is not saved is a miss later, no more."""
        return False

    # In the scheduler

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """See the base class."""
        assert self._scheduler is not None
        return self._scheduler.find(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """See the base class."""
        assert self._scheduler is not None
        self._scheduler.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Plan:
        """See the base class."""
        assert self._scheduler is not None
        self._steps += 1
        if self._steps % _JANITOR_CHECK_STEPS == 0:
            self._janitor.ensure()
        return self._scheduler.plan(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """See the base class."""
        assert self._scheduler is not None
        requests = (connector_output.finished_recving or set()) if self._between_steps else None
        self._scheduler.loaded(requests, connector_output.invalid_block_ids)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """See the base class."""
        del block_ids
        assert self._scheduler is not None
        return False, self._scheduler.finished(request)

    def reset_cache(self) -> bool:
        """Keep the pool: new weights have a new salt, and other engines use the old blocks still."""
        return True

    # In the workers

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """See the base class."""
        num_blocks = self._kv_cache_config.num_blocks
        cache = _cache(kv_caches, num_blocks)
        self._worker = WorkerSide(self._store, self._ledger, self._row, get_tensor_model_parallel_rank(), cache)
        logger.info(
            "KV pool %s: %d blocks of %.2f MiB can be shared.",
            self._store.root,
            num_blocks,
            cache.block_bytes / 2**20,
        )

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """See the base class."""
        del forward_context, kwargs
        if self._worker is not None:
            self._worker.load(self._plan)

    def wait_for_save(self) -> None:
        """See the base class."""
        if self._worker is not None:
            self._worker.save(self._plan)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """See the base class. vLLM asks for the blocks with errors right after this."""
        del finished_req_ids
        if self._worker is None:
            return None, None
        loaded, self._bad = self._worker.take_results()
        return None, loaded if self._between_steps else None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """See the base class."""
        return self._bad

    def shutdown(self) -> None:
        """See the base class."""
        if self._worker is not None:
            self._worker.close()

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Whole blocks are loaded between steps, not layers within one."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: AttentionMetadata, **kwargs: Any
    ) -> None:
        """Whole blocks are saved after the forward."""

    @property
    def _plan(self) -> Plan:
        plan = self._get_connector_metadata()
        assert isinstance(plan, Plan)
        return plan


class Janitors:
    """Our candidate for the pool's janitor, started again when it has died."""

    def __init__(self, settings: Settings) -> None:
        self._command = [sys.executable, "-m", "seer_servers.kvpool.shm.janitor", *settings.janitor_arguments()]
        self._child: subprocess.Popen[bytes] | None = None
        self.ensure()

    def ensure(self) -> None:
        """Start it if it does not run. It ends by itself soon after us."""
        if self._child is None or self._child.poll() is not None:
            self._child = subprocess.Popen(  # noqa: S603 - our own words, no shell
                self._command,
                stdin=subprocess.PIPE,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,  # whoever kills the engine's process group must not kill the one who tidies up
            )


def _cache(kv_caches: dict[str, torch.Tensor], num_blocks: int) -> Cache:
    device = next(iter(kv_caches.values())).device.type
    if device == "cpu":
        from seer_servers.kvpool.shm.host_cache import HostCache  # noqa: PLC0415 - one of the two

        return HostCache(kv_caches, num_blocks)
    if device == "cuda":
        from seer_servers.kvpool.shm.device_cache import DeviceCache  # noqa: PLC0415 - one of the two

        return DeviceCache(kv_caches, num_blocks)
    raise ValueError(f"the shared-memory KV pool serves CPUs and CUDA GPUs, not {device!r}: use --kv-pool none")


def _check(config: VllmConfig, kv_cache: KVCacheConfig) -> None:
    parallel, cache, transfer = config.parallel_config, config.cache_config, config.kv_transfer_config
    assert transfer is not None
    problems = {
        "models with several kinds of KV cache (hybrid attention)": len(kv_cache.kv_cache_groups) != 1,
        "tensor parallelism": parallel.tensor_parallel_size > 1,  # blocks are named by rank, but it was never tried
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "context parallelism": parallel.decode_context_parallel_size > 1,
        "--no-enable-prefix-caching": not cache.enable_prefix_caching,
        "a prefix-caching hash other than sha256": not str(cache.prefix_caching_hash_algo).startswith("sha256"),
        'kv_load_failure_policy other than "recompute"': transfer.kv_load_failure_policy != "recompute",
        "several nodes for one engine": parallel.nnodes > 1,
    }
    if found := [name for name, present in problems.items() if present]:
        raise ValueError(f"the shared-memory KV pool does not support {', '.join(found)}: use --kv-pool none")
