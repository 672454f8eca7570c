"""The sequences of each group, on the GPU: vLLM's own table of running requests, and a table of references beside it.

Running siblings need no copy: the kernels read the rows in which vLLM keeps every request's tokens. When a request
leaves, its row is copied to a reference row; what siblings on other engines generate is written to reference rows too.
The oldest reference gives way. Here, on the CPU, is only the directory: which rows belong to which group.

Invariants: a request (group and request name) has at most one row; a row is a member of at most one group; whatever
arrives from outside is kept within its row and within the vocabulary, because drafts are fed to the model. A draft made
from a row while it is being overwritten is wrong and costs its verification, nothing else.
"""

from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.v1.worker.gpu.buffer_utils import StagedWriteTensor

from seer_servers.plugin.gpu_kernels import LONGEST_MATCH, MEMBERS, Tables

REFERENCE_BYTES = 256 << 20
MAX_REFERENCES = 1024
FIRST_MATCH = 1  # a sibling's match ends at its last prompt token at the earliest: the prompt itself is in the own row


class Name(NamedTuple):
    """Which sequence it is, the same on all engines."""

    group: str
    request: str


class _Group:
    def __init__(self, index: int) -> None:
        self.index = index
        self.rows: dict[str, int] = {}  # by request, latest last
        self.prompt_end: Sequence[int] = ()


