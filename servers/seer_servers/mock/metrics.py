"""The telemetry an orchestrator reads: Prometheus text under vLLM's names."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from seer_servers.mock.drafts import DraftCounts
    from seer_servers.mock.engine import MockEngine


def prometheus_text(engine: MockEngine) -> str:
    """All metrics at this moment."""
    engine.refresh()
    kv, labels = engine.config.kv, f'engine="0",model_name="{_escape(engine.config.name)}"'
    info = f'block_size="{kv.block_size}",engine="0",num_gpu_blocks="{kv.num_blocks}"'
    samples: list[tuple[str, str, str, float]] = [
        ("vllm:num_requests_running", "gauge", labels, engine.running),
        ("vllm:num_requests_waiting", "gauge", labels, engine.waiting),
        ("vllm:kv_cache_usage_perc", "gauge", labels, engine.kv_usage),
        ("vllm:num_preemptions_total", "counter", labels, engine.preemptions),
        ("seer:recomputed_tokens_total", "counter", "", engine.recomputed),
        ("vllm:prompt_tokens_total", "counter", labels, engine.cache.queries),
        ("vllm:generation_tokens_total", "counter", labels, engine.generated_tokens),
        ("vllm:prefix_cache_queries_total", "counter", labels, engine.cache.queries),
        ("vllm:prefix_cache_hits_total", "counter", labels, engine.cache.hits),
        ("vllm:cache_config_info", "gauge", info, 1),
        ("process_start_time_seconds", "gauge", "", engine.started),
    ]
    samples += _drafts(engine.drafts, labels) if engine.drafts else []
    return "".join(_sample(*sample) for sample in samples)


def _drafts(drafts: DraftCounts, labels: str) -> list[tuple[str, str, str, float]]:
    """Speculation: vLLM's counters, and the plug-in's."""
    page = drafts.page()
    totals = {"num_drafts": "verified", "num_draft_tokens": "drafted", "num_accepted_tokens": "accepted"}
    plain = ("steps", "steps_off", "switch_offs", "draft_s")
    return [
        *(
            (f"vllm:spec_decode_{name}_total", "counter", labels, page[key] if key == "verified" else sum(page[key]))
            for name, key in totals.items()
        ),
        *((f"seer:draft_{name}_total", "counter", "", page[name]) for name in plain),
        *(
            (f"seer:draft_tokens_{name}_total", "counter", f'position="{position}"', count)
            for name in ("drafted", "accepted")
            for position, count in enumerate(page[name])
        ),
    ]


def _sample(name: str, kind: str, labels: str, value: float) -> str:
    series = f"{name}{{{labels}}}" if labels else name
    return f"# TYPE {name} {kind}\n{series} {float(value)!r}\n"


def _escape(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
