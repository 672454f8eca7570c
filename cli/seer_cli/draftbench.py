"""What siblings are worth to a draft, and what the suffix index costs: both without an engine.

`replay` walks recorded responses as an engine would have generated them: at each step the index proposes, what agrees
with the record is accepted, one more token (the bonus) comes from the policy, and the response's own tokens join the
index. The mean of accepted tokens plus one is the paper's acceptance length.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path  # noqa: TC003 - Typer reads annotations
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from seer_async.errors import UsageError
from seer_async.runfolder import RunInfo
from seer_cli.output import print_json

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PAPER = {0: (1.70, 1.77, 1.85), 1: (2.04, 2.14, 2.25), 5: (2.32, 2.44, 2.59), 15: (2.53, 2.69, 2.85)}
"""The paper's mean acceptance lengths, by siblings, with 1, 2 and 4 paths: 20 groups of a 72B vision-language model."""

SIBLINGS = tuple(PAPER)
PATHS = (1, 2, 4)
_TAIL = 32  # tokens of context

_Tokens = np.ndarray[tuple[int], np.dtype[np.int32]]
_Texts = np.ndarray[tuple[int, int], np.dtype[np.int32]]


class Response(msgspec.Struct, frozen=True):
    """What a replay needs of a line of samples.jsonl."""

    group: str
    prompt_token_ids: list[int]
    token_ids: list[int] = []


class Acceptance(msgspec.Struct, frozen=True):
    """Mean acceptance length, bonus token included, with so many siblings and paths."""

    siblings: int
    paths: int
    length: float
    steps: int


class Recording(msgspec.Struct):
    """All groups that were sampled at one temperature, or, where that is not known, in one file."""

    name: str
    groups: int
    largest: int  # responses of the largest group
    acceptance: list[Acceptance]


def replay(
    files: Annotated[
        list[Path], typer.Argument(help="Run folders, or samples.jsonl files, with groups of 2 and more.")
    ],
    *,
    responses: Annotated[int, typer.Option(min=1, help="Responses to replay of each group.")] = 2,
    max_spec_tokens: Annotated[int, typer.Option(min=1, max=64, help="Longest draft.")] = 8,
    seed: Annotated[int, typer.Option(help="Chooses the responses and their siblings.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON on stdout.")] = False,
) -> None:
    """Replay recorded groups: how many tokens a step brings, by temperature, siblings known and paths proposed.

    The longest accepted path counts, as if a tree were verified, like in the paper's table. vLLM verifies one path, so
    the first column is what an engine can have.
    """
    found = [
        Recording(name, len(groups), max(map(len, groups)), measure(groups, responses, max_spec_tokens, seed))
        for name, groups in _by_temperature(files).items()
    ]
    if json:
        print_json({"recordings": msgspec.to_builtins(found)})
        return
    for recording in found:
        Console().print(_table(recording))


def _by_temperature(files: Sequence[Path]) -> dict[str, list[list[Response]]]:
    found: dict[str, list[list[Response]]] = defaultdict(list)
    for file in files:
        samples = file / "samples.jsonl" if file.is_dir() else file
        if not samples.is_file():
            raise UsageError(f"{file} is neither a run folder nor a samples.jsonl")
        info = samples.with_name("run.json")
        name = _temperature(info) if info.is_file() else str(file)
        found[name] += _groups(samples)
    return dict(sorted(found.items()))


def _temperature(info: Path) -> str:
    try:
        run = msgspec.json.decode(info.read_bytes(), type=RunInfo)
        return f"T={float(run.config['sampling']['temperature'])}"
    except (msgspec.MsgspecError, LookupError, TypeError, ValueError) as error:
        raise UsageError(
            f"{info} is not what a rollout writes ({error}): name the samples.jsonl of another folder"
        ) from None


