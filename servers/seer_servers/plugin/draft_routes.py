"""HTTP routes for drafting: groups and reference sequences from outside, settings, and what it all brings.

An old rollout of the same prompt, a reference solution or a retrieved text drafts as well as a sibling does: send it as
a request of the group. It goes to the draft server, and from there to every engine that speaks of the group. Nothing
sent here can change what is sampled. Like the plug-in's other routes these lie under /v1, which `--api-key` guards.
"""

import asyncio
import os
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Request
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from pydantic import BaseModel, ConfigDict, Field
from vllm.config import VllmConfig

from seer_servers.drafting.address import ADDRESS_ENV
from seer_servers.drafting.client import DraftClient
from seer_servers.plugin.draft_stats import read_page

router = APIRouter(prefix="/v1/seer/drafts")

MAX_TOKENS = 1 << 20  # in one update
GROUPS_SHOWN = 32  # on /metrics
_GAUGES = {"groups", "tokens", "bytes", "references", "sync_connected", "sync_groups", "sync_bytes"}  # these may fall
_TOKENS = ("drafted", "accepted")  # by position, and in this order behind the drafts of a group


class RegisterBody(BaseModel):
    """Groups to keep ready."""

    model_config = ConfigDict(extra="forbid")
    groups: Annotated[list[Annotated[str, Field(min_length=1, max_length=256)]], Field(min_length=1, max_length=4096)]
    ttl_s: Annotated[float, Field(gt=0, le=86400)] = 600.0


class UpdateBody(BaseModel):
    """Tokens of one sequence of a group, from `prev_token_count` on; sending the same again changes nothing."""

    model_config = ConfigDict(extra="forbid")
    group: Annotated[str, Field(min_length=1, max_length=256)]
    request: Annotated[str, Field(min_length=1, max_length=256)]
    token_ids: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1, max_length=MAX_TOKENS)]
    prev_token_count: Annotated[int, Field(ge=0)] = 0


class ConfigBody(BaseModel):
    """Settings to change; what is left out stays. Without `adaptive`, drafts are verified whether they gain or not.

    On a GPU there are `enabled` and `adaptive` alone; without the latter a step still verifies no more than pays.
    """

    model_config = ConfigDict(extra="forbid")
    enabled: bool | None = None
    adaptive: bool | None = None
    max_spec_tokens: Annotated[int, Field(ge=1, le=64)] | None = None
    pattern_lookup_min: Annotated[int, Field(ge=1, le=64)] | None = None
    pattern_lookup_max: Annotated[int, Field(ge=1, le=64)] | None = None
    min_score: Annotated[float, Field(ge=0, le=1)] | None = None


def draft_client(config: VllmConfig) -> DraftClient | None:
    """The API process's own line to the draft server; None in an engine that has none."""
    address = os.environ.get(ADDRESS_ENV)
    return DraftClient(address, name=f"api-{os.getpid()}") if address and config.speculative_config else None


class DraftMetrics:
    """The drafter's counts on the engine's own /metrics, as `seer:draft_...`; a Prometheus collector.

    Groups come and go, and each is a series of its own: only the latest few are here. `/stats` has more of them.
    """

    def describe(self) -> list[Any]:
        """Promise no names, so that registering does not look for the page."""
        return []

    def collect(self) -> Any:
        """Yield one metric for each number, and one by position and by group for drafted and accepted tokens."""
        page = read_page() or {}
        for name in _TOKENS:
            metric = CounterMetricFamily(f"seer:draft_tokens_{name}", f"Draft tokens {name}", labels=["position"])
            for position, count in enumerate(page.get(name, ())):
                metric.add_metric([str(position)], count)
            yield metric
        groups = list(page.get("by_group", {}).items())[-GROUPS_SHOWN:]
        for column, name in enumerate(_TOKENS, 1):
            metric = CounterMetricFamily(f"seer:draft_group_tokens_{name}", f"Draft tokens {name}", labels=["group"])
            for group, counts in groups:
                metric.add_metric([group], counts[column])
            yield metric
        for name, value in page.items():
            if isinstance(value, int | float):
                kind = GaugeMetricFamily if name in _GAUGES else CounterMetricFamily
                yield kind(f"seer:draft_{name}", f"Drafting: {name.replace('_', ' ')}", value=value)


def _client(request: Request) -> DraftClient:
    client: DraftClient | None = getattr(request.app.state, "seer_draft_client", None)
    if client is None:
        raise HTTPException(
            404, "This engine has no draft server: start one (seer draft-server) and set SEER_DRAFT_SERVER to it."
        )
    return client


@router.post("/register")
async def register(request: Request, body: RegisterBody) -> dict[str, int]:
    """Keep groups on the draft server for `ttl_s` seconds from now."""
    client = _client(request)
    for group in body.groups:
        client.register_group(group, body.ttl_s)
    return {"groups": len(body.groups)}


@router.post("/update")
async def update(request: Request, body: UpdateBody) -> dict[str, int]:
    """Add a sequence, or its next tokens, to a group."""
    client = _client(request)
    client.register_group(body.group, RegisterBody.model_fields["ttl_s"].default)
    client.update(body.group, body.request, body.prev_token_count, body.token_ids)
    return {"tokens": body.prev_token_count + len(body.token_ids)}


@router.get("/stats")
async def stats(request: Request) -> dict[str, Any]:
    """What the engine's drafter counted since its start, and this process's line to the draft server."""
    page = await asyncio.to_thread(read_page)
    if page is None:
        raise HTTPException(404, "This engine has drafted nothing yet, or was started without grouped drafting.")
    client: DraftClient | None = getattr(request.app.state, "seer_draft_client", None)
    return page | {"server": client.stats() if client else None}


@router.get("/config")
async def config(request: Request) -> dict[str, Any]:
    """The drafter's settings."""
    return await _ask_workers(request, {})


@router.post("/config")
async def configure(request: Request, body: ConfigBody) -> dict[str, Any]:
    """Change settings, all or none, and return them all."""
    return await _ask_workers(request, body.model_dump(exclude_none=True))


async def _ask_workers(request: Request, changes: dict[str, Any]) -> dict[str, Any]:
    answers: list[dict[str, Any]] = await request.app.state.seer_engine.client.collective_rpc(
        "seer_draft_config", args=(changes,)
    )
    answer = answers[0]
    if "error" in answer:
        raise HTTPException(answer["status"], answer["error"])
    return answer
