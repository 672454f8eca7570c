"""Engines and workloads that ship with the simulator. design/simulation.md says where each number comes from."""

from __future__ import annotations

import msgspec

from seer_async.errors import UsageError
from seer_async.simulation.cost import EngineCost, EngineModel, Fleet
from seer_async.simulation.workload import Shape


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """A workload on a fleet."""

    shape: Shape
    fleet: Fleet


MOONLIGHT = Setting(
    shape=Shape(name="moonlight", requests=3200, n=8, mean=22386, limit=65536),
    fleet=Fleet(
        engine=EngineModel(
            cost=EngineCost(
                base_s=0.012,
                sequence_s=0.00025,
                context_token_s=2.0e-8,
                prefill_token_s=1 / 12_000,
                draft_token_s=0.00025,
                load_token_s=31e3 / 20e9,
            ),
            kv_tokens=600_000,
        ),
        instances=32,
        chunk_size=4096,
    ),
)
QWEN2_VL = Setting(
    shape=Shape(name="qwen2-vl-72b", requests=9600, n=16, mean=7615, limit=40960),
    fleet=Fleet(
        engine=EngineModel(
            cost=EngineCost(
                base_s=0.025,
                sequence_s=0.00015,
                context_token_s=2.0e-8,
                prefill_token_s=1 / 12_000,
                draft_token_s=0.00015,
                load_token_s=327e3 / 80e9,
            ),
            kv_tokens=1_000_000,
        ),
        instances=16,
        chunk_size=2048,
    ),
)
KIMI_K2 = Setting(
    shape=Shape(name="kimi-k2", requests=6400, n=8, mean=38959, limit=98304),
    fleet=Fleet(
        engine=EngineModel(
            cost=EngineCost(
                base_s=0.035,
                sequence_s=0.0001,
                context_token_s=4.0e-9,
                prefill_token_s=1 / 40_000,
                draft_token_s=0.0001,
                load_token_s=70e3 / 320e9,
            ),
            kv_tokens=8_000_000,
        ),
        instances=8,
        chunk_size=4096,
    ),
)
CPU = Setting(
    shape=Shape(name="cpu", requests=192, n=8, mean=160, limit=512, prompt=60, sigma=0.9),
    fleet=Fleet(
        engine=EngineModel(
            cost=EngineCost(
                base_s=0.055,
                sequence_s=0.005,
                prefill_token_s=0.0035,
                draft_token_s=0.005,
                load_token_s=0.00005,
            ),
            kv_tokens=95 * 32,
            max_seqs=256,
        ),
        instances=2,
        chunk_size=64,
    ),
)
H100_SMALL = Setting(
    shape=Shape(name="h100-1.5b", requests=880, n=8, mean=900, limit=4096, prompt=60, sigma=0.9, correlation=0.9),
    fleet=Fleet(
        engine=EngineModel(
            cost=EngineCost(
                base_s=0.0032,
                sequence_s=0.00006,
                prefill_token_s=1 / 40_000,
                draft_token_s=0.0001,
                load_token_s=1e-6,
            ),
            kv_tokens=48_000,
            max_seqs=256,
        ),
        instances=2,
        chunk_size=1024,
    ),
)
SETTINGS = {setting.shape.name: setting for setting in (MOONLIGHT, QWEN2_VL, KIMI_K2, CPU, H100_SMALL)}
PAPER = (MOONLIGHT, QWEN2_VL, KIMI_K2)


def setting(name: str) -> Setting:
    """The setting of that name.

    Raises:
        UsageError: There is none; lists the names.
    """
    if name not in SETTINGS:
        raise UsageError(f"unknown workload {name!r}; give one of {', '.join(SETTINGS)}, or a run folder")
    return SETTINGS[name]
