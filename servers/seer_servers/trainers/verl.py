"""verl's rollout server, answered by `seer serve`.

verl's clients ask a load balancer for a server and call the server's `generate`. `Router` is such a load balancer (the
one that `rollout.router_config_path` names) with one server, an actor of `Server`, so that everything reaches Seer,
which samples on the vLLM servers that verl has started. Invariant: a response that was aborted comes back with the
tokens it has and the stop reason "aborted", once; to go on, ask again with those tokens behind the prompt.

verl and ray are imported where they are needed only: this module can be imported and used without them.
"""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx

from seer_async.errors import SeerError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_CONNECT_S = 10.0
_CALLS = 65_536  # `generate` calls that an actor takes at once
_COMPLETED = {"stop": "completed", "length": "completed", "abort": "aborted"}
_SERVER_ID = "seer"


@dataclasses.dataclass
class TokenOutput:
    """Tokens of one response and their logprobs; `stop_reason` is "completed" or "aborted".

    Where verl is, its own class of the same name and fields is what comes out.
    """

    token_ids: list[int]
    log_probs: list[float] | None = None
    routed_experts: Any = None
    stop_reason: str | None = None
    num_preempted: int | None = None
    extra_fields: dict[str, Any] = dataclasses.field(default_factory=dict)


def _verls_own() -> Any:
    try:
        from verl.workers.rollout import replica  # noqa: PLC0415 - it may not be there
    except ImportError:
        return TokenOutput
    return replica.TokenOutput


_Output = _verls_own()


