"""`seer serve` over real engines answers what an engine itself answers, field by field, however it cuts."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import httpx
import msgspec
import pytest

from seer_async.config import resolve
from seer_servers.service.serve import serving
from tests.mock_http import running

if TYPE_CHECKING:
    from collections.abc import Iterator

    from seer_servers.fleet import LocalFleet

pytestmark = pytest.mark.vllm

COMPLETIONS, CHAT, GENERATE = "/v1/completions", "/v1/chat/completions", "/inference/v1/generate"
MESSAGES = [{"role": "user", "content": "Name three colours and one animal with an umlaut: \u00e4\u00f6\u00fc \u732b"}]
IDS = {"return_token_ids": True}
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 40}
MOST = 20  # alternatives that vLLM gives; hot samples are often not among them
HOT: dict[str, Any] = {"seed": 5, "max_tokens": 12, "temperature": 2.0}
_PREFIX = {COMPLETIONS: "cmpl", CHAT: "chatcmpl", GENERATE: "generate-tokens"}
_ENDS = ("finish_reason", "stop_reason")
NOT_COMPARED = {"id", "request_id", "created", "system_fingerprint", "metrics", "rank", "kv_transfer_params"}

CASES: list[tuple[str, dict[str, Any]]] = [
    (COMPLETIONS, {"prompt": ["The sea is", "One, two,"], "logprobs": 2} | IDS | GREEDY),
    (COMPLETIONS, {"prompt": "The sea is", "stop": [" the", "\n\n"]} | IDS | GREEDY),
    (COMPLETIONS, {"prompt": "The sea is", "cache_salt": "mine"} | GREEDY),
    (COMPLETIONS, {"prompt": "The sea is", "temperature": 0, "ignore_eos": True}),  # 16 tokens, as always
    (COMPLETIONS, {"prompt": "The sea is", "temperature": 0, "ignore_eos": True, "max_tokens": 16}),
    (CHAT, {"messages": MESSAGES, "temperature": 0, "ignore_eos": True, "max_completion_tokens": 16}),
    (GENERATE, {"token_ids": [504, 3413], "cache_salt": "mine", "sampling_params": GREEDY}),
    (COMPLETIONS, {"prompt": "The sea is", "stop_token_ids": [30, 28, 282], "logprobs": 0} | IDS | GREEDY),
    (COMPLETIONS, {"prompt": "The sea is", "stop": " blue", "include_stop_str_in_output": True} | IDS | GREEDY),
    (COMPLETIONS, {"prompt": [[504, 3413, 314]], "logprobs": 1, "return_tokens_as_token_ids": True} | IDS | GREEDY),
    (COMPLETIONS, {"prompt": "Once", "n": 2, "seed": 7, "max_tokens": 40, "presence_penalty": 0.7} | IDS),
    (COMPLETIONS, {"prompt": "A word:", "structured_outputs": {"choice": ["yes indeed", "not at all"]}} | GREEDY),
    (CHAT, {"messages": MESSAGES, "logprobs": True, "top_logprobs": 3} | IDS | GREEDY),
    (CHAT, {"messages": MESSAGES, "logprobs": True, "return_tokens_as_token_ids": True} | GREEDY),
    (CHAT, {"messages": MESSAGES, "n": 2, "seed": 9, "max_tokens": 40, "stop": ["."]} | IDS),
    (GENERATE, {"token_ids": [504, 3413, 314], "sampling_params": {"logprobs": 2} | GREEDY}),
    (
        GENERATE,
        {"token_ids": [504, 3413, 314], "sampling_params": {"n": 2, "seed": 3, "max_tokens": 40, "logprobs": 0}},
    ),
    (COMPLETIONS, {"prompt": "Any word", "logprobs": MOST, "return_tokens_as_token_ids": True} | IDS | HOT),
    (CHAT, {"messages": MESSAGES, "logprobs": True, "top_logprobs": MOST} | IDS | HOT),
    (GENERATE, {"token_ids": [504, 3413], "sampling_params": {"logprobs": MOST} | HOT}),
    (COMPLETIONS, {"prompt": "A word:", "structured_outputs": {"choice": ["yes", "no"]}, "logprobs": MOST} | GREEDY),
]
REFUSED: list[tuple[str, dict[str, Any]]] = [
    (COMPLETIONS, {"prompt": "x", "temperature": -1}),
    (COMPLETIONS, {"prompt": "x" * 20_000}),
    (COMPLETIONS, {"prompt": "x", "model": "other"}),
    (COMPLETIONS, {"prompt": "x", "logprobs": MOST + 1}),
    (GENERATE, {"token_ids": [504], "sampling_params": {"logprobs": MOST + 1}}),
    (CHAT, {"messages": MESSAGES, "logprobs": True, "top_logprobs": MOST + 1}),
    (CHAT, {"messages": MESSAGES, "top_logprobs": 2}),
    (CHAT, {"messages": []}),
    (COMPLETIONS, {"prompt": "x", "cache_salt": "a/b"}),
    (GENERATE, {"token_ids": [504], "sampling_params": {}, "cache_salt": "a@b"}),
]

MANY = 1000  # tokens
SHAPES: list[dict[str, Any]] = [
    {},
    {"max_tokens": 16, "temperature": 0.0, "top_p": 0.9, "top_k": 40, "min_p": 0.1},
    {"max_tokens": 30, "min_tokens": 4, "n": 2, "seed": 3, "ignore_eos": True},
    {"max_tokens": 30, "temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.1},
    {"max_tokens": 30, "presence_penalty": 0.5, "frequency_penalty": -0.5, "repetition_penalty": 1.1},
    {"max_tokens": 30, "stop": ["a", "b"], "stop_token_ids": [5], "include_stop_str_in_output": True},
    {"max_tokens": 30, "bad_words": ["no"], "logit_bias": {"7": 2.0}, "allowed_token_ids": [5, 6, 7]},
    {"max_tokens": 30, "stop": "a", "skip_special_tokens": False, "spaces_between_special_tokens": False},
]
RENDERED = [
    *((COMPLETIONS, {"prompt": [5, 6, 7]} | shape) for shape in [*SHAPES, {"logprobs": 0}, {"logprobs": 3}]),
    *((CHAT, {"messages": MESSAGES} | shape) for shape in [*SHAPES, {"logprobs": True}, {"max_completion_tokens": 9}]),
    (CHAT, {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2}),
]


async def test_one_server_or_a_fleet(vllm_fleet: LocalFleet) -> None:
    config = resolve({"serve": {"port": 0, "stream_chunk_size": 8}, "rollout": {"chunk_size": 8}})
    async with (
        httpx.AsyncClient(base_url=vllm_fleet.urls[-1], timeout=120) as engine,
        serving(config, vllm_fleet.urls) as (_, url),
        httpx.AsyncClient(base_url=url, timeout=120) as service,
    ):
        await asyncio.gather(*(_alike(engine, service, *case) for case in CASES))
        for path, body in REFUSED:
            replies = [await client.post(path, json=body) for client in (engine, service)]
            assert replies[0].status_code == replies[1].status_code >= 400, [reply.text for reply in replies]
            assert replies[0].json()["error"].keys() == replies[1].json()["error"].keys()
        tokens = [await client.post("/tokenize", json={"prompt": "The sea"}) for client in (engine, service)]
        assert tokens[0].json() == tokens[1].json()


async def test_the_mock_renders_as_an_engine_does(vllm_fleet: LocalFleet) -> None:
    """What the service's other tests stand on: which sampling parameters engines tell it of, and as what."""
    async with httpx.AsyncClient(base_url=vllm_fleet.urls[-1], timeout=120) as engine, running() as (_, mock):
        for path, body in RENDERED:
            theirs = _params((await engine.post(f"{path}/render", json=body)).raise_for_status().json())
            async with mock.post(f"{path}/render", json=body) as reply:
                assert reply.ok, await reply.text()
                ours = _params(await reply.json())
            assert ours == theirs, body


