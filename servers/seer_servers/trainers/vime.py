"""vime with `seer serve` in the place of its router: two hooks that it takes by name.

    --vllm-router-ip HOST --vllm-router-port PORT
    --rollout-function-path seer_servers.trainers.vime.generate_rollout
    --custom-generate-function-path seer_servers.trainers.vime.generate

Seer answers vime's own requests. What is missing: vime gives new weights to the engines without a name, so that Seer
cannot see that they are new; and it ends a rollout at the engines, where Seer takes what was aborted for lost and asks
again. Invariants: every training rollout has a weight version of its own; what is open when vime has what it wants ends
within a second, with the tokens that it has.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import httpx

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable

_LOOK_S = 0.5
_VERSION_S = 30.0  # engines have 10 s to take a name


def generate_rollout(
    args: Namespace,
    rollout_id: int,
    data_source: Callable[..., Any],
    evaluation: bool = False,  # noqa: FBT001, FBT002 - vime's signature
) -> Any:
    """vime's rollout, from weights that Seer knows to be new; an evaluation samples from those of the last one."""  # noqa: D403
    from vime.rollout import vllm_rollout  # noqa: PLC0415 - vime loads this module

    if not evaluation:
        version = {"new_version": f"rollout-{rollout_id}"}
        httpx.post(f"{_seer(args)}/update_weight_version", json=version, timeout=_VERSION_S).raise_for_status()
    return vllm_rollout.generate_rollout(args, rollout_id, data_source, evaluation=evaluation)


async def generate(args: Namespace, sample: Any, sampling_params: dict[str, Any]) -> Any:
    """One response, as vime asks for it; ended at Seer when vime ends the rollout."""
    from vime.rollout import vllm_rollout  # noqa: PLC0415 - vime loads this module

    state = vllm_rollout.GenerateState(args)
    answer = asyncio.ensure_future(vllm_rollout.generate(args, sample, sampling_params))
    try:
        while not (await asyncio.wait([answer], timeout=_LOOK_S))[0]:
            if state.aborted:
                await _abort(_seer(args))
        return await answer
    finally:
        answer.cancel()


async def _abort(url: str) -> None:
    """All that is open: vime ends rollouts as a whole."""
    async with httpx.AsyncClient(timeout=_VERSION_S) as http:
        (await http.post(f"{url}/abort_requests", json={})).raise_for_status()


def _seer(args: Namespace) -> str:
    return f"http://{args.vllm_router_ip}:{args.vllm_router_port}"
