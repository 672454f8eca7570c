"""Rejection sampling with `seer serve`: keep the right answers, and ask again where there was none.

    seer serve --engines 2            # in another terminal; or any running service
    python examples/rejection_sampling.py --url http://127.0.0.1:8100 --out accepted.jsonl

Each round samples n responses to every question that has no right answer yet. As soon as one of a question's responses
is right the question is settled, and when all are, the rest of the round is cancelled: the fleet is free at once. What
comes out is a dataset to train on, one JSON object a line.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seer_async.client import Client, RolloutError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from seer_async.client import Rollout
    from seer_async.types import Sample


def questions(count: int, seed: int) -> dict[str, dict[str, Any]]:
    """Sums, by id. Fields that Seer does not know, like `answer`, come back with each sample as `extra`."""
    rng = random.Random(seed)  # noqa: S311 - not for secrets
    pairs = [(rng.randrange(2, 10), rng.randrange(2, 10)) for _ in range(count)]
    return {
        f"sum-{number}": {"id": f"sum-{number}", "prompt": f"Question: {a} + {b} = ?\nAnswer:", "answer": a + b}
        for number, (a, b) in enumerate(pairs)
    }


def is_right(sample: Sample) -> bool:
    """The verifier: the first number of the response."""
    found = re.search(r"\d+", sample.text or "")
    return found is not None and int(found[0]) == (sample.extra or {})["answer"]


def accepted(rollout: Rollout, wanted: int) -> Iterator[Sample]:
    """The first right sample of each question; cancels the rollout when all questions are settled."""
    settled: set[str] = set()
    for sample in rollout:
        if sample.error or sample.group in settled or not is_right(sample):
            continue
        settled.add(sample.group)
        yield sample
        if len(settled) == wanted:
            rollout.cancel()
            return


def main() -> None:
    """Sample rounds until every question is settled."""
    parser = argparse.ArgumentParser(description="Rejection sampling with seer serve")
    parser.add_argument("--url", default="http://127.0.0.1:8100")
    parser.add_argument("--out", type=Path, default=Path("accepted.jsonl"))
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("-n", type=int, default=16)
    options = parser.parse_args()
    open_questions = questions(options.questions, seed=0)
    with Client(options.url, api_key=os.environ.get("SEER_API_KEY")) as client, options.out.open("w") as out:
        for number in range(options.rounds):
            rollout = client.rollout(open_questions.values(), n=options.n, max_tokens=16, temperature=1.0)
            try:
                for sample in accepted(rollout, len(open_questions)):
                    del open_questions[sample.group]
                    line = {"prompt": sample.prompt, "completion": sample.text, "weights": sample.weight_version}
                    out.write(json.dumps(line) + "\n")
            except RolloutError as error:
                print(f"round {number}: {error}")
            status = rollout.status()
            print(
                f"round {number}: {status.done} of {status.samples} responses, {status.tokens_per_s:.0f} tokens/s,",
                end=" ",
            )
            print(f"{len(open_questions)} of {options.questions} questions left")
            if not open_questions:
                return


if __name__ == "__main__":
    main()
