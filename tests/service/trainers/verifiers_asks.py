"""verifiers' own evaluation: `python verifiers_asks.py URL MODEL KIND N [RENDERER]`; prints what it recorded.

KIND is the client: "eval" asks for chat completions; "train", prime-rl's, for /inference/v1/generate, with token ids
by RENDERER, a tokenizer's folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory


def main(url: str, model: str, kind: str, n: str, renderer: str = "") -> None:
    from verifiers.v1.cli.eval.main import main as evaluate

    client = {"type": kind, "base-url": f"{url}/v1", "api-key-var": "SEER_TEST_KEY"}
    if renderer:
        client["renderer-model-name"] = renderer
    with TemporaryDirectory() as folder:
        evaluate([
            "colours", "--env.agent.harness.id", "colours", "--env.agent.runtime.type", "subprocess",
            "--model", model, "--num-rollouts", n,
            *[word for name, value in client.items() for word in (f"--client.{name}", value)],
            "--sampling.temperature", "1.0", "--sampling.max-tokens", "40",
            "--output-dir", folder, "--run.name", "colours", "--no-push", "--no-rich",
        ])  # fmt: skip
        (traces,) = Path(folder).rglob("traces.jsonl")
        episodes = [json.loads(line) for line in traces.read_text().splitlines()]
    print(json.dumps(episodes))


if __name__ == "__main__":
    main(*sys.argv[1:])
