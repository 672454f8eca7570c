"""No token of a reply is used unless the reply answers exactly the call."""

import json
from typing import Any

import msgspec
import pytest

from seer_async.errors import EngineError, FailureKind
from seer_async.salt import cache_salt
from seer_async.types import EngineInfo, TopLogprob, VersionSpan
from seer_async.wire import DIALECTS, CallSpec, dialect_for

SPEC = CallSpec(
    request_id="run-0-1",
    model="m",
    prefix=[1, 2],
    params={"max_tokens": 2, "logprobs": 1, "extra_args": {"seer_prompt_len": 2}},
    cache_salt="run:v",
    max_tokens=2,
    vocab_size=100,
)


def generate_reply(**changes: Any) -> bytes:
    positions = [
        {"token_id": 5, "logprob": -0.5, "top_logprobs": [{"token_id": 5, "logprob": -0.5}]},
        {
            "token_id": 6,
            "logprob": -2.0,
            "top_logprobs": [{"token_id": 6, "logprob": -2.0}, {"token_id": 9, "logprob": -1.0}],
        },
    ]
    choice = {
        "token_ids": [5, 6],
        "finish_reason": "length",
        "stop_reason": None,
        "logprobs": {"content": positions},
        "weight_versions": [{"version": "v", "start": 0, "end": 2}],
    }
    choices = [choice | changes.pop("choice", {})]
    reply = {"request_id": "generate-tokens-run-0-1", "model": "m", "usage": {"prompt_tokens": 2}, "choices": choices}
    return json.dumps(reply | changes).encode()


def completion_reply(**changes: Any) -> bytes:
    choice = {
        "token_ids": [5, 6],
        "finish_reason": "length",
        "logprobs": {
            "token_logprobs": [-0.5, -2.0],
            "top_logprobs": [{"token_id:5": -0.5}, {"token_id:6": -2.0, "token_id:9": -1.0}],
        },
    }
    choices = [choice | changes.pop("choice", {})]
    reply = {"id": "cmpl-run-0-1", "model": "m", "usage": {"prompt_tokens": 2}, "choices": choices}
    return json.dumps(reply | changes).encode()


@pytest.mark.parametrize(("dialect", "body"), [("generate", generate_reply()), ("completions", completion_reply())])
def test_a_right_reply(dialect: str, body: bytes) -> None:
    reply = DIALECTS[dialect].decode(body, SPEC)
    assert (reply.token_ids, reply.logprobs, reply.finish_reason) == ([5, 6], [-0.5, -2.0], "length")
    assert reply.top_logprobs == [[TopLogprob(5, -0.5)], [TopLogprob(9, -1.0)]]
    assert reply.versions == ((VersionSpan("v", 0, 2),) if dialect == "generate" else ())


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b'{"request_id": "\xff"}',
        b'{"\x80": 1}',
        b"{",
        b"<html>",
        b"[" * 10_000,
        b'{"request_id": "generate-tokens-run-0-1", "choices": []}',
        generate_reply(model="other"),
        generate_reply(request_id="generate-tokens-run-0-2"),
        generate_reply(request_id="generate-tokens-run-0-11"),
        generate_reply(usage={"prompt_tokens": 3}),
        generate_reply(choice={"token_ids": [5, 100]}),
        generate_reply(choice={"token_ids": [5]}),
        generate_reply(choice={"finish_reason": "done"}),
        generate_reply(choice={"finish_reason": None}),
        generate_reply(choice={"logprobs": None}),
        generate_reply(choice={"logprobs": {"content": [{"token_id": 5, "logprob": float("nan")}]}, "token_ids": [5]}),
        generate_reply(choice={"logprobs": {"content": [{"token_id": 5, "logprob": 0.5}]}, "token_ids": [5]}),
        generate_reply(choice={"logprobs": {"content": []}, "token_ids": [], "finish_reason": "stop"}),
        generate_reply(choice={"logprobs": {"content": [{"token_id": -1, "logprob": -1}]}, "token_ids": [-1]}),
        generate_reply(choice={"weight_versions": [{"version": "v", "start": 0, "end": 9}]}),
        generate_reply(choice={"token_ids": ["5", "6"]}),
    ],
)
def test_a_wrong_reply_is_unusable(body: bytes) -> None:
    with pytest.raises(EngineError) as caught:
        DIALECTS["generate"].decode(body, SPEC)
    assert caught.value.kind is FailureKind.BAD_REPLY


@pytest.mark.parametrize(
    "body",
    [
        completion_reply(model="other"),
        completion_reply(id="cmpl-run-0-2"),
        completion_reply(choice={"logprobs": {"token_logprobs": [-0.5]}}),
        completion_reply(choice={"logprobs": {"token_logprobs": [-0.5, None]}}),
        completion_reply(choice={"logprobs": {"token_logprobs": [-0.5, -1], "top_logprobs": [{"a": -1}, {"b": -1}]}}),
    ],
)
def test_a_wrong_completion_is_unusable(body: bytes) -> None:
    with pytest.raises(EngineError) as caught:
        DIALECTS["completions"].decode(body, SPEC)
    assert caught.value.kind is FailureKind.BAD_REPLY


def test_both_dialects_send_prefix_params_and_salt() -> None:
    generate = json.loads(DIALECTS["generate"].encode(SPEC))
    completion = json.loads(DIALECTS["completions"].encode(SPEC))
    assert generate["token_ids"] == completion["prompt"] == [1, 2]
    assert generate["cache_salt"] == completion["cache_salt"] == "run:v"
    assert generate["sampling_params"]["extra_args"] == completion["vllm_xargs"] == {"seer_prompt_len": 2}
    assert "extra_args" not in completion
    assert (generate["sampling_params"]["logprobs"], completion["logprobs"]) == (2, 1)


@pytest.mark.parametrize(("alternatives", "name"), [(0, "generate"), (19, "generate"), (20, "completions")])
def test_the_most_alternatives_are_asked_for_where_they_are_all_given(alternatives: int, name: str) -> None:
    info = EngineInfo(boot="b", model="m", max_model_len=8, block_size=1, num_blocks=8)
    spec = msgspec.structs.replace(SPEC, params=SPEC.params | {"logprobs": alternatives})
    assert dialect_for(spec, info).name == name
    assert dialect_for(spec, msgspec.structs.replace(info, max_logprobs=50)).name == "generate"
    assert dialect_for(spec, msgspec.structs.replace(info, dialect="completions")).name == "completions"


def test_a_cache_salt_is_one_that_engines_take() -> None:
    assert cache_salt("run", "step-1", "") == "run:step-1"
    odd = [("step/1", ""), ("step", "/1"), ("step", "@tiny#0"), ("step", "@tiny#0/mine"), ("v" * 200, ""), ("\0", "")]
    salts = {cache_salt("run", *parts) for parts in odd}
    assert len(salts) == len(odd), "no two of them share KV"
    for salt in salts:
        assert salt.startswith("run:") and len(salt) <= 128 and not set(salt) & set("@/\\\0")
