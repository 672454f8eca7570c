"""Run folders made by hand, small enough to work out on paper."""

from __future__ import annotations

import json
import zlib
from typing import TYPE_CHECKING, Any

import msgspec

from seer_async.config import resolve, to_toml_tree
from seer_async.runfolder import RunInfo

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

START = 1_800_000_000.0
LIMIT = 100


def chunk(n: int, tokens: int, engine: str, start: float, end: float, wait: float = 0.0, **more: Any) -> dict[str, Any]:
    """Times in seconds after START."""
    times = {"queued": START + start - wait, "start": START + start, "end": START + end}
    return {
        "n": n,
        "tokens": tokens,
        "engine": engine,
        "epoch": 1,
        "weight_version": "v",
        "attempt": 1,
        **times,
        **more,
    }


def sample(id_: str, chunks: Sequence[dict[str, Any]], reason: str = "stop", **more: Any) -> dict[str, Any]:
    """A line of samples.jsonl that ends with its last chunk, or after a second."""
    finished = chunks[-1]["end"] if chunks else START + 1
    times = {"submitted": START, "first_start": START, "finished": finished, "total": 0, "queued": 0, "generating": 0}
    tokens = sum(c["tokens"] for c in chunks)
    return {
        "id": id_, "group": id_.rpartition("/")[0], "index": 0, "prompt": "p", "messages": None,
        "prompt_token_ids": [1, 2, 3], "token_ids": [5] * tokens, "text": "t", "logprobs": [-1.0] * tokens,
        "top_logprobs": None, "finish_reason": reason, "stop_reason": "", "error": "", "seed": 1,
        "weight_version": "v", "on_policy": True, "chunks": list(chunks), "timings": times, "extra": None, "run": "r",
    } | more  # fmt: skip


def reading(at: float, engines: dict[str, dict[str, Any]], **more: Any) -> dict[str, Any]:
    """A line of metrics.jsonl, `at` seconds after START."""
    return {"now": START + at, "engines": [{"name": name, **view} for name, view in engines.items()], **more}


def record(request: str, chunk: dict[str, Any] | None, finish_reason: str | None = None) -> bytes:
    """A line of the journal."""
    body = json.dumps({"request": request, "chunk": chunk, "finish_reason": finish_reason}).encode()
    return b"%08x %b\n" % (zlib.crc32(body), body)


def folder(
    path: Path,
    samples: Sequence[dict[str, Any]],
    metrics: Sequence[dict[str, Any]] = (),
    *,
    total: int | None = None,
    **info: Any,
) -> Path:
    """A run folder; `total` samples were asked for, all of them if not said."""
    path.mkdir(parents=True, exist_ok=True)
    config = to_toml_tree(resolve({"sampling": {"max_tokens": LIMIT}, "rollout": {"n": 2, "chunk_size": 10}}))
    given = {
        "run": "run-1", "seer": "0", "seed": 7, "config": config, "dataset": "prompts.jsonl", "groups": 2,
        "samples": len(samples) if total is None else total, "command": [], "started": START, "status": "done",
    }  # fmt: skip
    (path / "run.json").write_bytes(msgspec.json.encode(msgspec.convert(given | info, RunInfo)))
    (path / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    (path / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))
    (path / "journal").write_bytes(b"")
    return path


def two_groups(path: Path) -> Path:
    """Two groups of two on engines a and b, over 10 seconds.

    g's responses have 10 and 30 tokens, h's 20 and 20. g/1 moves once, from a to b; h/1 waits two seconds.
    """
    samples = [
        sample("g/0", [chunk(0, 10, "a", 0, 2)]),
        sample("h/0", [chunk(0, 10, "b", 0, 2), chunk(1, 10, "b", 2, 4, pooled=6)]),
        sample("h/1", [chunk(0, 20, "a", 2, 6, wait=2)]),
        sample(
            "g/1",
            [chunk(0, 10, "a", 0, 3), chunk(1, 10, "b", 4, 6, wait=1, cached=13), chunk(2, 10, "b", 6, 10)],
            "length",
        ),
    ]
    metrics = [
        reading(0, {"a": {}, "b": {}}),
        reading(1, {"a": {"kv_used": 0.5, "preemptions": 40}, "b": {"kv_used": 0.1}}, retries=1),
        reading(6, {"a": {"kv_used": 0.0, "preemptions": 43}, "b": {"kv_used": 0.3}}, retries=2),
        reading(10, {"a": {"kv_used": 0.0, "preemptions": 43}, "b": {"kv_used": 0.3}}, retries=2),
    ]
    return folder(path, samples, metrics)
