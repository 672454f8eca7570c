"""What an engine's steps cost, fitted to a recorded run.

A chunk of t tokens that took d seconds saw t steps while its engine ran B calls with K tokens of KV on average, and
waited for the prefills that began meanwhile: d = t (base + sequence B + context K) + prefill P. The run folder says d
and t of every chunk, and so B, K and P: chunks carry their start and end, and how much of their prefix was cached or
pooled. Calls that wait inside an engine, as those of undivided policies do, are taken for running: calibrate from a
divided run.
Invariant: no cost is negative; one that would be is left out of the fit.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from seer_async.errors import UsageError
from seer_async.simulation.cost import EngineCost, EngineModel, Fleet

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

_LEAST_CHUNKS = 20
_SEATS = 1024  # of an engine that does not say


class _Chunk(msgspec.Struct):
    tokens: int
    engine: str
    start: float
    end: float
    cached: int = 0
    pooled: int = 0


class _Line(msgspec.Struct):
    prompt_token_ids: list[int]
    chunks: list[_Chunk]


class Span(msgspec.Struct, frozen=True):
    """A chunk as an engine saw it: seconds, tokens; `prefix` before it, of which `computed` were not cached."""

    start: float
    end: float
    tokens: int
    prefix: int
    computed: int


class Fit(msgspec.Struct, frozen=True, kw_only=True):
    """A fitted cost. `error` is the median of |predicted - measured| / measured seconds over chunks."""

    cost: EngineCost
    chunks: int
    error: float


def fit_run(path: Path) -> Fit:
    """The cost of the engines of a run folder.

    Raises:
        UsageError: There is no readable samples.jsonl, or it holds too few chunks.
    """
    return fit(_spans(path))


def fit(engines: Sequence[Sequence[Span]]) -> Fit:
    """The cost that explains the chunks best; engines are taken to be alike.

    Raises:
        UsageError: There are too few chunks.
    """
    rows = np.concatenate([_features(spans) for spans in engines]) if engines else np.empty((0, 4))
    taken = np.array([span.end - span.start for spans in engines for span in spans])
    if len(rows) < _LEAST_CHUNKS:
        raise UsageError(f"{len(rows)} chunks are too few to fit a cost to; give a run with at least {_LEAST_CHUNKS}")
    base, sequence, context, prefill = _positive(rows, taken)
    predicted = rows @ np.array([base, sequence, context, prefill])
    cost = EngineCost(
        base_s=base,
        sequence_s=sequence,
        context_token_s=context,
        prefill_token_s=prefill,
        draft_token_s=sequence,
    )
    return Fit(cost=cost, chunks=len(rows), error=float(np.median(np.abs(predicted / taken - 1))))


def fleet_of_run(path: Path) -> Fleet:
    """A run folder's engines as they were, with the cost fitted to the run.

    Raises:
        UsageError: The folder cannot be read, describes no engines, or holds too few chunks.
    """
    try:
        run = msgspec.json.decode((path / "run.json").read_bytes(), type=_Run)
    except (OSError, msgspec.DecodeError) as error:
        raise UsageError(f"cannot read {path / 'run.json'}: {error}; give a run folder") from error
    infos = [engine.info for engine in run.engines if engine.info]
    if not infos:
        raise UsageError(f"{path / 'run.json'} does not describe its engines; give the folder of a finished run")
    model = EngineModel(
        cost=fit_run(path).cost,
        kv_tokens=min((info.num_blocks - 1) * info.block_size for info in infos),
        max_seqs=min(info.max_num_seqs or _SEATS for info in infos),
    )
    return Fleet(engine=model, instances=len(infos), chunk_size=run.config.rollout.chunk_size)


class _Info(msgspec.Struct):
    num_blocks: int
    block_size: int
    max_num_seqs: int | None = None


class _Engine(msgspec.Struct):
    info: _Info | None = None


class _Rollout(msgspec.Struct):
    chunk_size: int


class _Config(msgspec.Struct):
    rollout: _Rollout


class _Run(msgspec.Struct):
    engines: list[_Engine]
    config: _Config


def _spans(path: Path) -> list[list[Span]]:
    engines: dict[str, list[Span]] = defaultdict(list)
    try:
        with (path / "samples.jsonl").open("rb") as file:
            for text in file:
                line = msgspec.json.decode(text, type=_Line)
                prefix = len(line.prompt_token_ids)
                for chunk in line.chunks:
                    computed = max(0, prefix - chunk.cached - chunk.pooled)
                    engines[chunk.engine].append(Span(chunk.start, chunk.end, chunk.tokens, prefix, computed))
                    prefix += chunk.tokens
    except (OSError, msgspec.DecodeError) as error:
        raise UsageError(f"cannot read the samples of {path}: {error}; give the folder of a finished run") from error
    return list(engines.values())


def _features(spans: Sequence[Span]) -> NDArray[np.float64]:
    """For each chunk: steps, steps times mean batch, steps times mean KV, tokens prefilled meanwhile."""
    start = np.array([span.start for span in spans])
    end = np.array([span.end for span in spans])
    tokens = np.array([span.tokens for span in spans], dtype=float)
    context = np.array([span.prefix for span in spans]) + tokens / 2
    computed = np.array([span.computed for span in spans], dtype=float)
    overlap = np.clip(np.minimum.outer(end, end) - np.maximum.outer(start, start), 0, None) / (end - start)[:, None]
    began = (start[None, :] >= start[:, None]) & (start[None, :] < end[:, None])
    return np.column_stack((tokens, tokens * overlap.sum(1), tokens * (overlap @ context), began @ computed))


def _positive(rows: NDArray[np.float64], wanted: NDArray[np.float64]) -> list[float]:
    """Least squares over relative errors, without the columns whose factor would be negative."""
    rows, wanted = rows / wanted[:, None], np.ones(len(wanted))
    kept = [column for column in range(rows.shape[1]) if rows[:, column].any()]
    while True:
        factors, *_ = np.linalg.lstsq(rows[:, kept], wanted, rcond=None)
        if factors.min() >= 0:
            break
        kept.pop(int(factors.argmin()))
    result = np.zeros(rows.shape[1])
    result[kept] = factors
    return [float(factor) for factor in result]
