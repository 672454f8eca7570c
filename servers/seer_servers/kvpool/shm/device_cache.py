"""The KV cache of a GPU engine: blocks travel through pinned host memory, off the engine's critical path.

Invariants: what is gathered is copied on the compute stream, after the forward that made it and before the next one,
so the engine may reuse the blocks at once; what is filled goes through a stream of its own, into blocks that vLLM gives
to nobody until we say that they are there. Waiting happens in `settle`, which a thread of ours calls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm.v1.kv_cache_interface import group_kernel_blocks

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class Leaving:
    """Blocks on their way to the host; the parts are right once settled."""

    def __init__(self, staged: torch.Tensor, event: torch.cuda.Event) -> None:
        self.parts = _parts(staged)
        self._staged = staged  # kept alive: the parts look into it
        self._event = event

    def settle(self) -> None:
        """Wait for the copy."""
        self._event.synchronize()


class Arriving:
    """Blocks on their way to the device; settling sends what the parts hold then."""

    def __init__(self, cache: DeviceCache, places: Sequence[int]) -> None:
        self._cache = cache
        self._places = places
        self._staged = cache.pinned(len(places))
        self.parts = _parts(self._staged)

    def settle(self) -> None:
        """Copy, and wait until the device has it."""
        self._cache.scatter(self._staged, self._places)


class DeviceCache:
    """All layers' tensors, seen as bytes: one row for each block."""

    threaded = True

    def __init__(self, layers: Mapping[str, torch.Tensor], num_blocks: int) -> None:
        self._layers = [_rows(group_kernel_blocks(tensor, num_blocks)) for _, tensor in sorted(layers.items())]
        widths = {layer.shape[1] for layer in self._layers}
        if len(widths) != 1:
            raise ValueError("the shared-memory KV pool needs layers of one size on a GPU: use --kv-pool none")
        (self._width,) = widths
        self._device = self._layers[0].device
        self._stream = torch.cuda.Stream(self._device)
        self.block_bytes = self._width * len(self._layers)

    def gather(self, places: Sequence[int]) -> Leaving:
        """Begin to copy what blocks hold to the host."""
        index = torch.tensor(places, pin_memory=True).to(self._device, non_blocking=True)
        rows = torch.empty((len(self._layers), len(places), self._width), dtype=torch.uint8, device=self._device)
        for layer, row in zip(self._layers, rows, strict=True):
            torch.index_select(layer, 0, index, out=row)
        staged = self.pinned(len(places))
        staged.copy_(rows, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return Leaving(staged, event)

    def fill(self, places: Sequence[int]) -> Arriving:
        """Return host memory for what will be copied into blocks."""
        return Arriving(self, places)

    def pinned(self, blocks: int) -> torch.Tensor:
        """Host memory for some blocks: [layer, block, byte]."""
        return torch.empty((len(self._layers), blocks, self._width), dtype=torch.uint8, pin_memory=True)

    def scatter(self, staged: torch.Tensor, places: Sequence[int]) -> None:
        """Copy staged blocks, as many as there are places, to the device; returns when they are there."""
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            index = torch.tensor(places, pin_memory=True).to(self._device, non_blocking=True)
            rows = staged.to(self._device, non_blocking=True)
            for layer, row in zip(self._layers, rows, strict=True):
                layer.index_copy_(0, index, row)
            self._stream.synchronize()


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """A layer as [block, byte], whatever the order of dimensions within a block."""
    block = tensor[0]
    span = 1 + sum((size - 1) * stride for size, stride in zip(block.shape, block.stride(), strict=True))
    if span != block.numel():
        raise ValueError(
            f"the shared-memory KV pool needs a block in one piece within each layer, but the strides are "
            f"{tensor.stride()} for shape {tuple(tensor.shape)}: use --kv-pool none"
        )
    width = block.numel() * tensor.element_size()
    stride = tensor.stride(0) * tensor.element_size()
    flat = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
    return flat.as_strided((tensor.shape[0], width), (stride, 1), tensor.storage_offset() * tensor.element_size())


def _parts(staged: torch.Tensor) -> list[list[memoryview]]:
    """The bytes of each block, layer after layer."""
    array = staged.numpy()
    return [[memoryview(array[layer, block]) for layer in range(array.shape[0])] for block in range(array.shape[1])]
