"""A report on one run: every figure and series, ready to be written down in any format."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from seer_async.config import Config, to_toml_tree
from seer_async.report.chunks import Chunks, chunks
from seer_async.report.completion import Completion, completion
from seer_async.report.drafts import Drafts, drafts
from seer_async.report.elapsed import elapsed_of
from seer_async.report.estimates import Estimates, estimates
from seer_async.report.figures import Figures, figures
from seer_async.report.lengths import Lengths, lengths
from seer_async.report.timeline import Timeline, timeline
from seer_async.report.words import count

if TYPE_CHECKING:
    from seer_async.report.run import Run

_STATUS = {
    "done": "done",
    "running": "running, or killed",
    "drained": "interrupted",
    "aborted": "interrupted",
    "no_engine": "no usable engine left",
}
_SHOWN_ALWAYS = ("rollout.n", "rollout.chunk_size", "scheduler.policy", "sampling.max_tokens", "sampling.temperature")
_SHOWN_ELSEWHERE = {"fleet.servers"}
_USER_INFO = re.compile(r"//[^/@\s]*@")  # of a URL; it may hold a password


class Subject(msgspec.Struct, frozen=True, kw_only=True):
    """What was run. `settings` are config keys that differ from the defaults, and those that every reader asks for.

    `engines` are (name, URL, what it is); `started` is in Unix seconds. `why_off_policy` is empty where `on_policy`.
    """

    name: str
    run: str
    path: str
    status: str
    on_policy: bool
    why_off_policy: str
    dataset: str
    groups: int
    n: int
    policy: str
    models: list[str]
    engines: list[tuple[str, str, str]]
    started: float
    resumed: int
    seed: int
    version: str
    settings: dict[str, str]
    problems: list[str]

    @property
    def fidelity(self) -> str:
        """Whether the samples are fair ones of one policy, and why not."""
        if self.on_policy:
            return "on-policy"
        return f"off-policy: {self.why_off_policy}" if self.why_off_policy else "off-policy"


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Everything there is to say of one run. `pauses` are where it was resumed, in seconds of the run."""

    subject: Subject
    figures: Figures
    completion: Completion
    timeline: Timeline
    lengths: Lengths
    estimates: Estimates
    chunks: Chunks
    drafts: Drafts | None
    pauses: list[float]


def report_on(run: Run, name: str = "") -> Report:
    """The report on a run, which is called `name` beside others; without one, by its folder's name."""
    elapsed = elapsed_of(run)
    end = completion(run, elapsed)
    fleet = timeline(run, elapsed, end.seconds)
    made = chunks(run)
    drafting = drafts(run, elapsed)
    numbers = figures(run, end, fleet, made, drafting)
    return Report(
        subject=_subject(run, name or Path(run.path).resolve().name, numbers),
        figures=numbers,
        completion=end,
        timeline=fleet,
        lengths=lengths(run),
        estimates=estimates(run),
        chunks=made,
        drafts=drafting,
        pauses=elapsed.pauses,
    )


def _subject(run: Run, name: str, numbers: Figures) -> Subject:
    info = run.info
    policy = str(run.setting("scheduler", "policy") or "unknown")
    on_policy = info.on_policy and not numbers.off_policy
    return Subject(
        name=name,
        run=info.run,
        path=run.path,
        status=_STATUS.get(info.status, info.status),
        on_policy=on_policy,
        why_off_policy="" if on_policy else _why_off_policy(run, numbers, policy),
        dataset=info.dataset,
        groups=info.groups,
        n=int(run.setting("rollout", "n") or 0),
        policy=policy,
        models=sorted({str(engine.get("model", "unknown")) for engine in run.engine_infos}),
        engines=[_engine(entry) for entry in info.engines],
        started=info.started,
        resumed=len(info.resumed),
        seed=info.seed,
        version=info.seer,
        settings=_settings(info.config),
        problems=run.problems,
    )


def _why_off_policy(run: Run, numbers: Figures, policy: str) -> str:
    versions = [{chunk.weight_version for chunk in response.chunks} for response in run.responses]
    mixed = sum(len(of) > 1 for of in versions)
    reasons = []
    if mixed:
        reasons.append(f"{count(mixed)} {'response mixes' if mixed == 1 else 'responses mix'} weight versions")
    elif (different := len(set[str]().union(*versions))) > 1:
        reasons.append(f"responses are of {different} weight versions")
    if numbers.off_policy > mixed:
        reasons.append(f"policy {policy} chose which responses end")
    return ", ".join(reasons)


def _engine(entry: dict[str, Any]) -> tuple[str, str, str]:
    info = entry.get("info")
    said = "never answered"
    if info:
        room = info.get("num_blocks", 0) * info.get("block_size", 0)
        pool = f", KV pool {info['kv_pool']}" if info.get("kv_pool") else ""
        said = f"{info.get('model', 'unknown')}, KV for {room:,} tokens{pool}"
    return str(entry.get("name", "")), _USER_INFO.sub("//", str(entry.get("url", ""))), said


def _settings(config: dict[str, Any]) -> dict[str, str]:
    default = _flat(to_toml_tree(Config()))
    used = _flat(config)
    keys = [*_SHOWN_ALWAYS, *(key for key in used if key not in _SHOWN_ALWAYS and used[key] != default.get(key))]
    return {key: used[key] for key in keys if key in used and key not in _SHOWN_ELSEWHERE}


def _flat(tree: dict[str, Any]) -> dict[str, str]:
    return {
        f"{section}.{key}": _USER_INFO.sub("//", msgspec.json.encode(value).decode() if value != "" else '""')
        for section, keys in tree.items()
        if isinstance(keys, dict)
        for key, value in keys.items()
    }
