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
    said = {_text(sample): sample for sample in samples}
    answers = [episode["traces"][0]["nodes"][-1] for episode in episodes]
    assert (
        sorted(_content(answer) for answer in answers) == sorted(map(_text, samples)) and len(samples) == 3 * ROLLOUTS
    )
    for episode, answer in zip(episodes, answers, strict=True):
        (trace,) = episode["traces"]
        assert not trace["errors"]
        assert trace["rewards"]["said_something"]["score"] == bool(_content(answer))
        sample = said[_content(answer)]
        assert TOKENIZER.decode(sample.prompt_token_ids) == f"user: {trace['task']['data']['prompt']}\nassistant: "
        if kind == "train":
            assert answer["token_ids"][-len(sample.token_ids) :] == sample.token_ids
            assert answer["logprobs"] == pytest.approx(sample.logprobs, abs=1e-3)  # traces are rounded


def _text(sample: Sample) -> str:
    return (sample.text or "").removesuffix("</s>").strip()


def _content(answer: Any) -> str:
    return (answer["message"].get("content") or "").strip()
