"""The KV cache of a GPU engine: blocks travel through pinned host memory, off the engine's critical path.

Invariants: what is gathered is copied on the compute stream, after the forward that made it and before the next one,
so the engine may reuse the blocks at once; what is filled goes through a stream of its own, into blocks that vLLM gives
to nobody until we say that they are there. Waiting happens in `settle`, which a thread of ours calls.

On the host a block is one piece, all layers one after the other: a thread that reads or writes files beside a busy
engine should ask Python for as little as it can.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from vllm.v1.kv_cache_interface import group_kernel_blocks

from seer_servers.kvpool.shm.layers import in_order

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
    """All layers' tensors, seen as bytes: [block, layer, byte] where they lie evenly in one piece of memory.

    Elsewhere each layer is moved by itself, which costs a kernel launch a layer.
    """

    threaded = True

    def __init__(self, layers: Mapping[str, torch.Tensor], num_blocks: int) -> None:
        rows = [_rows(group_kernel_blocks(layers[name], num_blocks)) for name in in_order(layers)]
        if len({layer.shape[1] for layer in rows}) != 1:
            raise ValueError("the shared-memory KV pool needs layers of one size on a GPU: use --kv-pool none")
        self._layers, self._width = rows, rows[0].shape[1]
        self._whole = _whole(rows)
        self._device = rows[0].device
        self._stream = torch.cuda.Stream(self._device)
        self.block_bytes = self._width * len(rows)

    def gather(self, places: Sequence[int]) -> Leaving:
        """Begin to copy what blocks hold to the host."""
        index = self._index(places)
        if self._whole is not None:
            rows = self._whole.index_select(0, index)
        else:
            rows = torch.stack([layer.index_select(0, index) for layer in self._layers], dim=1)
        staged = self.pinned(len(places))
        staged.copy_(rows, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return Leaving(staged, event)

    def fill(self, places: Sequence[int]) -> Arriving:
        """Return host memory for what will be copied into blocks."""
        return Arriving(self, places)

    def pinned(self, blocks: int) -> torch.Tensor:
        """Host memory for some blocks: [block, layer, byte]. PyTorch keeps what is freed for the next."""
        return torch.empty((blocks, len(self._layers), self._width), dtype=torch.uint8, pin_memory=True)

    def scatter(self, staged: torch.Tensor, places: Sequence[int]) -> None:
        """Copy staged blocks to their places on the device; returns when they are there."""
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            index = self._index(places)
            rows = staged.to(self._device, non_blocking=True)
            if self._whole is not None:
                self._whole.index_copy_(0, index, rows)
            else:
                for number, layer in enumerate(self._layers):
                    layer.index_copy_(0, index, rows[:, number])
            self._stream.synchronize()

    def _index(self, places: Sequence[int]) -> torch.Tensor:
        return torch.tensor(places, pin_memory=True).to(self._device, non_blocking=True)


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


def _whole(rows: list[torch.Tensor]) -> torch.Tensor | None:
    """All layers as [block, layer, byte], if they lie at even distances in one storage."""
    first = rows[0]
    if len({(row.untyped_storage().data_ptr(), row.stride(0)) for row in rows}) != 1:
        return None
    offsets = [row.storage_offset() for row in rows]
    steps = {later - earlier for earlier, later in pairwise(offsets)}
    if len(steps) > 1 or min(steps, default=1) <= 0:
        return None
    shape = (first.shape[0], len(rows), first.shape[1])
    return first.as_strided(shape, (first.stride(0), steps.pop() if steps else first.shape[1], 1), offsets[0])


def _parts(staged: torch.Tensor) -> list[list[memoryview]]:
    """The bytes of each block, in one part."""
    return [[memoryview(block)] for block in staged.view(staged.shape[0], -1).numpy()]
