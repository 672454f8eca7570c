"""GRPO in one file: rollouts on a fleet, a policy gradient here, the new weights back into the fleet after every step.

    seer serve --engines 2 --set fleet.dtype=float32            # in another terminal
    python examples/grpo.py --url http://127.0.0.1:8100 --steps 8

Strictly on-policy: every response of a step is sampled by one version of the weights, the one that the gradient is
taken for, so there is no importance ratio and nothing to clip. The script does not believe it: each step it computes
the log-probability of every sampled token with its own weights, and stops if the engines' differ.

Weights travel as a safetensors folder that script and engines both see. That is vLLM's weight transfer with the engine
`seer_files`, which local engines on CPUs have by default; other servers need VLLM_PLUGINS=seer and
--weight-transfer-config '{"backend": "seer_files"}'. Two CPU cores and 6 GB of memory will do.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from seer_async.client import Client
from seer_servers.model import ensure_default_model

if TYPE_CHECKING:
    from collections.abc import Iterator

    from seer_async.types import Sample

SUBJECTS = ("the sea", "a cat", "bread", "winter", "a train", "the moon", "music", "a garden", "rain", "an old house")


def reward(text: str) -> float:
    """Short words: one minus a tenth of the mean length of a word, in letters."""
    words = re.findall(r"[^\W\d_]+", text)
    return 1 - sum(map(len, words)) / len(words) / 10 if words else 0.0


@dataclass
class Step:
    """What one step did.

    `mismatch` is the largest difference between the engines' log-probability of a sampled token and ours, `moved` how
    far the update moved those of the last group, at most.
    """

    number: int
    version: str  # of the weights that sampled
    reward: float
    tokens: int
    mismatch: float
    moved: float
    seconds: dict[str, float]  # of the rollout, the gradient and the transfer


class Policy:
    """The model that learns, in float32, and how it learns."""

    def __init__(self, model: Path, learning_rate: float) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), learning_rate, weight_decay=0.0)

    def logprobs(self, group: list[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of a group's response tokens, and which of them are padding's: both [responses, longest].

        A group has one prompt and padding is behind the responses, so attention needs no mask.
        """
        longest = max(len(sample.token_ids) for sample in group)
        padding = [longest - len(sample.token_ids) for sample in group]
        rows = [[*s.prompt_token_ids, *s.token_ids, *[0] * pad] for s, pad in zip(group, padding, strict=True)]
        ids = torch.tensor(rows)
        logits = self.model(ids, logits_to_keep=longest + 1).logits[:, :-1]
        found = torch.log_softmax(logits, -1).gather(-1, ids[:, -longest:, None])[..., 0]
        return found, torch.arange(longest) >= longest - torch.tensor(padding)[:, None]

    def learn(self, groups: list[list[Sample]]) -> float:
        """One step along the policy gradient; returns the largest mismatch with the engines."""
        total, mismatch = sum(len(sample.token_ids) for group in groups for sample in group), 0.0
        for group in groups:
            rewards = torch.tensor([reward(sample.text or "") for sample in group])
            advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
            ours, padding = self.logprobs(group)
            (-(advantages[:, None] * ours).masked_fill(padding, 0.0).sum() / total).backward()
            mismatch = max(mismatch, difference(ours.detach(), padding, sampled(group)))
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return mismatch

    def save(self, folder: Path) -> Path:
        """Write a checkpoint that engines can read."""
        self.model.save_pretrained(folder)
        return folder


def sampled(group: list[Sample]) -> torch.Tensor:
    """The engines' log-probabilities, padded as ours."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(sample.logprobs) for sample in group], batch_first=True)


def difference(one: torch.Tensor, padding: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference where there is no padding."""
    return float((one - other).masked_fill(padding, 0.0).abs().max())


def prompts(count: int, rng: random.Random) -> list[dict[str, Any]]:
    """Some prompts, as the lines of a dataset."""
    chosen = rng.sample(SUBJECTS, count)
    return [{"prompt": f"A short story about {subject}:"} for subject in chosen]


def rollout(client: Client, version: str, batch: list[dict[str, Any]], n: int, max_tokens: int) -> list[list[Sample]]:
    """The groups of a batch, every sample of which this version, and no other, has sampled."""
    groups = list(client.rollout(batch, n=n, max_tokens=max_tokens, temperature=1.0).groups())
    for sample in (sample for group in groups for sample in group):
        if sample.error or not sample.on_policy or sample.weight_version != version:
            raise RuntimeError(f"{sample.id} is no sample of {version}: {sample.error or sample.weight_version}")
    return groups


def train(
    client: Client,
    policy: Policy,
    folder: Path,
    *,
    steps: int,
    batch: int = 4,
    n: int = 8,
    max_tokens: int = 32,
    tolerance: float = 0.01,
    seed: int = 0,
) -> Iterator[Step]:
    """Train, with checkpoints in `folder`, which the engines must see, too; RuntimeError if they sample otherwise."""
    rng = random.Random(seed)  # noqa: S311 - not for secrets
    version = client.update_weights("step-0", {"path": str(policy.save(folder / "step-0"))})
    for number in range(steps):
        started = time.monotonic()
        groups = rollout(client, version, prompts(batch, rng), n, max_tokens)
        rolled = time.monotonic()
        mismatch = policy.learn(groups)
        if mismatch > tolerance:
            raise RuntimeError(f"the engines' {version} is not ours: log-probabilities differ by {mismatch:.3f}")
        with torch.no_grad():
            moved = difference(*policy.logprobs(groups[-1]), sampled(groups[-1]))
        learned = time.monotonic()
        path = policy.save(folder / f"step-{number + 1}")
        used, version = version, client.update_weights(path.name, {"path": str(path)})
        shutil.rmtree(folder / f"step-{number}")
        samples = [sample for group in groups for sample in group]
        yield Step(
            number=number,
            version=used,
            reward=sum(reward(sample.text or "") for sample in samples) / len(samples),
            tokens=sum(len(sample.token_ids) for sample in samples),
            mismatch=mismatch,
            moved=moved,
            seconds={"rollout": rolled - started, "gradient": learned - rolled, "transfer": time.monotonic() - learned},
        )


def main() -> None:
    """Train, and tell each step."""
    parser = argparse.ArgumentParser(description="GRPO with seer serve")
    parser.add_argument("--url", default="http://127.0.0.1:8100")
    parser.add_argument("--model", type=Path, help="folder of the engines' model; the small default model if not given")
    parser.add_argument("--folder", type=Path, help="where checkpoints go; a temporary folder if not given")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4, help="prompts a step")
    parser.add_argument("-n", type=int, default=8, help="responses to each prompt")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--tolerance", type=float, default=0.01, help="of log-probabilities; engines in bfloat16: 0.5")
    options = parser.parse_args()
    logging.disable_progress_bar()
    policy = Policy(options.model or ensure_default_model(), options.learning_rate)
    shape = {"batch": options.batch, "n": options.n, "max_tokens": options.max_tokens, "tolerance": options.tolerance}
    with (
        tempfile.TemporaryDirectory(prefix="grpo-", dir=options.folder) as folder,
        Client(options.url, api_key=os.environ.get("SEER_API_KEY")) as client,
    ):
        for step in train(client, policy, Path(folder), steps=options.steps, **shape):
            spent = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in step.seconds.items())
            print(
                f"step {step.number}: reward {step.reward:.3f}, weights {step.version}, {step.tokens} tokens, "
                f"log-probabilities differ by {step.mismatch:.5f} and moved by {step.moved:.2f} ({spent})",
                flush=True,
            )


if __name__ == "__main__":
    main()
