"""What siblings are worth to a draft, and what the suffix index costs: both without an engine.

`replay` walks recorded responses as an engine would have generated them: at each step the index proposes, what agrees
with the record is accepted, one more token (the bonus) comes from the policy, and the response's own tokens join the
index. The mean of accepted tokens plus one is the paper's acceptance length.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from pathlib import Path  # noqa: TC003 - Typer reads annotations
from typing import TYPE_CHECKING, Annotated

import msgspec
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from seer_async.errors import UsageError
from seer_cli.output import print_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from seer_async.drafting.index import GroupIndex

PAPER = {0: (1.70, 1.77, 1.85), 1: (2.04, 2.14, 2.25), 5: (2.32, 2.44, 2.59), 15: (2.53, 2.69, 2.85)}
"""The paper's mean acceptance lengths, by siblings, with 1, 2 and 4 paths: 20 groups of a 72B vision-language model."""

SIBLINGS = tuple(PAPER)
PATHS = (1, 2, 4)
_TAIL = 32  # tokens of context


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
    """Replay recorded groups: how many tokens a step brings, by siblings known and paths proposed.

    The longest accepted path counts, as if a tree were verified, like in the paper's table. vLLM verifies one path, so
    the first column is what an engine can have.
    """
    figures = {str(file): measure(_groups(file), responses, max_spec_tokens, seed) for file in files}
    if json:
        print_json(msgspec.to_builtins(figures))
        return
    for name, found in figures.items():
        Console().print(_table(name, found))


def _groups(file: Path) -> list[list[Response]]:
    path = file / "samples.jsonl" if file.is_dir() else file
    if not path.is_file():
        raise UsageError(f"{file} is neither a run folder nor a samples.jsonl")
    groups = defaultdict(list)
    for line in path.read_bytes().splitlines():
        response = msgspec.json.decode(line, type=Response)
        if response.token_ids:
            groups[response.group].append(response)
    found = [group for group in groups.values() if len(group) > 1]
    if not found:
        raise UsageError(f"{path} has no group with at least 2 responses: sample with -n 16")
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


def _agreed(draft: Sequence[int], truth: np.ndarray[tuple[int], np.dtype[np.int32]]) -> int:
    count = 0
    while count < min(len(draft), len(truth)) and draft[count] == truth[count]:
        count += 1
    return count


def _table(name: str, found: Sequence[Acceptance]) -> Table:
    table = Table(title=f"Mean acceptance length, bonus token included: {name}", caption="in brackets: the paper")
    table.add_column("siblings", justify="right")
    for paths in PATHS:
        table.add_column(f"{paths} path{'s' if paths > 1 else ''}", justify="right")
    for siblings in SIBLINGS:
        row = [item for item in found if item.siblings == siblings]
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
    bytes_per_token: float | None


def index(
    *,
    sequences: Annotated[int, typer.Option(min=1, help="Sequences of the group.")] = 16,
    tokens: Annotated[int, typer.Option(min=64, help="Tokens of each.")] = 8192,
    proposals: Annotated[int, typer.Option(min=1, help="Proposals to time.")] = 5000,
    json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON on stdout.")] = False,
) -> None:
    """Measure the suffix index: appending, proposing, memory. Beside arctic-inference's tree, if that is installed."""
    text = _related(sequences, tokens)
    found = [_measure_ours(text, proposals)]
    if (other := _measure_arctic(text, proposals)) is not None:
        found.append(other)
    if json:
        print_json({"indices": msgspec.to_builtins(found)})
        return
    table = Table(title=f"{sequences} sequences of {tokens} tokens, one core")
    for heading in ("index", "append M tok/s", "periodic", "propose us p50", "p99", "bytes/token"):
        table.add_column(heading, justify="left" if heading == "index" else "right")
    for each in found:
        memory = "-" if each.bytes_per_token is None else f"{each.bytes_per_token:.0f}"
        table.add_row(
            each.name,
            f"{each.append_m_per_s:.2f}",
            f"{each.periodic_m_per_s:.2f}",
            f"{each.propose_us_p50:.1f}",
            f"{each.propose_us_p99:.1f}",
            memory,
        )
    Console().print(table)