def _params(rendered: Any) -> dict[str, Any]:
    """But for what an engine tells itself, and with a word for all that its context has left."""
    (one,) = rendered if isinstance(rendered, list) else [rendered]
    params = {name: value for name, value in one["sampling_params"].items() if name != "skip_reading_prefix_cache"}
    return params | ({"max_tokens": "all"} if params.get("max_tokens", 0) > MANY else {})


async def _alike(engine: httpx.AsyncClient, service: httpx.AsyncClient, path: str, asked: dict[str, Any]) -> None:
    body = await marked(engine, asked)
    said = [(await client.post(path, json=body)).raise_for_status().json() for client in (engine, service)]
    differ = list(differences(*said))
    assert not differ, (path, body, differ)
    assert [name.rpartition("-")[0] for name in map(_id, said)] == [_PREFIX[path]] * 2
    told = [await streamed(client, path, body) for client in (engine, service)]
    differ = list(differences(*told))
    assert not differ, (path, body, differ)
    assert told[1]["texts"] == (list(texts(said[0])) if path != GENERATE else [""] * len(said[0]["choices"]))


def _id(reply: dict[str, Any]) -> str:
    name: str = reply.get("id") or reply["request_id"]
    return name


async def marked(engine: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
    """A seeded request with the mark for which an engine draws its noise by position, as it does for the service's."""
    if "sampling_params" in body and "seed" in body["sampling_params"]:
        mark = {"extra_args": {"seer_prompt_len": len(body["token_ids"])}}
        return body | {"sampling_params": body["sampling_params"] | mark}
    if "seed" not in body:
        return body
    prompt = {name: body[name] for name in ("prompt", "messages") if name in body}
    reply = await engine.post("/tokenize", json=prompt)
    return body | {"vllm_xargs": {"seer_prompt_len": reply.json()["count"]}}


def texts(reply: dict[str, Any]) -> Iterator[str]:
    for choice in reply["choices"]:
        yield choice["message"]["content"] if "message" in choice else choice["text"]


async def streamed(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """What a stream tells of the responses, in order, however it is cut; and what its events are called."""
    asked = {"stream": True, "stream_options": {"include_usage": True}}
    reply = (await client.post(path, json=body | asked)).raise_for_status()
    lines = [line.removeprefix("data: ") for line in reply.text.splitlines() if line]
    assert lines.pop() == "[DONE]"
    events = [msgspec.json.decode(line) for line in lines]
    found: dict[int, list[dict[str, Any]]] = {}
    for choice in (choice for event in events for choice in event["choices"]):
        found.setdefault(choice["index"], []).append(choice)
    responses = [pieces for _, pieces in sorted(found.items())]
    return {
        "texts": ["".join(_said(piece) for piece in pieces) for pieces in responses],
        "roles": [
            [piece["delta"]["role"] for piece in pieces if "role" in piece.get("delta", {})] for pieces in responses
        ],
        "token_ids": [[token for piece in pieces for token in piece.get("token_ids") or []] for pieces in responses],
        "ends": [[piece[name] for piece in pieces if piece.get(name)] for pieces in responses for name in _ENDS],
        "logprobs": [_joined([piece["logprobs"] for piece in pieces if piece.get("logprobs")]) for pieces in responses],
        "prompts": sorted(filter(None, map(_prompt, (*events, *(c for e in events for c in e["choices"]))))),
        "usage": events[-1]["usage"],
        "events": {event.get("object") for event in events},
        "ids": {_id(event).rpartition("-")[0] for event in events},
    }


def _said(piece: dict[str, Any]) -> str:
    text: str = piece["delta"].get("content") or "" if "delta" in piece else piece.get("text") or ""
    return text


def _prompt(part: dict[str, Any]) -> list[int] | None:
    return part.get("prompt_token_ids")


def _joined(parts: list[dict[str, list[Any]]]) -> dict[str, list[Any]]:
    return {name: [value for part in parts for value in part[name] or []] for name in (parts[0] if parts else ())}


def _ordered(tops: list[Any]) -> list[Any]:
    """The sampled token first, as it comes; neighbours with almost the same logprob may change places."""
    return tops[:1] + sorted(tops[1:], key=lambda top: str(top.get("token", top.get("token_id"))))


def differences(ours: Any, theirs: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where two answers differ; numbers may differ in the last digits, and what is null may be left out."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for name in (ours.keys() | theirs.keys()) - NOT_COMPARED - _named_before(theirs):
            yield from differences(ours.get(name), theirs.get(name), f"{where}.{name}")
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        if where.endswith(".top_logprobs"):
            ours, theirs = _ordered(ours), _ordered(theirs)
        for number, pair in enumerate(zip(ours, theirs, strict=True)):
            yield from differences(*pair, f"{where}[{number}]")
    elif isinstance(ours, float) and isinstance(theirs, float):
        if ours != pytest.approx(theirs, abs=2e-3):
            yield where, ours, theirs
    elif ours != theirs:
        yield where, ours, theirs


def _named_before(said: dict[str, Any]) -> set[str]:
    """The name that a sampled token had before vLLM 0.32; only the service tells it beside the id."""
    if not {"token", "token_id"} <= said.keys():
        return set()
    assert said["token"] == f"token_id:{said['token_id']}"
    return {"token"}
