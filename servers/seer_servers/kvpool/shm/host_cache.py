"""The KV cache of a CPU engine: its memory is ours, so blocks are read and written in place, without a copy.

Invariant: every layer's tensor has the scheduler's blocks as its first dimension, and a block is contiguous in it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm.v1.kv_cache_interface import group_kernel_blocks

from seer_servers.kvpool.shm.layers import in_order

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class InPlace:
    """The blocks themselves."""

    def __init__(self, parts: list[list[memoryview]]) -> None:
        self.parts = parts

    def settle(self) -> None:
        """Nothing is left to do: the parts are the cache."""


class HostCache:
    """Byte views of all layers' tensors."""

    threaded = False  # a copy in memory is short, and a thread would take the cores from the model

    def __init__(self, layers: Mapping[str, torch.Tensor], num_blocks: int) -> None:
        self._layers = [_bytes(group_kernel_blocks(layers[name], num_blocks)) for name in in_order(layers)]
        self._part = [view.nbytes // num_blocks for view in self._layers]
        self.block_bytes = sum(self._part)

    def gather(self, places: Sequence[int]) -> InPlace:
        """Return what blocks hold."""
        return InPlace([self._block(place) for place in places])

    def fill(self, places: Sequence[int]) -> InPlace:
        """Return where blocks' content goes."""
        return self.gather(places)

    def _block(self, place: int) -> list[memoryview]:
        return [view[place * size : (place + 1) * size] for view, size in zip(self._layers, self._part, strict=True)]


def _bytes(tensor: torch.Tensor) -> memoryview:
    if not tensor.is_contiguous():
        raise ValueError(
            f"the shared-memory KV pool needs each layer's KV cache in one piece, but its strides are "
            f"{tensor.stride()} for shape {tuple(tensor.shape)}: use --kv-pool none"
        )
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())
