"""Compile the GPU kernels for compute capability 9.0, with the arguments that their callers give them; needs no GPU.

Triton's interpreter, in which the tests run them where there is no GPU, takes much that its compiler does not. Prints
the name of each kernel that was compiled.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from seer_servers.plugin import gpu_kernels as kernels

HOPPER = GPUTarget("cuda", 90, 32)
NUMBERS = {torch.int32: "i32", torch.int64: "i64", torch.float32: "fp32"}
OPTIONS = ("num_warps",)
SLOTS, REFERENCES, GROUPS, LONGEST = 64, 32, 16, 256


class Compiled:
    """Stands in for a kernel: a launch compiles it."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self._launch

    def _launch(self, *given: Any, **named: Any) -> None:
        options = {name: named.pop(name) for name in OPTIONS if name in named}
        values = inspect.signature(self._kernel.fn).bind(*given, **named).arguments
        constants = {p.name: values[p.name] for p in self._kernel.params if p.is_constexpr}
        types = {name: "constexpr" if name in constants else kind(value) for name, value in values.items()}
        source = ASTSource(fn=self._kernel, signature=types, constexprs=constants)
        built = triton.compile(source, target=HOPPER, options=options)
        assert built.asm["cubin"]
        print(self._kernel.fn.__name__)


def kind(value: Any) -> str:
    """An argument's type, in Triton's words."""
    if isinstance(value, torch.Tensor):
        return f"*{NUMBERS[value.dtype]}"
    return "fp32" if isinstance(value, float) else "i32"


def numbers(*size: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.zeros(size, dtype=dtype)


def launch_all(steps: int) -> None:
    """Call what launches kernels, for drafts of `steps` tokens."""
    tables = kernels.Tables(
        slot_tokens=numbers(SLOTS, LONGEST),
        slot_lengths=numbers(SLOTS),
        reference_tokens=numbers(REFERENCES, LONGEST),
        reference_lengths=numbers(REFERENCES),
        starts=numbers(SLOTS + REFERENCES),
        groups=numbers(SLOTS),
        members=numbers(GROUPS, kernels.MEMBERS),
        counts=numbers(GROUPS),
    )
    slots = numbers(SLOTS, dtype=torch.int64)
    batch = kernels.Batch(slots, numbers(SLOTS), numbers(SLOTS + 1))
    by_place = [numbers(SLOTS, steps, dtype=torch.float32) for _ in range(3)]
    drafts = numbers(SLOTS, steps, dtype=torch.int64)
    choice = kernels.Choice(drafts, *by_place, numbers(SLOTS), numbers(SLOTS))
    found, tallies = numbers(SLOTS, 17, 2), numbers(2, kernels.KINDS, steps)
    totals = kernels.Totals(numbers(2, steps, dtype=torch.int64), numbers(GROUPS, 3, dtype=torch.int64))
    rates = numbers(kernels.KINDS, steps, dtype=torch.float32)
    weights = kernels.Weights(numbers(SLOTS, dtype=torch.float32))
    kernels.scan(tables, batch, found, shortest=1, longest=16)
    kernels.choose(tables, batch, found, rates=rates, weights=weights, choice=choice, recent=0.1)
    kernels.observe(batch, choice, tallies, totals, tables.groups)
    kernels.compare(tables, kernels.Peeked(slots, numbers(SLOTS)), choice, tallies, numbers(2, dtype=torch.int64))
    places = numbers(SLOTS + 1), numbers(SLOTS + 1)
    kernels.admit(by_place[0], slots, numbers(2, SLOTS), 9, logits=places[0], queries=places[1], bonus=1)
    kernels.follow(numbers(3 * SLOTS, dtype=torch.int64), numbers(3 * SLOTS), numbers(SLOTS + 1), steps)


if __name__ == "__main__":
    for name in [name for name in vars(kernels) if name.endswith("_kernel")]:
        setattr(kernels, name, Compiled(getattr(kernels, name)))
    for steps in (8, 5):
        launch_all(steps)
