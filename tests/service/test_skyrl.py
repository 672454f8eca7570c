"""SkyRL's own clients (skyrl 0.4) against `seer serve`, as with `external_proxy_url`: one URL for data and control."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from seer_servers.mock import reference_response
from seer_servers.mock.tokenizer import byte_tokenizer
from tests.environments import environment
from tests.service.server import MODEL, PROMPT, reference, served

if TYPE_CHECKING:
    from tests.live.engines import MockProcess

pytestmark = pytest.mark.timeout(600)  # also makes the environment, the first time

SCRIPT = Path(__file__).parent / "trainers" / "skyrl_asks.py"
PROMPTS = [PROMPT, [5, 6, 7]]
TOKENIZER = byte_tokenizer(32_000)


@pytest.fixture(scope="module")
def got(engines: list[MockProcess]) -> Any:
    """What SkyRL got."""
    # 0.4 asks for Python 3.12, for its trainer; its clients run from 3.11 on.
    skyrl = environment("skyrl", "--no-deps", "--ignore-requires-python", "skyrl==0.4.0", beside_ours=True)

    async def ask() -> Any:
        async with served(engines) as (service, http):
            said = await asyncio.to_thread(skyrl.run, SCRIPT, str(http.base_url))
            return said | {"version": service.core.versions.current}

    return asyncio.run(ask())


def test_generate(got: Any) -> None:
    said = got["generate"]
    for number, prompt in enumerate(PROMPTS):
        tokens, logprobs, reason = reference_response(prompt, 3, 60, model=MODEL, min_tokens=1)
        assert said["response_ids"][number] == tokens
        assert said["response_logprobs"][number] == pytest.approx(logprobs)
        assert said["stop_reasons"][number] == reason
        assert said["responses"][number] == TOKENIZER.decode(tokens, skip_special_tokens=False)


def test_sample(got: Any) -> None:
    """Its Tinker API: a group in one request."""
    for number, sequence in enumerate(got["sample"]["sequences"]):
        tokens, logprobs, reason = reference(PROMPT, 7 + number, 30)
        assert (sequence["tokens"], sequence["stop_reason"]) == (tokens, reason)
        assert sequence["logprobs"] == pytest.approx(logprobs)
    assert len(got["sample"]["sequences"]) == 4


def test_texts(got: Any) -> None:
    prompt = got["render"]["token_ids"]
    assert TOKENIZER.decode(prompt) == "user: Say it\nassistant: "
    for said, ids in ((got["chat"], prompt), (got["completion"], got["tokens"][0])):
        choice = said["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        assert text == TOKENIZER.decode(reference(ids, 5, 20)[0])
    assert got["texts"] == ["Say it"]


def test_a_pause_that_keeps(got: Any) -> None:
    """Requests go on where they were, and nobody can tell."""
    assert not got["kept"]["ended_in_the_pause"]
    for number, prompt in enumerate(PROMPTS):
        tokens, logprobs, _ = reference_response(prompt, 3, 2000, model=MODEL, ignore_eos=True)
        assert got["kept"]["response_ids"][number] == tokens
        assert got["kept"]["response_logprobs"][number] == pytest.approx(logprobs)


def test_a_pause_that_aborts(got: Any) -> None:
    """What engines have sampled comes back, and goes on as the next prompt."""
    aborted, continued = got["aborted"], got["continued"]
    assert aborted["ended_in_the_pause"] and aborted["stop_reasons"] == ["abort", "abort"]
    for number, prompt in enumerate(PROMPTS):
        tokens, logprobs, _ = reference_response(prompt, 3, 2000, model=MODEL, ignore_eos=True)
        said = aborted["response_ids"][number]
        assert said == tokens[: len(said)] and 16 < len(said) < 2000
        assert aborted["response_logprobs"][number] == pytest.approx(logprobs[: len(said)])
        rest, _, _ = reference_response(prompt + said, 3, 5, model=MODEL, ignore_eos=True)
        assert continued["response_ids"][number] == rest


def test_control(got: Any) -> None:
    assert got["world"] == [2, 2]
    assert got["asleep"] and got["awake"]
    assert got["transfer"] == "done" and got["version"] == "1"