def _groups(samples: Path) -> list[list[Response]]:
    groups = defaultdict(list)
    for number, line in enumerate(samples.read_bytes().splitlines(), 1):
        try:
            response = msgspec.json.decode(line, type=Response)
        except msgspec.MsgspecError as error:
            raise UsageError(f"{samples} line {number} is no sample ({error}): drop the line") from None
        if response.token_ids:
            groups[response.group].append(response)
    found = [group for group in groups.values() if len(group) > 1]
    if not found:
        raise UsageError(f"{samples} has no group with at least 2 responses: sample with -n 16")
    return found


def measure(groups: Sequence[Sequence[Response]], responses: int, most: int, seed: int) -> list[Acceptance]:
    """Acceptance lengths over all groups; a row that asks for more siblings than a group has takes all of them."""
    found = []
    for siblings in SIBLINGS:
        for paths in PATHS:
            rng = random.Random(seed)  # noqa: S311 - a choice of samples, the same for each row
            steps = tokens = 0
            for group in groups:
                for number in rng.sample(range(len(group)), min(responses, len(group))):
                    others = rng.sample([i for i in range(len(group)) if i != number], len(group) - 1)
                    known = [group[i].token_ids for i in others[:siblings]]
                    steps += _steps(group[number], known, paths, most)
                    tokens += len(group[number].token_ids)
            found.append(Acceptance(siblings, paths, tokens / steps, steps))
    return found


def _steps(response: Response, siblings: Sequence[list[int]], paths: int, most: int) -> int:
    """Steps that an engine would need for a response whose siblings are known."""
    from seer_async.drafting.index import GroupIndex, Lookup  # noqa: PLC0415 - it needs numba

    index = GroupIndex()
    index.extend("prompt", response.prompt_token_ids)
    for number, tokens in enumerate(siblings):
        index.extend(str(number), tokens)
    lookup = Lookup(max_spec_tokens=most, top_k=paths)
    text = np.array(response.prompt_token_ids + response.token_ids, dtype=np.int32)
    at, steps = len(response.prompt_token_ids), 0
    while at < len(text):
        proposed = index.propose(text[max(0, at - _TAIL) : at], lookup)
        accepted = max((_agreed(path.tokens, text[at:]) for path in proposed), default=0)
        step = text[at : at + min(accepted, len(text) - at - 1) + 1]
        index.extend("own", step)
        at += len(step)
        steps += 1
    return steps


def _agreed(draft: Sequence[int], truth: _Tokens) -> int:
    count = 0
    while count < min(len(draft), len(truth)) and draft[count] == truth[count]:
        count += 1
    return count


def _table(recording: Recording) -> Table:
    title = f"Mean acceptance length, bonus token included: {recording.name}, {recording.groups} groups"
    caption = "in brackets: the paper"
    if recording.largest <= max(SIBLINGS):
        caption += f"; no group has more than {recording.largest - 1} siblings to give"
    table = Table(title=title, caption=caption)
    table.add_column("siblings", justify="right")
    for paths in PATHS:
        table.add_column(f"{paths} path{'s' if paths > 1 else ''}", justify="right")
    for siblings in SIBLINGS:
        row = [item for item in recording.acceptance if item.siblings == siblings]
        cells = [f"{item.length:.2f} ({paper:.2f})" for item, paper in zip(row, PAPER[siblings], strict=True)]
        table.add_row(str(siblings), *cells)
    return table


# The index alone


class IndexFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Costs of an index on one core."""

    name: str
    append_m_per_s: float  # million tokens a second, in steps of 4 over all sequences, with a proposal after each round
    periodic_m_per_s: float  # the same for text that repeats every 7 tokens, in one piece
    propose_us_p50: float
    propose_us_p99: float
    bytes_per_token: float


def index(
    *,
    sequences: Annotated[int, typer.Option(min=1, help="Sequences of the group.")] = 16,
    tokens: Annotated[int, typer.Option(min=64, help="Tokens of each.")] = 8192,
    proposals: Annotated[int, typer.Option(min=1, help="Proposals to time.")] = 5000,
    json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON on stdout.")] = False,
) -> None:
    """Measure the suffix index: appending, proposing, memory. Beside arctic-inference's tree, if that is installed."""
    text = _related(sequences, tokens)
    contenders = (_Ours, _Arctic) if find_spec("arctic_inference") else (_Ours,)
    found = [_measure(contender, text, proposals) for contender in contenders]
    if json:
        print_json({"indices": msgspec.to_builtins(found)})
        return
    table = Table(title=f"{sequences} sequences of {tokens} tokens, one core")
    for heading in ("index", "append M tok/s", "periodic", "propose us p50", "p99", "bytes/token"):
        table.add_column(heading, justify="left" if heading == "index" else "right")
    for each in found:
        table.add_row(
            each.name,
            f"{each.append_m_per_s:.2f}",
            f"{each.periodic_m_per_s:.2f}",
            f"{each.propose_us_p50:.1f}",
            f"{each.propose_us_p99:.1f}",
            f"{each.bytes_per_token:.0f}",
        )
    Console().print(table)