class Server:
    """The methods of verl's server actors that its clients, replicas and checkpoint engines call.

    `url` is where `seer serve` is. A call without `max_tokens` gets what verl's config leaves of `prompt_length` and
    `response_length` tokens. `headers` go with every request (a key, for instance).
    """

    def __init__(
        self, url: str, *, response_length: int, prompt_length: int = 0, headers: Mapping[str, str] | None = None
    ) -> None:
        self.url = url.rstrip("/")
        self.global_steps: int | None = None
        self._lengths = prompt_length, response_length
        self._steps: dict[str, int] = {}  # by weight version
        self._rejecting = False
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=1024)
        forever = httpx.Timeout(None, connect=_CONNECT_S)  # a response takes its time, and waits while Seer is paused
        self._http = httpx.AsyncClient(base_url=self.url, headers=headers, limits=limits, timeout=forever)

    async def generate(  # noqa: PLR0917 - verl's signature
        self,
        prompt_ids: Sequence[int],
        sampling_params: Mapping[str, Any],
        request_id: str,
        image_data: Sequence[Any] | None = None,
        video_data: Sequence[Any] | None = None,
        audio_data: Sequence[Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
        priority: int = 0,  # noqa: ARG002 - order is Seer's
        kv_transfer_params: Mapping[str, Any] | None = None,
    ) -> TokenOutput:
        """One response to a tokenised prompt; `request_id` is what `abort_request` takes.

        Raises:
            SeerError: The prompt is not of tokens alone, or Seer refuses it; says why.
        """
        if any((image_data, video_data, audio_data, mm_processor_kwargs, kv_transfer_params)):
            raise SeerError("Seer takes prompts of token ids alone: no images, videos, audio or KV transfer parameters")
        if self._rejecting:
            return self._output({"token_ids": [], "finish_reason": "abort"})
        body = {
            "request_id": request_id,
            "token_ids": [int(token) for token in prompt_ids],
            "sampling_params": self._params(dict(sampling_params), len(prompt_ids)),
        }
        said = await self._post("/inference/v1/generate", body)
        return self._output(said["choices"][0])

    def _params(self, params: dict[str, Any], prompt: int) -> dict[str, Any]:
        """VLLM's, from verl's: a flag for logprobs, and the length under either of two names, or neither."""
        prompt_length, response_length = self._lengths
        room = prompt_length + response_length - prompt if prompt_length else response_length
        asked = [params.pop(name, None) for name in ("max_tokens", "max_new_tokens")]
        params["max_tokens"] = max(1, next((most for most in asked if most is not None), min(response_length, room)))
        params["logprobs"] = 0 if params.pop("logprobs", False) else None
        return params

    def _output(self, choice: Mapping[str, Any]) -> TokenOutput:
        logprobs = choice.get("logprobs")
        spans = choice.get("weight_versions") or []
        steps = [self._steps.get(span["version"], self.global_steps) for span in spans] or [self.global_steps]
        output: TokenOutput = _Output(
            token_ids=choice["token_ids"],
            log_probs=[position["logprob"] for position in logprobs["content"]] if logprobs else None,
            stop_reason=_COMPLETED.get(choice["finish_reason"], choice["finish_reason"]),
            extra_fields={"global_steps": steps[-1], "min_global_steps": steps[0], "max_global_steps": steps[-1]},
        )
        return output

    # What replicas and checkpoint engines call

    async def abort_all_requests(
        self,
        reset_prefix_cache: bool = True,  # noqa: FBT001, FBT002 - verl's signature
        reject_request: bool = False,  # noqa: FBT001, FBT002
    ) -> dict[str, Any]:
        """End all open responses as they are, and begin none before `resume_generation`.

        What is asked for meanwhile waits, or with `reject_request` comes back aborted at once.
        """
        self._rejecting = reject_request
        await self._post("/pause", mode="abort", clear_cache=str(reset_prefix_cache).lower())
        return {"aborted_count": None, "request_ids": []}  # Seer's requests, not verl's

    async def resume_generation(self) -> None:
        """Go on."""
        await self._post("/resume")
        self._rejecting = False

    async def abort_request(
        self,
        request_id: str,
        reset_prefix_cache: bool = True,  # noqa: ARG002, FBT001, FBT002 - verl's signature
    ) -> dict[str, Any]:
        """End one response as it is."""
        said = await self._post("/abort_requests", {"request_ids": [request_id]})
        return {"aborted": said["aborted"] > 0, "request_id": request_id}

    async def set_global_steps(self, global_steps: int) -> None:
        """Say that the engines have the weights of this step; no response mixes them with others."""
        said = await self._post("/update_weight_version", {"new_version": f"step-{global_steps}"})
        self._steps[said["new_version"]] = self.global_steps = global_steps

    async def clear_kv_cache(self) -> None:
        """Empty the engines' caches."""
        await self._post("/reset_prefix_cache", reset_external="true")
        await self._post("/reset_mm_cache")
        await self._post("/reset_encoder_cache")

    async def sleep(self) -> None:
        """Give the engines' memory to the trainer: KV, and weights to the CPU."""
        await self._post("/sleep", level="1")

    async def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Take memory back: "weights", "kv_cache", or all."""
        await self._post("/wake_up", tags=list(tags or ()))

    def get_server_address(self) -> tuple[str, int]:
        """Where OpenAI clients ask."""
        parts = urlsplit(self.url)
        return parts.hostname or "", parts.port or 80

    async def _post(self, path: str, body: Any = None, **query: Any) -> Any:
        reply = await self._http.post(path, json=body, params=query)
        if reply.is_error:
            raise SeerError(f"{path} answered {reply.status_code}: {reply.text[:1000]}")
        return reply.json() if reply.content else None


class Router:
    """A load balancer of verl's: one server for all requests.

    verl makes it of the servers it has started and the YAML file that `rollout.router_config_path` names: `seer_url`,
    `response_length` and `prompt_length`, as `Server` takes them, and in `api_key_env` the name of the environment
    variable that has Seer's key, if it wants one.
    """

    def __init__(self, servers: Mapping[str, Any], config: Mapping[str, Any], server: Any = None) -> None:
        self._servers = dict(servers)
        self._inflight = 0
        self._server = server or _actor(config)

    def require_acquire_fields(self) -> list[str]:
        """Nothing of a request matters here."""
        return []

    def require_release_fields(self) -> list[str]:
        """Nothing of a request matters here."""
        return []

    def acquire_server(self, request_id: str, **_: Any) -> tuple[str, Any]:  # noqa: ARG002 - any request
        """Seer."""
        self._inflight += 1
        return _SERVER_ID, self._server

    def release_server(self, server_id: str, request_id: str | None = None) -> None:  # noqa: ARG002 - any request
        """A request has ended."""
        self._inflight = max(0, self._inflight - 1)

    def add_servers(self, servers: Mapping[str, Any]) -> None:
        """Note servers of verl's. Seer samples on those it was given, or `POST /workers` has added."""
        self._servers |= servers

    def remove_servers(self, server_ids: Sequence[str]) -> None:
        """Forget servers of verl's; Seer notices those that do not answer."""
        for server_id in server_ids:
            self._servers.pop(server_id, None)

    def get_all_servers(self) -> list[str]:
        """The servers that verl has started."""
        return list(self._servers)

    def get_inflight_count(self, server_id: str) -> int:  # noqa: ARG002 - there is one
        """Requests that have not ended."""
        return self._inflight

    def get_total_inflight(self) -> int:
        """Requests that have not ended."""
        return self._inflight

    def clear_sticky_cache(self) -> dict[str, Any]:
        """Nothing sticks: where a response runs is decided anew for each chunk."""
        return {"cleared_entries": 0, "server_loads": {_SERVER_ID: self._inflight}}

    def get_status(self) -> dict[str, Any]:
        """What verl's own balancer says of itself."""
        return {
            "servers": {_SERVER_ID: self._inflight},
            "total_inflight": self._inflight,
            "active_servers": 1,
            "registered_handles": list(self._servers),
        }

    def get_seer(self) -> Any:
        """The actor of `Server`."""
        return self._server


def _actor(config: Mapping[str, Any]) -> Any:
    import ray  # noqa: PLC0415 - verl brings it

    lengths = {name: int(config[name]) for name in ("response_length", "prompt_length") if name in config}
    variable = config.get("api_key_env")
    headers = {"Authorization": f"Bearer {os.environ[variable]}"} if variable else None
    actor = ray.remote(Server).options(max_concurrency=_CALLS, num_cpus=0)
    return actor.remote(config["seer_url"], headers=headers, **lengths)
