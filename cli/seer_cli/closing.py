"""The last lines of a rollout: what came out, whether it is on-policy, why samples failed, and how to go on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seer_async.rollout import Ending

_REASONS = {
    "drained": "interrupted after the chunks in flight",
    "aborted": "interrupted",
    "no_engine": "no usable engine was left",
}


def closing_words(ending: Ending) -> list[str]:
    """What a person wants to know at the end, line by line."""
    summary = ending.summary
    words = [
        f"{summary['done']} of {summary['samples']} samples, {summary['failed']} failed",
        f"{summary['tokens']} tokens, {summary['seconds']:.1f} s, {summary['tokens_per_second']:.0f} tokens/s",
        *_policy_words(summary),
        f"samples in {ending.path}/samples.jsonl",
    ]
    again = f"seer rollout --resume {ending.path}"
    if summary["failed"]:
        words.append(f"the first that failed is {summary['first_error']}")
    if ending.reason != "done":
        words.append(f"{_REASONS[ending.reason]}; go on with: {again}")
    elif summary["failed"]:
        words.append(f"try what failed again with: {again}")
    return words


def _policy_words(summary: dict[str, Any]) -> list[str]:
    """Nothing is said of a run that is on-policy: that is the rule."""
    words = []
    if off := summary.get("off_policy"):  # runs of before did not count them
        words.append(f"{off} samples are off-policy: each line of samples.jsonl says whether it is (on_policy)")
    if len(versions := summary.get("weight_versions", {})) > 1:
        counts = ", ".join(f"{count} end with {version}" for version, count in versions.items())
        words.append(f"the samples are not of one policy: weights changed or differed between engines ({counts})")
    return words