def _related(sequences: int, tokens: int) -> _Texts:
    """Sequences that agree in six tokens of seven."""
    rng = np.random.default_rng(0)
    text = np.tile(rng.integers(0, 2000, tokens).astype(np.int32), (sequences, 1))
    other = rng.random(text.shape) < 1 / 7
    text[other] = rng.integers(0, 2000, int(other.sum()))
    return text


class _Ours:
    name = "seer"

    def __init__(self) -> None:
        from seer_async.drafting.index import GroupIndex, Lookup  # noqa: PLC0415 - it needs numba

        GroupIndex.warm_up()
        self._index, self._lookup = GroupIndex(), Lookup()

    def extend(self, sequence: int, tokens: list[int]) -> None:
        self._index.extend(str(sequence), tokens)

    def propose(self, tail: _Tokens) -> None:
        self._index.propose(tail, self._lookup)

    def nbytes(self) -> int:
        return self._index.nbytes


class _Arctic:
    name = "arctic-inference"

    def __init__(self) -> None:
        from arctic_inference.suffix_decoding._C import SuffixTree  # noqa: PLC0415 - seldom installed

        self._tree = SuffixTree(24)  # its default depth

    def extend(self, sequence: int, tokens: list[int]) -> None:
        self._tree.extend(sequence, tokens)

    def propose(self, tail: _Tokens) -> None:
        self._tree.speculate(tail[-24:].tolist(), 8, 1.0, 0.0, 0.1, False)  # noqa: FBT003 - its API

    def nbytes(self) -> int:
        return int(self._tree.estimate_memory())


def _measure(make: type[_Ours | _Arctic], text: _Texts, proposals: int) -> IndexFigures:
    built, repeated = make(), make()
    tails = [text[0, max(0, at - _TAIL) : at] for at in range(4, text.shape[1] + 1, 4)]
    steps = [text[:, at : at + 4].tolist() for at in range(0, text.shape[1], 4)]
    start = time.perf_counter()
    for fours, tail in zip(steps, tails, strict=False):
        for sequence, four in enumerate(fours):
            built.extend(sequence, four)
        built.propose(tail)
    append_s = time.perf_counter() - start
    times = [_timed(built.propose, tail) * 1e6 for tail in _tails(text, proposals)]
    periodic = np.tile(np.arange(7, dtype=np.int32), text.size // 7)
    periodic_s = _timed(repeated.extend, 0, periodic.tolist()) + _timed(repeated.propose, periodic[:_TAIL])
    return IndexFigures(
        name=make.name,
        append_m_per_s=text.size / append_s / 1e6,
        periodic_m_per_s=len(periodic) / periodic_s / 1e6,
        propose_us_p50=float(np.percentile(times, 50)),
        propose_us_p99=float(np.percentile(times, 99)),
        bytes_per_token=built.nbytes() / text.size,
    )


def _tails(text: _Texts, count: int) -> list[_Tokens]:
    rng = random.Random(1)  # noqa: S311 - a workload
    places = [(rng.randrange(len(text)), rng.randrange(_TAIL, text.shape[1])) for _ in range(count)]
    return [text[row, at - _TAIL : at] for row, at in places]


def _timed(call: Callable[..., None], *arguments: Any) -> float:
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start
