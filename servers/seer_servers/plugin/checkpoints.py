"""Weights from files: the transfer engine `seer_files`, for trainers that share a disk or a memory with the engines.

    vllm serve ... --weight-transfer-config '{"backend": "seer_files"}'
    POST /update_weights {"update_info": {"path": "/checkpoints/step-12"}}

Invariants: a file is safetensors, nothing is unpickled; when an update is answered, every parameter that the model
samples with is the checkpoint's. One that fails leaves a model that must not be sampled from before the next update,
and that the next update makes whole.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.weight_utils import safetensors_weights_iterator


@dataclass
class NoInit(WeightTransferInitInfo):  # type: ignore[misc]  # vLLM has no types here
    """There is nothing to agree on beforehand; /init_weight_transfer_engine may be called and need not."""


@dataclass
class Checkpoint(WeightTransferUpdateInfo):  # type: ignore[misc]  # vLLM has no types here
    """A folder with all tensors of the model as safetensors files, at a path of the engine's machine."""

    path: str

    def files(self) -> list[str]:
        """The files; ValueError if there are none."""
        found = [str(file) for file in Path(self.path).glob("*.safetensors")]
        if not found or not Path(self.path).is_absolute():
            raise ValueError(f"{self.path} is not the absolute path of a folder with safetensors files on this machine")
        return found


class CheckpointFiles(WeightTransferEngine[NoInit, Checkpoint]):  # type: ignore[misc]  # vLLM has no types here
    """Loads a checkpoint over the model in place; each worker takes its own part of every tensor."""

    init_info_cls = NoInit
    update_info_cls = Checkpoint

    def init_transfer_engine(self, init_info: NoInit) -> None:
        """Nothing to do."""

    def start_weight_update(self) -> None:
        """Nothing to do: an update is one call."""

    def finish_weight_update(self) -> None:
        """Nothing to do: an update is one call."""

    def receive_weights(self, update_info: Checkpoint) -> None:
        """Load the checkpoint; ValueError if it has not all of the model's tensors."""
        tensors = safetensors_weights_iterator(update_info.files(), use_tqdm_on_load=False)
        initialize_layerwise_reload(self.model)
        try:
            loaded = self.model.load_weights(tensors)
            half = half_loaded(self.model)
        except BaseException:
            forget_half_loaded(self.model)
            raise
        finally:
            finalize_layerwise_reload(self.model, self.model_config)
            repack_tied(self.model)
        if self.model_config.quantization is None:
            self._check(update_info.path, half, loaded)

    def _check(self, path: str, half: list[str], loaded: set[str] | None) -> None:
        """Raise ValueError if a layer has not got all of its tensors; some models do not say what they have loaded."""
        names = {name for name, _ in self.model.named_parameters()} if loaded is not None else set()
        lacking = [*half, *sorted(names - (loaded or set()))]
        if lacking:
            raise ValueError(f"{path} lacks weights of the model, for example of {lacking[0]}")

    def shutdown(self) -> None:
        """Nothing is held."""


def half_loaded(model: nn.Module) -> list[str]:
    """Layers that have got a part of their elements only; a vocabulary that is padded never gets all."""
    return [
        name
        for name, layer in model.named_modules()
        if not isinstance(layer, VocabParallelEmbedding)
        and (info := get_layerwise_info(layer)).can_load()
        and 0 < info.load_numel < (info.load_numel_total or 0)
    ]


def forget_half_loaded(model: nn.Module) -> None:
    """Let finalising put back the old tensors of layers that are not done: what was read would count a second time."""
    for layer in model.modules():
        info = get_layerwise_info(layer)
        info.load_numel, info.loaded_weights = 0, []


def repack_tied(model: nn.Module) -> None:
    """Pack the output layer's weights again.

    On CPUs vLLM multiplies with a packed copy. It renews those of layers that were loaded, and an output layer that is
    tied to the input embedding is not: it would go on with the old weights.
    """
    for layer in model.modules():
        method: Any = getattr(layer, "quant_method", None)
        if isinstance(layer, VocabParallelEmbedding) and method is not None:
            method.process_weights_after_loading(layer)
