"""SkyRL's own clients against a server: `python skyrl_asks.py URL`; prints what they got.

The client modules are loaded without the packages around them, which want ray, hydra and a Tinker server.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

PROMPTS = [[75, 104, 111, 111, 114], [5, 6, 7]]
SESSIONS = ["trajectory-0", "trajectory-1"]
PARAMS = {
    "min_tokens": 1, "skip_special_tokens": True, "include_stop_str_in_output": True, "max_tokens": 60,
    "temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "logprobs": 1, "stop": None,
}  # fmt: skip
"""As SkyRL's `get_vllm_sampling_params` makes them of its config."""
LONG = PARAMS | {"max_tokens": 2000, "ignore_eos": True, "seed": 3}


def main(url: str) -> None:
    skyrl = importlib.util.find_spec("skyrl")
    assert skyrl and skyrl.origin
    for name in ("backends", "backends/skyrl_train/utils"):
        bare = types.ModuleType(f"skyrl.{name.replace('/', '.')}")
        bare.__path__ = [str(Path(skyrl.origin).parent / name)]
        sys.modules[bare.__name__] = bare
    from skyrl.backends.skyrl_train.inference_servers.remote_inference_client import RemoteInferenceClient
    from skyrl.backends.skyrl_train.weight_sync.control_plane import SkyrlWeightSyncClient, nccl_init_payloads

    client = RemoteInferenceClient(proxy_url=url, server_urls=[url], data_parallel_size=1, model_name="mock")
    got = asyncio.run(_asked(client))
    got["transfer"] = _transferred(SkyrlWeightSyncClient([url], init_payload_fn=nccl_init_payloads), got["world"][0])
    print(json.dumps(got))


async def _asked(client: Any) -> dict[str, Any]:
    async with client:
        seeded = PARAMS | {"seed": 3}
        tinker = {
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": PROMPTS[0]}]}, "num_samples": 4,
            "sampling_params": {"temperature": 1.0, "max_tokens": 30, "seed": 7, "stop_tokens": [0]},
            "session_id": "sampler",
        }  # fmt: skip
        chat = {"messages": [{"role": "user", "content": "Say it"}], "max_tokens": 20, "seed": 5}
        got = {
            "world": await client.get_world_size(),
            "generate": await client.generate(_batch(seeded)),
            "sample": await client.sample({"json": tinker}),
            "chat": await client.chat_completion({"json": chat | {"session_id": "chat"}}),
            "completion": await client.completion({"json": {"prompt": "Say it", "max_tokens": 20, "seed": 5}}),
            "render": await client.render_chat_completion({"json": dict(chat)}),
            "tokens": await client.tokenize(["Say it"]),
        }
        got["texts"] = await client.detokenize(got["tokens"])
        got["kept"] = await _paused(client, "keep")
        got["aborted"] = await _paused(client, "abort")
        rest = [prompt + ids for prompt, ids in zip(PROMPTS, got["aborted"]["response_ids"], strict=True)]
        got["continued"] = await client.generate(_batch(LONG | {"max_tokens": 5}, rest))
        await client.reset_prefix_cache(reset_running_requests=True)
        await client.sleep(level=2)
        got["asleep"] = await client.is_sleeping()
        await client.wake_up(tags=["weights"])
        await client.wake_up(tags=["kv_cache"])
        got["awake"] = not await client.is_sleeping()
        for session in SESSIONS:
            await client.finish_session(session)
        return got


def _batch(params: dict[str, Any], prompts: list[list[int]] = PROMPTS) -> dict[str, Any]:
    salted = {"cache_salt": "weights-0"}
    return {"prompt_token_ids": prompts, "sampling_params": params, "session_ids": SESSIONS} | salted


async def _paused(client: Any, mode: str) -> dict[str, Any]:
    """What comes out of requests that are paused in their middle."""
    before = await _generated(client)
    task = asyncio.ensure_future(client.generate(_batch(LONG)))
    while await _generated(client) < before + 200:
        await asyncio.sleep(0.02)
    await client.pause(mode)
    ended, _ = await asyncio.wait([task], timeout=20 if mode == "abort" else 0.3)
    await client.resume()
    return await task | {"ended_in_the_pause": bool(ended)}


async def _generated(client: Any) -> int:
    """Tokens that the engines have sampled."""
    session = await client._get_session()
    async with session.get(f"{client.proxy_url}/workers") as reply:
        return sum(worker["generated"] for worker in (await reply.json())["workers"])


def _transferred(sync: Any, world: int) -> str:
    sync.pause_generation()
    sync.init_weight_transfer_engine(
        {"master_address": "x", "master_port": 1, "rank_offset": 1, "world_size": 1 + world}
    )
    sync.start_weight_update()
    sync.update_weights({"names": ["w"], "dtype_names": ["float32"], "shapes": [[1]]})
    sync.finish_weight_update(weight_version="1")
    sync.reset_prefix_cache()
    sync.resume_generation()
    sync.close()
    return "done"


if __name__ == "__main__":
    main(*sys.argv[1:])
