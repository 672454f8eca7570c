"""What is read of an engine's /metrics, also where the page is strange."""

from __future__ import annotations

import pytest

from seer_async.errors import EngineError
from seer_async.telemetry import Metrics

PLAIN = """\
# HELP vllm:num_requests_running x
vllm:num_requests_running{engine="0"} 3.0
vllm:num_requests_waiting{engine="0"} 1.0
vllm:kv_cache_usage_perc{engine="0"} 0.5
vllm:generation_tokens_total{engine="0"} 100.0
process_start_time_seconds 1.7e+09
"""
DRAFTS = """\
vllm:spec_decode_num_drafts_total{engine="0"} 20.0
vllm:spec_decode_num_draft_tokens_total{engine="0"} 60.0
vllm:spec_decode_num_accepted_tokens_total{engine="0"} 30.0
seer:draft_tokens_drafted_total{position="0"} 20.0
seer:draft_tokens_drafted_total{position="1"} 20.0
seer:draft_tokens_drafted_total{position="3"} 20.0
seer:draft_tokens_drafted_total{position="x"} 20.0
seer:draft_tokens_drafted_total{position="4000000000"} 20.0
seer:draft_tokens_accepted_total{position="0"} 16.0
seer:draft_group_tokens_drafted_total{group="r/\\"} 9\\nseer:draft_steps_total 7"} 60.0
seer:draft_steps_total 40.0
seer:draft_steps_off_total 10.0
seer:draft_switch_offs_total 2.0
seer:draft_draft_s_total 0.25
"""


def read(page: str) -> Metrics:
    return Metrics(page.encode())


def test_drafting_by_position() -> None:
    drafts = read(PLAIN + DRAFTS).stats(boot="b", weight_version=None).drafts
    assert drafts is not None
    assert (drafts.verified, drafts.drafted, drafts.accepted, drafts.generated) == (20, 60, 30, 100)
    assert (drafts.steps, drafts.steps_off, drafts.switch_offs, drafts.drafter_s) == (40, 10, 2, 0.25)
    assert drafts.drafted_at == [20, 20, 0, 20]
    assert drafts.accepted_at == [16]
    assert read(PLAIN).stats(boot="b", weight_version=None).drafts is None


def test_a_drafter_of_vllms_own_counts_less() -> None:
    stock = "".join(line for line in DRAFTS.splitlines(keepends=True) if line.startswith("vllm:"))
    drafts = read(PLAIN + stock).stats(boot="b", weight_version=None).drafts
    assert drafts is not None
    assert (drafts.accepted, drafts.steps, drafts.drafted_at) == (30, 0, [])


@pytest.mark.parametrize("value", ["NaN", "+Inf", "-Inf", "three"])
def test_what_is_no_number_is_missing(value: str) -> None:
    page = PLAIN.replace('running{engine="0"} 3.0', f'running{{engine="0"}} {value}')
    with pytest.raises(EngineError, match="/metrics has no vllm:num_requests_running"):
        read(page).stats(boot="b", weight_version=None)