def _related(sequences: int, tokens: int) -> np.ndarray[tuple[int, int], np.dtype[np.int32]]:
    """Sequences that agree in six tokens of seven."""
    rng = np.random.default_rng(0)
    text = np.tile(rng.integers(0, 2000, tokens).astype(np.int32), (sequences, 1))
    other = rng.random(text.shape) < 1 / 7
    text[other] = rng.integers(0, 2000, int(other.sum()))
    return text


_Texts = np.ndarray[tuple[int, int], np.dtype[np.int32]]


def _tails(text: _Texts, count: int) -> list[tuple[int, int]]:
    rng = random.Random(1)  # noqa: S311 - a workload
    return [(rng.randrange(len(text)), rng.randrange(_TAIL, text.shape[1])) for _ in range(count)]


def _measure_ours(text: _Texts, proposals: int) -> IndexFigures:
    from seer_async.drafting.index import GroupIndex, Lookup  # noqa: PLC0415 - it needs numba

    GroupIndex.warm_up()
    built, lookup = GroupIndex(), Lookup()
    steps = _in_steps(text)
    start = time.perf_counter()
    for at, name, four in steps:
        built.extend(name, four)
        if name == "0":
            built.propose(text[0, max(0, at - _TAIL) : at + 1], lookup)
    append_s = time.perf_counter() - start
    times = []
    for row, at in _tails(text, proposals):
        start = time.perf_counter()
        built.propose(text[row, at - _TAIL : at], lookup)
        times.append((time.perf_counter() - start) * 1e6)
    periodic = np.tile(np.arange(7, dtype=np.int32), text.size // 7)
    start = time.perf_counter()
    (repeated := GroupIndex()).extend("0", periodic)
    repeated.propose(periodic[:_TAIL], lookup)
    return _figures("seer", times, text.size / append_s, text.size / (time.perf_counter() - start), built)


def _measure_arctic(text: _Texts, proposals: int) -> IndexFigures | None:
    try:
        from arctic_inference.suffix_decoding._C import SuffixTree  # noqa: PLC0415 - seldom installed
    except ImportError:
        return None
    tree = SuffixTree(24)
    steps = _in_steps(text)
    start = time.perf_counter()
    for at, name, four in steps:
        tree.extend(int(name), four)
        if name == "0":
            tree.speculate(text[0, max(0, at - _TAIL) : at + 1].tolist(), 8, 1.0, 0.0, 0.1, False)  # noqa: FBT003 - its API
    append_s = time.perf_counter() - start
    times = []
    for row, at in _tails(text, proposals):
        tail = text[row, at - 24 : at].tolist()
        start = time.perf_counter()
        tree.speculate(tail, 8, 1.0, 0.0, 0.1, False)  # noqa: FBT003 - its API
        times.append((time.perf_counter() - start) * 1e6)
    periodic = np.tile(np.arange(7, dtype=np.int32), text.size // 7).tolist()
    start = time.perf_counter()
    SuffixTree(24).extend(0, periodic)
    return _figures("arctic-inference", times, text.size / append_s, text.size / (time.perf_counter() - start))


def _in_steps(text: _Texts) -> list[tuple[int, str, list[int]]]:
    return [
        (at, str(row), text[row, at : at + 4].tolist()) for at in range(0, text.shape[1], 4) for row in range(len(text))
    ]


def _figures(
    name: str, times: list[float], append: float, periodic: float, built: GroupIndex | None = None
) -> IndexFigures:
    return IndexFigures(
        name=name,
        append_m_per_s=append / 1e6,
        periodic_m_per_s=periodic / 1e6,
        propose_us_p50=float(np.percentile(times, 50)),
        propose_us_p99=float(np.percentile(times, 99)),
        bytes_per_token=built.nbytes / built.tokens if built else None,
    )
