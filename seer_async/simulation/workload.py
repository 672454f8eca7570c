"""What is simulated: groups of responses with known lengths.

Lengths of generated workloads are heavy-tailed over groups and similar within one: the logarithm of a length is the sum
of a group's part and a response's own, both normal, cut off at the limit. Invariant: the mean of what comes out is the
wanted one, but for rounding, and the longest response is as long as the limit.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from seer_async.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

_BISECTIONS = 60


class WorkGroup(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt and the lengths of the responses to it, in tokens."""

    id: str
    prompt: int
    lengths: tuple[int, ...]


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """Groups in the order of the dataset; no response is longer than `limit`."""

    name: str
    limit: int
    groups: tuple[WorkGroup, ...]

    @property
    def lengths(self) -> Iterator[int]:
        """All lengths."""
        return (length for group in self.groups for length in group.lengths)

    @property
    def requests(self) -> int:
        """How many responses there are."""
        return sum(len(group.lengths) for group in self.groups)

    @property
    def tokens(self) -> int:
        """How many tokens they have together."""
        return sum(self.lengths)

    @property
    def correlation(self) -> float:
        """The groups' share of the variance of the lengths' logarithms, by one-way analysis of variance."""
        logs = [np.log(group.lengths) for group in self.groups]
        size = len(logs[0])
        within = float(np.mean([np.var(part, ddof=1) for part in logs]))
        between = float(np.var([np.mean(part) for part in logs], ddof=1)) - within / size
        return between / (between + within)

    def twice(self) -> Workload:
        """Every group and another one like it."""
        again = tuple(msgspec.structs.replace(group, id=f"{group.id}-again") for group in self.groups)
        return msgspec.structs.replace(self, groups=self.groups + again)


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """A generated workload: `requests` responses, `n` to a prompt of `prompt` tokens.

    `sigma` is the standard deviation of the logarithm of an uncut length, `correlation` the group's share of its
    variance.
    """

    name: str
    requests: int
    n: int
    mean: float
    limit: int
    prompt: int = 512
    sigma: float = 1.0
    correlation: float = 0.95

    def __post_init__(self) -> None:
        if not 0 < self.mean < self.limit:
            raise UsageError(f"the mean length must be above 0 and below the limit of {self.limit} tokens")

    def generate(self, seed: int) -> Workload:
        """The workload of that seed."""
        rng = np.random.default_rng(seed)
        groups = max(1, round(self.requests / self.n))
        shared = rng.normal(0, self.sigma * math.sqrt(self.correlation), (groups, 1))
        own = rng.normal(0, self.sigma * math.sqrt(1 - self.correlation), (groups, self.n))
        lengths = _scaled(np.exp(shared + own), self.mean, self.limit)
        lengths[np.unravel_index(lengths.argmax(), lengths.shape)] = self.limit
        return Workload(
            name=self.name,
            limit=self.limit,
            groups=tuple(
                WorkGroup(id=f"g{number}", prompt=self.prompt, lengths=tuple(row))
                for number, row in enumerate(lengths.tolist())
            ),
        )


def _scaled(ratios: NDArray[np.float64], mean: float, limit: int) -> NDArray[np.int64]:
    """Lengths in these ratios, cut off at the limit, with the wanted mean."""
    low, high = 0.0, float(limit) / float(ratios.min())
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if np.clip(ratios * middle, 1, limit).mean() < mean:
            low = middle
        else:
            high = middle
    return np.clip(np.rint(ratios * high), 1, limit).astype(np.int64)


class Response(msgspec.Struct):
    """A finished response of a recorded run."""

    group: str
    token_ids: list[int]
    prompt_token_ids: list[int]
    finish_reason: str


def responses(path: Path) -> Iterator[Response]:
    """The finished responses of a recorded run folder.

    Raises:
        UsageError: There is no readable samples.jsonl with finished responses.
    """
    some = False
    try:
        with (path / "samples.jsonl").open("rb") as file:
            for text in file:
                line = msgspec.json.decode(text, type=Response)
                if line.finish_reason in {"stop", "length"} and line.token_ids:
                    some = True
                    yield line
    except (OSError, msgspec.DecodeError) as error:
        raise UsageError(f"cannot read the samples of {path}: {error}; give the folder of a finished run") from error
    if not some:
        raise UsageError(f"{path} holds no finished sample; give the folder of a finished run")


def recorded(path: Path, limit: int | None = None) -> Workload:
    """The workload of a recorded run folder: its finished responses.

    Raises:
        UsageError: There is no readable samples.jsonl with finished responses.
    """
    lengths: dict[str, list[int]] = defaultdict(list)
    prompts: dict[str, int] = {}
    for response in responses(path):
        lengths[response.group].append(len(response.token_ids))
        prompts[response.group] = len(response.prompt_token_ids)
    return Workload(
        name=path.name,
        limit=limit or max(max(row) for row in lengths.values()),
        groups=tuple(WorkGroup(id=name, prompt=prompts[name], lengths=tuple(row)) for name, row in lengths.items()),
    )