class Siblings:
    """Directory and tables. Calls before `refresh` take effect with it, in the order of vLLM's own stream."""

    def __init__(self, request_states: Any, vocabulary: int, *, references: int | None = None) -> None:
        slots, self._longest = request_states.max_num_reqs, request_states.max_model_len
        references = references or max(1, min(MAX_REFERENCES, REFERENCE_BYTES // (4 * self._longest)))
        self.most_groups: int = slots + references  # at a time; they have the numbers below
        self._states, self._slots, self._all, self._vocabulary = request_states, slots, references, vocabulary
        self.most_members = 0  # of a group, as of the last refresh
        self._groups: dict[str, _Group] = {}
        self._free_groups = list(range(slots + references))
        self._names: dict[int, Name] = {}  # by row; references in the order of their age
        self._free = list(range(slots, slots + references))
        self._origins: dict[int, int] = {}  # by reference: where its response begins
        self._known: dict[int, int] = {}  # by reference from elsewhere: tokens of its response
        self._changed: set[str] = set()
        self.born: set[int] = set()  # groups that have got a number which may have been another's; the reader clears it
        self._begins: dict[int, int] = {}  # by row: what `_starts` is to say
        self._joined: dict[int, int] = {}  # by slot: its group, likewise
        self._arrived: dict[int, tuple[int, list[int]]] = {}  # by reference: a place in its row, and the tokens there
        self._dirty = False

        def table(*size: int) -> StagedWriteTensor:
            return StagedWriteTensor(size if len(size) > 1 else size[0], torch.int32, request_states.device)

        self._tokens, self._lengths = table(references, self._longest), table(references)
        self._starts, self._of_slot = table(slots + references), table(slots)
        self._members, self._counts = table(slots + references, MEMBERS), table(slots + references)
        running = request_states.all_token_ids.gpu, request_states.total_len.gpu
        mine = (self._tokens, self._lengths, self._starts, self._of_slot, self._members, self._counts)
        self.tables = Tables(*running, *(each.gpu for each in mine))  # what the kernels read

    def groups(self, most: int) -> dict[str, int]:
        """The numbers of the latest `most` groups, the latest last."""
        first = max(0, len(self._groups) - most)
        return {name: group.index for name, group in islice(self._groups.items(), first, None)}

    @property
    def references(self) -> int:
        """Reference rows in use."""
        return self._all - len(self._free)

    def add(self, slot: int, name: Name, prompt: Sequence[int]) -> None:
        """A request with this original prompt now has `slot`; what was kept of it before is let go."""
        old = self._row(name)
        if old is not None and old < self._slots:
            name = Name(name.group, f"{name.request}#{slot}")  # another one of that name runs
            old = self._row(name)
        self._join(slot, name)
        if old is not None:
            self._release(old)
        group = self._groups[name.group]
        group.prompt_end = list(prompt[-LONGEST_MATCH:])
        self._joined[slot] = group.index
        self._begins[slot] = len(prompt) - FIRST_MATCH
        self._origins[slot] = len(prompt)

    def retire(self, slot: int) -> None:
        """The request in `slot` leaves: keep its tokens, before vLLM gives the slot to another."""
        name = self._names.get(slot)
        if name is None:
            return
        place = self._reference(name, self._origins.pop(slot)) - self._slots
        self._leave(slot)
        self._tokens.gpu[place].copy_(self._states.all_token_ids.gpu[slot])
        self._lengths.gpu[place : place + 1].copy_(self._states.total_len.gpu[slot : slot + 1])

    def receive(self, name: Name, before: int, tokens: NDArray[np.int32]) -> None:
        """Tokens of a sibling elsewhere, which come after `before` tokens of its response."""
        group = self._groups.get(name.group)
        if group is None or not tokens.size or tokens.min() < 0 or tokens.max() >= self._vocabulary:
            return
        row = self._row(name)
        if row is None and before == 0:
            row = self._reference(name, len(group.prompt_end))
            self._known[row] = 0
            self._arrived[row] = 0, list(group.prompt_end)
        if row is None or row < self._slots or before > self._known.get(row, before):
            return  # runs here, or its beginning is missing
        origin, known = self._origins[row], self._known.get(row, before)
        new = tokens[known - before : max(0, self._longest - origin - before)].tolist()
        if not new:
            return  # nothing is, or the row is full
        self._known[row] = known + len(new)
        self._arrived.setdefault(row, (origin + known, []))[1].extend(new)
        self._dirty = True

    def refresh(self) -> None:
        """Bring the GPU up to date. At most once a step: vLLM's staging buffers are few.

        It may be left for later while nothing is looked up. vLLM applies staged writes all at once and in no order, so
        each place is staged once.
        """
        for row, (place, tokens) in self._arrived.items():
            self._tokens.stage_write(row - self._slots, place, tokens)
            self._lengths.stage_write_elem(row - self._slots, place + len(tokens))
        self._arrived.clear()
        for table, values in ((self._starts, self._begins), (self._of_slot, self._joined)):
            for row, value in values.items():
                table.stage_write_elem(row, value)
            values.clear()
        for name in self._changed:
            group = self._groups[name]
            rows = list(group.rows.values())[-MEMBERS:]
            self._members.stage_write(group.index, 0, rows)
            self._counts.stage_write_elem(group.index, len(rows))
        if self._changed:
            self._changed.clear()
            self.most_members = min(MEMBERS, max(len(group.rows) for group in self._groups.values()))
        if self._dirty:
            self._dirty = False
            for table in (self._tokens, self._lengths, self._starts, self._of_slot, self._members, self._counts):
                table.apply_write()

    def _row(self, name: Name) -> int | None:
        group = self._groups.get(name.group)
        return group.rows.get(name.request) if group else None

    def _join(self, row: int, name: Name) -> None:
        if name.group not in self._groups:
            self._groups[name.group] = group = _Group(self._free_groups.pop())
            self.born.add(group.index)
        self._groups[name.group].rows[name.request] = row
        self._names[row] = name
        self._changed.add(name.group)
        self._dirty = True

    def _leave(self, row: int) -> None:
        name = self._names.pop(row)
        group = self._groups[name.group]
        if group.rows.get(name.request) == row:
            del group.rows[name.request]
        self._changed.add(name.group)
        if not group.rows:
            self._free_groups.append(group.index)
            del self._groups[name.group]
            self._changed.discard(name.group)

    def _reference(self, name: Name, origin: int) -> int:
        if not self._free:
            self._release(next(row for row in self._names if row >= self._slots))
        row = self._free.pop()
        self._origins[row] = origin
        self._join(row, name)
        self._begins[row] = origin - FIRST_MATCH
        return row

    def _release(self, row: int) -> None:
        self._leave(row)
        del self._origins[row]
        self._known.pop(row, None)
        self._arrived.pop(row, None)
        self._free.append(row)
