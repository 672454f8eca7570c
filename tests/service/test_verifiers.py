"""verifiers' evaluation (0.4) against `seer serve`: its chat client, and the one that prime-rl trains with."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from seer_servers.mock.tokenizer import byte_tokenizer
from tests.environments import environment
from tests.service.server import served

if TYPE_CHECKING:
    from seer_async.types import Sample
    from tests.live.engines import MockProcess

pytestmark = pytest.mark.timeout(600)  # also makes the environment, the first time

SCRIPT = Path(__file__).parent / "trainers" / "verifiers_asks.py"
ROLLOUTS = 3
TOKENIZER = byte_tokenizer(32_000)
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mock engines' tokenizer, as a trainer has it on its disk."""
    folder = tmp_path_factory.mktemp("tokenizer")
    TOKENIZER.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return folder


@pytest.mark.parametrize("kind", ["eval", "train"])
async def test_evaluation(engines: list[MockProcess], tokenizer: Path, kind: str) -> None:
    verifiers = environment("verifiers", "verifiers==0.4.0")
    samples: list[Sample] = []
    async with served(engines) as (service, http):
        emit = service._desk.emit
        service._desk.emit = lambda sample: (samples.append(sample), emit(sample))  # type: ignore[method-assign,func-returns-value]
        renderer = [str(tokenizer)] if kind == "train" else []
        episodes = await asyncio.to_thread(
            verifiers.run, SCRIPT, str(http.base_url), "mock", kind, str(ROLLOUTS), *renderer
        )
    said = {_prompt_and_text(sample): sample for sample in samples}
    answers = [_asked_and_answered(episode) for episode in episodes]
    assert sorted(answers) == sorted(map(_prompt_and_text, samples))
    assert len(samples) == 3 * ROLLOUTS
    for episode, answer in zip(episodes, answers, strict=True):
        (trace,) = episode["traces"]
        node = trace["nodes"][-1]
        assert not trace["errors"]
        assert trace["rewards"]["said_something"]["score"] == bool((node["message"].get("content") or "").strip())
        if kind == "train":
            sample = said[answer]
            assert node["token_ids"][-len(sample.token_ids) :] == sample.token_ids
            assert node["logprobs"] == pytest.approx(sample.logprobs, abs=1e-3)  # traces are rounded


def _asked_and_answered(episode: Any) -> tuple[str, str]:
    (trace,) = episode["traces"]
    text = trace["nodes"][-1]["message"].get("content") or ""
    return f"user: {trace['task']['data']['prompt']}\nassistant: ", _plain(text)


def _prompt_and_text(sample: Sample) -> tuple[str, str]:
    return TOKENIZER.decode(sample.prompt_token_ids), _plain((sample.text or "").removesuffix("</s>"))


def _plain(text: str) -> str:
    """Without the half character that may end a response: engines leave it out, who decodes the tokens sees U+FFFD."""
    return text.rstrip("\ufffd").strip()
