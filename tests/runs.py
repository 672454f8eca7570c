"""Running whole rollouts in tests: in this process, over engines that are already up."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from seer_async.config import resolve
from seer_async.fleet import open_fleet
from seer_async.rollout import Rollout
from seer_async.runfolder import RunFolder

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from seer_async.rollout import Result
    from seer_async.types import Prompt


async def roll(
    path: Path,
    urls: Sequence[str],
    prompts: Sequence[Prompt],
    tree: dict[str, Any],
    *,
    during: Callable[[Rollout], None] = lambda _: None,
) -> Result:
    """One rollout into `path`; `during` is called once, before the first event."""
    config = resolve({"output": {"trace": False}}, tree)
    async with open_fleet(config, urls) as fleet:
        await fleet.attach()
        tokenizer = await fleet.tokenizer()
        tokenised = await fleet.tokenise(prompts)
        folder = RunFolder.create(path, config, tokenised, dataset="test", command=[])
        try:
            rollout = Rollout(folder, fleet, tokenizer)
            during(rollout)
            return await rollout.run()
        finally:
            folder.close()


async def resume(path: Path, urls: Sequence[str], *, during: Callable[[Rollout], None] = lambda _: None) -> Result:
    """Go on with the run in `path`."""
    folder, records, emitted = RunFolder.resume(path)
    try:
        async with open_fleet(folder.config, urls) as fleet:
            await fleet.attach()
            rollout = Rollout(folder, fleet, await fleet.tokenizer())
            during(rollout)
            return await rollout.run(records, frozenset(emitted))
    finally:
        folder.close()


def samples(path: Path) -> dict[str, dict[str, Any]]:
    """The run's samples by id; a duplicate is an error."""
    lines = [json.loads(line) for line in (path / "samples.jsonl").read_text().splitlines()]
    by_id = {sample["id"]: sample for sample in lines}
    assert len(by_id) == len(lines), "a sample was written twice"
    return by_id
