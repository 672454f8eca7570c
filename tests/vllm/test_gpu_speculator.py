"""Grouped drafting in Model Runner V2, without a GPU: the kernels run in Triton's interpreter against plain Python."""

import importlib.util
import os
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton looks when it is imported, vLLM imports it

pytest.importorskip("vllm", reason="the plug-in runs inside vLLM")
pytest.importorskip("triton", reason="the kernels are Triton's")

import numpy as np
import triton
import vllm
from vllm.config import CUDAGraphMode
from vllm.v1.worker.gpu import model_runner
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.model_states import default as model_states
from vllm.v1.worker.gpu.spec_decode import adaptive_verification

from seer_servers.plugin import drafting, gpu_admission, gpu_drafting, gpu_siblings, gpu_switch, gpu_verification
from seer_servers.plugin import gpu_kernels as kernels
from seer_servers.plugin.draft_stats import read_page
from seer_servers.plugin.gpu_admission import Admission
from seer_servers.plugin.gpu_outlook import ENOUGH, Outlook
from seer_servers.plugin.gpu_siblings import Name, Siblings
from seer_servers.plugin.gpu_speculator import REST_STEPS, Page

if not torch.cuda.is_available() and isinstance(triton.language.max, triton.runtime.JITFunction):
    pytest.skip("Triton was imported before its interpreter was asked for", allow_module_level=True)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SLOTS, LONGEST, STEPS = 6, 64, 4
SHORTEST_MATCH, LONGEST_MATCH = 2, 5
VOCABULARY = 4  # few tokens, so that much matches


class Table:
    """vLLM's StagedWriteTensor, which needs a GPU: a program for each staged write, in no order."""

    def __init__(self, size, dtype, device):
        self.gpu = torch.zeros(size, dtype=dtype, device=device)
        self._staged = []

    def stage_write(self, index, start, content):
        self._staged.append((index, start, list(content)))

    def stage_write_elem(self, index, value):
        self._staged.append((index, None, value))

    def apply_write(self):
        places = [
            (index, (start or 0) + offset)
            for index, start, content in self._staged
            for offset in range(1 if start is None else len(content))
        ]
        assert len(places) == len(set(places)), "which of two writes to one place wins is left to chance"
        for index, start, content in self._staged:
            if start is None:
                self.gpu[index] = content
            else:
                assert start + len(content) <= self.gpu.shape[1]
                self.gpu[index, start : start + len(content)] = torch.tensor(content, dtype=torch.int32)
        self._staged.clear()


class Engine:
    """The request states that vLLM's runner keeps, with requests that come, grow and go."""

    def __init__(self, monkeypatch, references=8):
        monkeypatch.setattr(gpu_siblings, "StagedWriteTensor", Table)
        tokens = torch.zeros(SLOTS, LONGEST, dtype=torch.int32, device=DEVICE)
        lengths = torch.zeros(SLOTS, dtype=torch.int32, device=DEVICE)
        self.states = SimpleNamespace(
            max_num_reqs=SLOTS,
            max_model_len=LONGEST,
            device=DEVICE,
            all_token_ids=SimpleNamespace(gpu=tokens),
            total_len=SimpleNamespace(gpu=lengths),
        )
        self.siblings = Siblings(self.states, VOCABULARY, references=references)

    def add(self, slot, group, request, prompt, response=()):
        self.siblings.add(slot, Name(group, request), prompt)
        self.states.total_len.gpu[slot] = 0
        self.grow(slot, [*prompt, *response])

    def grow(self, slot, tokens):
        begin = int(self.states.total_len.gpu[slot])
        self.states.all_token_ids.gpu[slot, begin : begin + len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
        self.states.total_len.gpu[slot] = begin + len(tokens)

    def receive(self, group, request, before, tokens):
        self.siblings.receive(Name(group, request), before, np.array(tokens, dtype=np.int32))

    def draft(self, slots, sampled=None, splits=3, rates=None, weights=(1.0,) * SLOTS, mean=1.0):
        self.siblings.refresh()
        count = len(slots)
        batch = kernels.Batch(
            torch.tensor(slots, device=DEVICE),
            torch.tensor(sampled or [1] * count, dtype=torch.int32, device=DEVICE),
            torch.arange(count + 1, dtype=torch.int32, device=DEVICE),
        )
        found = torch.full((count, 1 + self.siblings.most_members, splits), -7, dtype=torch.int32, device=DEVICE)
        tables = self.siblings.tables
        kernels.scan(tables, batch, found, shortest=SHORTEST_MATCH, longest=LONGEST_MATCH)
        choice = fresh_choice()
        rates = torch.full((kernels.KINDS, STEPS), 0.5, device=DEVICE) if rates is None else rates
        weights = kernels.Weights(torch.tensor(weights, device=DEVICE), mean)
        kernels.choose(tables, batch, found, rates=rates, weights=weights, choice=choice, recent=0.1)
        return found, choice

    def sequence(self, row):
        """Tokens of a row, and where a sibling's match may end at the earliest."""
        tables = self.siblings.tables
        start = int(tables.starts[row])
        if row < SLOTS:
            return tables.slot_tokens[row, : int(tables.slot_lengths[row])].tolist(), start
        row -= SLOTS
        return tables.reference_tokens[row, : int(tables.reference_lengths[row])].tolist(), start

    def rows(self, slot):
        tables = self.siblings.tables
        group = int(tables.groups[slot])
        return tables.members[group, : int(tables.counts[group])].tolist()


def fresh_choice():
    def zeros(*size, dtype=torch.float32):
        return torch.zeros(size, dtype=dtype, device=DEVICE)

    slots = SLOTS, STEPS
    kinds = torch.full((SLOTS,), -1, dtype=torch.int32, device=DEVICE)
    offered = zeros(SLOTS, dtype=torch.int32)
    return kernels.Choice(zeros(*slots, dtype=torch.int64), zeros(*slots), zeros(*slots), zeros(*slots), kinds, offered)


@pytest.fixture
def engine(monkeypatch):
    return Engine(monkeypatch)


def best_match(text, sequence, first, *, own):
    """(length, place of what comes next) of the longest match of the text's end, the latest among equals."""
    best = (0, 0)
    for end in range(first, len(sequence) - 1):
        length = 0
        while length < min(LONGEST_MATCH, len(text), end + 1) and sequence[end - length] == text[-1 - length]:
            length += 1
        if length >= SHORTEST_MATCH:
            best = max(best, (length, end + 1))
    assert not own or best[1] < len(text)
    return best


def expected_draft(engine, slot):
    """(draft, length, voters, votes) by plain Python; no draft is []."""
    text, _ = engine.sequence(slot)
    candidates = [(text, best_match(text, text, 0, own=True), True)]
    for row in engine.rows(slot):
        if row != slot:
            sequence, start = engine.sequence(row)
            candidates.append((sequence, best_match(text, sequence, start, own=False), False))
        else:
            candidates.append((text, (0, 0), False))
    longest = max(match[0] for _, match, _ in candidates)
    if not longest:
        return [], 0, 0, 0
    equal = [(sequence, match[1], own) for sequence, match, own in candidates if match[0] == longest]

    def votes(sequence, place, depth):
        said = sequence[place : place + depth]
        return sum(other[at : at + depth] == said for other, at, _ in equal)

    sequence, place, own = max(equal, key=lambda one: (votes(one[0], one[1], 1), votes(one[0], one[1], 2)))
    following = sequence[place:]
    draft = [following[i % len(following)] for i in range(STEPS)] if own else following[:STEPS]
    return draft, longest, len(equal), votes(sequence, place, 1)


def check(engine, slots):
    rates = torch.rand(kernels.KINDS, STEPS, device=DEVICE)
    _, choice = engine.draft(slots, rates=rates)
    for index, slot in enumerate(slots):
        draft, length, voters, votes = expected_draft(engine, slot)
        text, _ = engine.sequence(slot)
        assert choice.drafts[index].tolist() == draft + [text[-1]] * (STEPS - len(draft))
        assert int(choice.offered[slot]) == len(draft)
        if not draft:
            assert int(choice.kinds[slot]) == -1
            assert not choice.confidences[slot].any()
            continue
        support = 0 if voters == 1 else 1 if votes * 3 < voters * 2 else 2
        kind = sum(length > least for least in (1, 2, 3, 5, 8, 15)) * 3 + support
        assert int(choice.kinds[slot]) == kind
        confidences = rates[kind].clone()
        confidences[len(draft) :] = 0
        assert torch.equal(choice.confidences[slot], confidences)
        assert torch.allclose(choice.averages[slot], 0.1 * confidences)
        assert torch.allclose(choice.forecasts[slot], 0.55 * confidences)


def test_drafts_are_those_of_plain_python(engine):
    draw = random.Random(5)
    for _ in range(3):
        for slot in range(SLOTS):
            engine.siblings.retire(slot)
            prompt = [draw.randrange(VOCABULARY) for _ in range(draw.randrange(1, 9))]
            response = [draw.randrange(VOCABULARY) for _ in range(draw.randrange(30))]
            engine.add(slot, f"g{slot % 2}", f"r{draw.randrange(9)}", prompt, response)
        engine.receive("g0", "elsewhere", 0, [draw.randrange(VOCABULARY) for _ in range(40)])
        check(engine, draw.sample(range(SLOTS), SLOTS))


def test_longest_places_and_blocks(engine, monkeypatch):
    """Parts and blocks of a sequence join without a gap."""
    monkeypatch.setattr(kernels, "BLOCK", 8)
    draw = random.Random(1)
    engine.add(0, "g", "a", [0, 1], [draw.randrange(VOCABULARY) for _ in range(LONGEST - 2)])
    for length in range(2, 20):
        engine.siblings.retire(1)
        engine.add(1, "g", "b", [0, 1], [draw.randrange(VOCABULARY) for _ in range(length)])
        check(engine, [0, 1])


def test_a_sibling_says_what_begins_a_response(engine):
    engine.add(0, "g", "a", [1, 2, 3], [0, 0, 2, 1])
    engine.add(1, "g", "b", [1, 2, 3])
    _, choice = engine.draft([1])
    assert choice.drafts[0].tolist() == [0, 0, 2, 1]


def test_other_groups_are_not_looked_at(engine):
    engine.add(0, "g", "a", [1, 2, 3], [0, 0, 2, 1])
    engine.add(1, "h", "b", [1, 2, 3])
    _, choice = engine.draft([1])
    assert int(choice.offered[1]) == 0


def test_the_majority_is_followed(engine):
    for slot, says in enumerate(([2, 2], [3, 1], [3, 2], [3, 2])):
        engine.add(slot, "g", str(slot), [1, 1], [0, 1, *says, 0])
    engine.add(4, "g", "asks", [1, 1], [0, 1])
    _, choice = engine.draft([4])
    assert choice.drafts[0].tolist()[:3] == [3, 2, 0]
    assert int(choice.kinds[4]) % kernels.SUPPORTS == 2  # three of four agree


def test_repetition_goes_on(engine):
    engine.add(0, "g", "a", [0, 0], [1, 2, 3, 1, 2, 3, 1, 2])
    _, choice = engine.draft([0])
    assert choice.drafts[0].tolist() == [3, 1, 2, 3]


def test_a_request_that_prefills_gets_no_draft(engine):
    engine.add(0, "g", "a", [0, 1, 0, 1])
    _, choice = engine.draft([0], sampled=[0])
    assert int(choice.offered[0]) == 0
    assert not choice.confidences[0].any()


# The directory


def test_a_finished_response_stays(engine):
    engine.add(0, "g", "a", [1, 2, 3], [0, 0, 2, 1])
    engine.siblings.retire(0)
    engine.add(0, "other", "x", [2, 2, 2], [2])
    engine.add(1, "g", "b", [1, 2, 3])
    _, choice = engine.draft([1])
    assert choice.drafts[0].tolist() == [0, 0, 2, 1]
    assert engine.siblings.references == 1


def test_a_request_that_returns_is_not_its_own_sibling(engine):
    engine.add(0, "g", "a", [1, 2, 3], [0, 0])
    engine.siblings.retire(0)
    engine.add(2, "g", "a", [1, 2, 3], [0, 0])
    engine.draft([2])
    assert engine.siblings.references == 0
    assert engine.rows(2) == [2]


def test_the_oldest_reference_gives_way(monkeypatch):
    engine = Engine(monkeypatch, references=2)
    for name in "abc":
        engine.add(0, "g", name, [1, 2], [ord(name) % VOCABULARY])
        engine.siblings.retire(0)
    engine.add(0, "g", "d", [1, 2])
    engine.draft([0])
    kept = [engine.sequence(row)[0][-1] for row in engine.rows(0) if row >= SLOTS]
    assert kept == [ord("b") % VOCABULARY, ord("c") % VOCABULARY]


def test_many_requests_leak_nothing(monkeypatch):
    engine = Engine(monkeypatch, references=3)
    draw = random.Random(3)
    held = {}
    for step in range(400):
        slot = draw.randrange(SLOTS)
        if slot in held:
            engine.siblings.retire(slot)
            del held[slot]
        else:
            held[slot] = f"g{draw.randrange(3)}", f"r{draw.randrange(4)}"  # names are used twice at a time, too
            engine.add(slot, *held[slot], [1, 2], [3])
        if step % 5 == 0:
            engine.receive(f"g{draw.randrange(3)}", f"r{draw.randrange(4)}", draw.choice([0, 0, 1]), [1, 2])
        engine.siblings.refresh()
        for slot, (group, _) in held.items():
            assert slot in engine.rows(slot)
            assert all(engine.siblings._names[row].group == group for row in engine.rows(slot))
    for slot in held:
        engine.siblings.retire(slot)
    engine.siblings.refresh()
    assert engine.siblings.references == 3
    assert len(engine.siblings._groups) + len(engine.siblings._free_groups) == SLOTS + 3


def test_tokens_from_elsewhere(engine):
    engine.add(0, "g", "a", [1, 2, 3])
    engine.receive("g", "far", 0, [0, 0])
    engine.receive("g", "far", 2, [2, 1])
    engine.receive("g", "far", 1, [0, 2])  # what is known already may come again
    _, choice = engine.draft([0])
    assert choice.drafts[0].tolist() == [0, 0, 2, 1]


def test_what_arrives_for_a_row_that_is_taken_away_is_not_written(monkeypatch):
    """Between two looks one sibling's row becomes another's, and then that of a request that leaves."""
    engine = Engine(monkeypatch, references=1)
    engine.add(0, "g", "a", [1, 2, 3])
    engine.receive("g", "far", 0, [0, 0, 2, 2, 2])
    engine.receive("g", "further", 0, [1, 1])
    engine.siblings.refresh()
    assert engine.sequence(SLOTS) == ([1, 2, 3, 1, 1], 2)
    engine.receive("g", "further", 2, [3, 3])
    engine.siblings.retire(0)
    engine.siblings.refresh()
    assert engine.sequence(SLOTS) == ([1, 2, 3], 2)


@pytest.mark.parametrize("increment", [("g", "new", 3, [1]), ("unknown", "x", 0, [1]), ("g", "bad", 0, [VOCABULARY])])
def test_tokens_that_fit_nowhere_are_left(engine, increment):
    engine.add(0, "g", "a", [1, 2, 3])
    engine.receive(*increment)
    engine.receive("g", "negative", 0, [-1])
    assert engine.siblings.references == 0


def test_more_tokens_than_a_row_holds(engine):
    engine.add(0, "g", "a", [1, 2, 3])
    engine.receive("g", "far", 0, [1] * (2 * LONGEST))
    engine.receive("g", "far", LONGEST, [1] * 9)
    engine.siblings.retire(0)
    engine.receive("g", "a", 10 * LONGEST, [1])
    engine.siblings.refresh()
    assert int(engine.siblings.tables.reference_lengths.max()) == LONGEST


# Learning


def totals_of(groups):
    kinds = {"dtype": torch.int64, "device": DEVICE}
    return kernels.Totals(torch.zeros(2, STEPS, **kinds), torch.zeros(groups, 3, **kinds))


def test_counts_of_what_was_accepted():
    choice = fresh_choice()
    choice.kinds[:4] = torch.tensor([7, 7, -1, 3])
    choice.offered[:4] = torch.tensor([4, 2, 0, 4])
    # Verified drafts 3, 4 (of which 2 were drafts), 2 of none, 4 while it prefilled; accepted 1, 2, 0, none.
    batch = kernels.Batch(
        torch.tensor([0, 1, 2, 3], device=DEVICE),
        torch.tensor([2, 3, 1, 0], dtype=torch.int32, device=DEVICE),
        torch.tensor([0, 4, 9, 12, 17], dtype=torch.int32, device=DEVICE),
    )
    tallies = torch.zeros(2, kernels.KINDS, STEPS, dtype=torch.int32, device=DEVICE)
    totals = totals_of(groups=3)
    kernels.observe(batch, choice, tallies, totals, torch.tensor([2, 0, 1, 2], dtype=torch.int32, device=DEVICE))
    assert tallies[0, 7].tolist() == [2, 2, 0, 0]
    assert tallies[1, 7].tolist() == [2, 1, 0, 0]
    assert int(tallies.sum()) == 7
    assert totals.by_place.tolist() == [[2, 2, 1, 0], [2, 1, 0, 0]]
    assert totals.by_group.tolist() == [[1, 2, 2], [0, 0, 0], [1, 3, 1]]


def test_a_token_of_a_request_with_priority_weighs_more(engine):
    for slot in range(2):
        engine.add(slot, "g", str(slot), [1, 2], [3, 1, 2, 3, 1, 2])
    rates = torch.linspace(0.9, 0.2, STEPS, device=DEVICE).repeat(kernels.KINDS, 1)
    _, plain = engine.draft([0, 1], rates=rates)
    _, weighted = engine.draft([0, 1], rates=rates, weights=(2.0, *(1.0,) * (SLOTS - 1)), mean=1.5)
    for ours, theirs in ((plain.confidences, weighted.confidences), (plain.forecasts, weighted.forecasts)):
        value = theirs[:2].cumprod(dim=1) / ours[:2].cumprod(dim=1)
        assert value.flatten().tolist() == pytest.approx([2 / 1.5] * STEPS + [1 / 1.5] * STEPS)
    assert torch.equal(plain.averages, weighted.averages), "what is expected of a draft is not what it is worth"


def test_counts_are_of_the_group_that_has_the_number_now(engine, monkeypatch, tmp_path):
    monkeypatch.setenv("SEER_DRAFT_STATS", str(tmp_path / "page" / "stats.json"))
    monkeypatch.setattr("seer_servers.plugin.draft_stats.PUBLISH_S", 0.0)
    totals = totals_of(engine.siblings.most_groups)
    page = Page(totals, engine.siblings)

    def shown():
        for _ in range(2):  # what is copied at one step is shown at the next
            page.step(0.0, off=False, references=0)
        return read_page()["by_group"]

    engine.add(0, "old", "r", [1, 2], [3])
    number = engine.siblings.groups(1)["old"]
    engine.siblings.born.clear()
    totals.by_group[number] = torch.tensor([1, 3, 2])
    assert shown() == {"old": [1, 3, 2]}
    engine.siblings.retire(0)
    for slot in range(8):  # the old group's reference gives way
        engine.add(slot % SLOTS, "new", str(slot), [1, 2], [3])
        engine.siblings.retire(slot % SLOTS)
    engine.add(0, "late", "r", [1, 2], [3])
    assert engine.siblings.groups(9) == {"new": engine.siblings.groups(2)["new"], "late": number}
    assert shown() == {}, "they are the old group's counts until they have been cleared"
    forget_before(engine, totals)
    totals.by_group[number] += 1
    assert shown() == {"late": [1, 1, 1]}


def forget_before(engine, totals):
    speculator = object.__new__(gpu_drafting.GroupedSpeculator)
    speculator.siblings, speculator.newcomers = engine.siblings, {}
    speculator._totals, speculator._found = totals, torch.zeros(1, device=DEVICE)
    speculator._forget_before()
    assert not engine.siblings.born


# What drafts would bring


def peeked(begins):
    slots = torch.arange(len(begins), device=DEVICE)
    return kernels.Peeked(slots, torch.tensor(begins, dtype=torch.int32, device=DEVICE))


def test_drafts_are_compared_with_what_came(engine):
    engine.add(0, "g", "0", [1, 2], [0, 1, 2, 3, 0])  # two of three right
    engine.add(1, "g", "1", [1, 2], [3, 3])  # right as far as is known
    engine.add(2, "g", "2", [1, 2], [3, 3, 3])  # no match
    engine.add(3, "g", "3", [1, 2], [1, 1, 1])  # its slot has a new request
    engine.add(4, "g", "4", [1, 2])  # nothing came
    choice = fresh_choice()
    choice.drafts[:5] = torch.tensor([[1, 2, 0, 0], [3, 3, 3, 3], [3] * 4, [1] * 4, [1] * 4])
    choice.kinds[:5] = torch.tensor([7, 7, kernels.NO_MATCH, kernels.GONE.value, 2])
    choice.offered[:5] = torch.tensor([3, 4, 0, 4, 4])
    tallies = torch.zeros(2, kernels.KINDS, STEPS, dtype=torch.int32, device=DEVICE)
    seen = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    kernels.compare(engine.siblings.tables, peeked([3, 2, 2, 2, 2]), choice, tallies, seen)
    assert tallies[0, 7].tolist() == [2, 2, 1, 0]
    assert tallies[1, 7].tolist() == [2, 2, 0, 0]
    assert int(tallies.sum()) == 9
    assert seen.tolist() == [3, 4], "a request without a match has a draft that brings nothing"


def test_an_engine_at_rest_sees_what_drafts_would_bring(engine):
    speculator = gpu_drafting.GroupedSpeculator(
        SimpleNamespace(
            speculative_config=SimpleNamespace(
                num_speculative_tokens=STEPS, prompt_lookup_min=SHORTEST_MATCH, prompt_lookup_max=LONGEST_MATCH
            ),
            model_config=SimpleNamespace(get_vocab_size=lambda: VOCABULARY),
        ),
        DEVICE,
        engine.states,
    )
    slots = list(range(4))
    batch = SimpleNamespace(idx_mapping=torch.tensor(slots, device=DEVICE), has_prefill=False)
    for slot in slots:
        engine.states.total_len.gpu[slot] = 0
        engine.grow(slot, [1, 2, 3])
        speculator.added(str(slot), slot, [1, 2, 3], [], {"seer_group": "g"})
    brings = []
    for step in range(12 * REST_STEPS):
        if step % (REST_STEPS // 2) == 0:  # each goes on in the same way as its own text, round and round
            for slot in slots:
                token = [1, 2, 3][int(engine.states.total_len.gpu[slot]) % 3]
                if int(engine.states.total_len.gpu[slot]) < LONGEST:
                    engine.grow(slot, [token])
        speculator.rest(batch)
        brings.append(speculator.outlook.brings)
    assert brings[: 3 * REST_STEPS] == [1.0] * 3 * REST_STEPS, "a guess of few drafts is none"
    assert brings[-1] == pytest.approx(1 + 2.0, abs=0.3), "two tokens came between two looks, and both were foretold"
    assert speculator._rates.max() > 0.9, "drafts that are made next are known to be good"


def test_old_drafts_are_forgotten():
    outlook = Outlook(DEVICE)
    for drafts, right in ((ENOUGH - 1, 7), (500, 1000), (500, 0)):
        outlook.seen += torch.tensor([drafts, right], device=DEVICE)
        outlook.read()
    assert outlook.brings == pytest.approx(3.0, abs=0.02), "what was counted is read at the next look"
    for _ in range(3):
        outlook.seen += torch.tensor([500, 0], device=DEVICE)
        outlook.read()
    assert outlook.brings == pytest.approx(1.0, abs=0.02)


def test_a_lone_request_is_not_judged_by_those_before_it():
    outlook = Outlook(DEVICE)
    for drafts, right in ((500, 0), *[(1, 3)] * 40):
        outlook.seen += torch.tensor([drafts, right], device=DEVICE)
        outlook.read()
    assert outlook.brings > 3.0
    before = outlook.brings
    for _ in range(100):
        outlook.read()
    assert outlook.brings == pytest.approx(before, abs=0.3), "where nothing can be compared nothing is forgotten"


# Verification


def test_what_is_drawn_is_followed():
    drawn = torch.tensor([5, 6, 7, 8, 1, 2, 3], device=DEVICE)
    inputs = torch.tensor([0, 5, 6, 4, 0, 0, 2], dtype=torch.int32, device=DEVICE)
    logits = torch.tensor([0, 4, 5, 7], dtype=torch.int32, device=DEVICE)
    tokens, counts = kernels.follow(drawn, inputs, logits, STEPS)
    assert counts.tolist() == [3, 1, 2]
    assert [row[:count] for row, count in zip(tokens.tolist(), counts.tolist(), strict=True)] == [
        [5, 6, 7],
        [1],
        [2, 3],
    ]


def test_all_drafts_may_be_right():
    drawn = torch.tensor([1, 2, 3, 0, 2], device=DEVICE)
    inputs = torch.tensor([9, 1, 2, 3, 0], dtype=torch.int32, device=DEVICE)
    tokens, counts = kernels.follow(drawn, inputs, torch.tensor([0, 5], dtype=torch.int32, device=DEVICE), STEPS)
    assert counts.tolist() == [5]
    assert tokens.tolist() == [[1, 2, 3, 0, 2]]


@pytest.fixture(scope="module")
def gumbel_sample():
    """vLLM's sampler of keyed noise, with Triton also where vLLM would go without."""
    place = Path(vllm.__file__).parent / "v1/worker/gpu/sample/gumbel.py"
    spec = importlib.util.spec_from_file_location("gumbel_with_triton", place)
    module = importlib.util.module_from_spec(spec)
    stand_in = SimpleNamespace(tl=triton.language, triton=triton)
    real, sys.modules["vllm.triton_utils"] = sys.modules["vllm.triton_utils"], stand_in
    try:
        spec.loader.exec_module(module)
    finally:
        sys.modules["vllm.triton_utils"] = real
    return module.gumbel_sample


def around(name, function=None):
    """Our patch of that name, around `function` of vLLM's."""
    (patch,) = (patch for patch in gpu_verification.patches() if patch.name == name)
    return patch.around(function)


def test_a_seeded_sample_is_the_same_with_and_without_drafts(gumbel_sample, monkeypatch):
    """Decode a chain of random logits step by step, and again with drafts of which some are right."""
    monkeypatch.setattr(gpu_verification, "gumbel_sample", gumbel_sample)
    rejection_sample = around("rejection_sample")
    draw = random.Random(2)
    table = 3 * torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    temperature = torch.tensor([1.0], device=DEVICE)
    seeds = torch.tensor([1234], device=DEVICE)

    def described(inputs, first):
        rows = torch.zeros(len(inputs), dtype=torch.int64, device=DEVICE)
        places = torch.arange(first, first + len(inputs), device=DEVICE)
        return table[torch.tensor(inputs, device=DEVICE)], rows, places

    def sample(inputs, first):
        logits, rows, places = described(inputs, first)
        return gumbel_sample(logits, rows, temperature, seeds, places, apply_temperature=False, is_drafting=False)

    plain, drafted = [0], [0]
    while len(plain) < 200:
        plain.append(int(sample([plain[-1]], len(plain) - 1)[0]))
    while len(drafted) < 190:
        right = plain[len(drafted) : len(drafted) + 3]
        drafts = [token if draw.random() < 0.7 else draw.randrange(VOCABULARY) for token in right]
        inputs = [drafted[-1], *drafts]
        logits, rows, places = described(inputs, len(drafted) - 1)
        borders = torch.tensor([0, len(inputs)], dtype=torch.int32, device=DEVICE)
        inputs = torch.tensor(inputs, dtype=torch.int32, device=DEVICE)
        settings = temperature, seeds, STEPS, None
        one = torch.zeros(1, dtype=torch.int64, device=DEVICE)
        tokens, counts = rejection_sample(
            logits, None, inputs, borders, places, one, rows, rows, *settings, use_block_verification=False
        )
        drafted += tokens[0, : int(counts[0])].tolist()
    assert drafted == plain[: len(drafted)]
    assert len(set(plain)) == VOCABULARY


@pytest.mark.parametrize(
    ("place", "option"), [(1, {}), (11, {}), (None, {"use_block_verification": True}), (None, {"contexts": 1})]
)
def test_other_ways_to_verify_are_vllms(place, option):
    """Drafts with probabilities, rates of acceptance that are made up, and what vLLM has beside."""
    arguments = [0, None, *range(2, 11), None]
    if place is not None:
        arguments[place] = "set"
    told = []
    around("rejection_sample", lambda *given, **named: told.append((given, named)))(*arguments, use_fp64=True, **option)
    assert told == [(tuple(arguments), {"use_fp64": True} | option)]


def admitted(confidence, drafted, others, budget):
    """What each request has to verify, as the kernel tells it: from where its logits and its tokens begin."""
    requests = len(drafted)
    logits, queries = (torch.full((requests + 3,), -9, dtype=torch.int32, device=DEVICE) for _ in range(2))
    counts = torch.tensor([drafted, others], dtype=torch.int32, device=DEVICE)
    slots = torch.randperm(2 * requests)[:requests]
    by_slot = torch.full((2 * requests, confidence.shape[1]), 1.5)
    by_slot[slots] = confidence
    kernels.admit(by_slot.to(DEVICE), slots.to(DEVICE), counts, budget, logits=logits, queries=queries, bonus=1)
    assert logits[requests + 1 :].tolist() == queries[requests + 1 :].tolist() == [-9, -9]
    assert logits[0] == queries[0] == 0
    found = (logits[: requests + 1].diff() - 1).tolist()
    assert (queries[: requests + 1].diff() - torch.tensor(others, device=DEVICE)).tolist() == found
    return found


@pytest.mark.parametrize("steps", [STEPS, 5])
@pytest.mark.parametrize("requests", [1, 3, 20, 100])
def test_the_likeliest_drafts_are_admitted(requests, steps):
    """As by vLLM, whose own way takes a dozen kernels."""
    torch.manual_seed(requests)
    confidence = torch.rand(requests, steps)
    confidence[0, 0] *= 1.9  # a weight
    drafted = torch.randint(0, steps + 1, (requests,)).tolist() if requests > 1 else [steps]
    others = [1 + number % 3 for number in range(requests)]
    for budget in {*range(min(8, sum(drafted))), sum(drafted) // 2, sum(drafted) - 1, sum(drafted)}:
        expected = torch.tensor(drafted, dtype=torch.int32)
        if 0 < budget < sum(drafted):
            adaptive_verification._assign_draft_token_budget(
                confidence, torch.arange(requests), expected, budget, steps
            )
        elif budget == 0:
            expected.zero_()
        assert admitted(confidence, drafted, others, budget) == expected.tolist()


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_of_equally_likely_drafts_so_many_are_admitted(value):
    drafted = [STEPS, 1, STEPS]
    for budget in range(sum(drafted) + 1):
        found = admitted(torch.full((3, STEPS), value), drafted, [1, 1, 1], budget)
        assert sum(found) == budget
        assert all(0 <= some <= most for some, most in zip(found, drafted, strict=True))


@pytest.fixture
def verification(monkeypatch):
    """The choice of how much to verify, of 4 requests that are sure of their drafts, with graphs of up to 16 tokens."""
    monkeypatch.setattr(
        adaptive_verification, "get_tp_group", lambda: SimpleNamespace(broadcast_object=lambda x, src: x)
    )
    monkeypatch.setattr(Admission, "_time_sampling", lambda *_: 0.1)
    monkeypatch.setattr(gpu_admission.rejection_sampler, "gather_draft_sampled", lambda *_: None)  # needs a GPU
    whole = Admission.__new__(Admission)
    lengths = SimpleNamespace(np=np.full(SLOTS, 7), gpu=torch.full((SLOTS,), 7, dtype=torch.int32))
    whole.req_states = SimpleNamespace(
        device=DEVICE,
        max_num_reqs=SLOTS,
        max_num_batched_tokens=256,
        req_id_to_index={str(slot): slot for slot in range(SLOTS)},
        prefill_len=lengths,
        num_computed_tokens_np=np.full(SLOTS, 7),
    )
    whole._runner = SimpleNamespace(input_buffers=InputBuffers(SLOTS, 256, DEVICE))
    whole.num_speculative_steps, whole.num_bonus_tokens = STEPS, 1
    whole._forecasts = np.full((SLOTS, STEPS), 0.9, np.float32)
    whole._confidence_probs = torch.full((SLOTS, STEPS), 0.9, device=DEVICE)
    whole._cu_num_logits, whole.query_start_loc = torch.zeros(2, SLOTS + 1, dtype=torch.int32, device=DEVICE)
    whole._max_total_logits, whole._cudagraph_limit = 256, 16
    whole._host_ms = whole._assumed_ms = whole._waited = 0.0
    whole._last = None
    whole.set_cost_curves([(1, 0.0)], [(1, 5.0), (256, 5.0)])
    return whole


def test_drafts_stay_within_the_largest_graph(verification):
    drafts = {str(slot): [1] * STEPS for slot in range(4)}
    assert 4 * (1 + STEPS) > 16
    assert verification.get_num_tokens(dict.fromkeys(drafts, 1 + STEPS), drafts) == 16
    few = {"0": [1] * STEPS}
    assert verification.get_num_tokens({"0": 1 + STEPS}, few) == 1 + STEPS


def test_a_step_verifies_as_much_as_vllm_would(verification):
    """With the same forecasts; requests have drafted unevenly, and one prefills."""
    draw = np.random.default_rng(3)
    drafts = {"3": [1] * STEPS, "0": [1] * 2, "1": [1] * STEPS}
    tokens = {"3": 1 + STEPS, "0": 3, "1": 1 + STEPS, "2": 9}
    verification.req_states.num_computed_tokens_np = np.array([7, 7, -9, 7])
    verification.set_cost_curves([(1, 0.0)], [(size, 5.0 + size) for size in range(1, 257)])
    verification._max_total_logits, verification._cudagraph_limit = 256, 0
    found = set()
    for _ in range(50):
        verification._forecasts = draw.random((SLOTS, STEPS), np.float32)
        verification._stale_idx, verification._stale_confidences = 0, [SimpleNamespace(np=verification._forecasts)]
        mine = verification.get_num_tokens(tokens, drafts)
        assert mine == adaptive_verification.AdaptiveVerificationManager.get_num_tokens(verification, tokens, drafts)
        found.add(mine)
    assert len(found) > 2


def test_what_is_decided_is_what_is_admitted(verification):
    drafts = {str(slot): [1] * STEPS for slot in range(4)}
    names = list(drafts)
    verification._confidence_probs = torch.rand(SLOTS, STEPS, device=DEVICE)
    tokens = verification.get_num_tokens(dict.fromkeys(drafts, 1 + STEPS), drafts)
    scheduled, drafted = np.full(4, 1 + STEPS, np.int32), np.full(4, STEPS, np.int32)
    spread, _ = verification.compact_batch(drafted, scheduled, np.arange(5, dtype=np.int32) * (1 + STEPS))
    assert spread.sum() == tokens
    logits, queries, budget = verification.reallocate_drafts(names, torch.arange(4, device=DEVICE))
    assert budget == tokens - 4
    assert logits.tolist() == queries[:5].tolist()
    assert int(queries[4]) == tokens


def test_drafts_take_no_step_beyond_the_largest_graph(verification):
    """Not one that prefills, either; where the prompt alone is beyond it, cost decides."""
    drafts = {"0": [1] * STEPS}
    for prompt, most in ((12, 16), (13, 16), (15, 16), (16, 17 + STEPS)):
        assert verification.get_num_tokens({"0": 1 + STEPS, "1": prompt}, drafts) == most


def test_a_step_that_prefills_says_nothing_of_the_hosts_time(verification, monkeypatch):
    """It is launched kernel by kernel; believed, it would make drafted tokens look free."""
    now = iter(np.arange(0.0, 10.0, 0.05))
    monkeypatch.setattr(gpu_admission.time, "perf_counter", lambda: next(now))
    for _ in range(50):
        verification._learn_host_time(replayed=False)
    assert verification._host_ms == 0
    for _ in range(50):
        verification._learn_host_time(replayed=True)
    assert verification._host_ms > 1


class Runner:
    """What vLLM's runner uses to describe a step to attention, without a model."""

    def __init__(self, monkeypatch):
        for kernel in ("prepare_pos_seq_lens", "combine_sampled_and_draft_tokens"):
            monkeypatch.setattr(model_runner, kernel, lambda *_: None)
        monkeypatch.setattr(model_states, "build_attn_metadata", lambda **told: told)
        self.device, self.decode_query_len, self.max_num_reqs = DEVICE, 1 + STEPS, SLOTS
        self.input_buffers = InputBuffers(SLOTS, SLOTS * self.decode_query_len, DEVICE)
        self.model_state = SimpleNamespace(num_new_sampled_tokens_per_step=1, supports_mm_inputs=False, max_model_len=9)
        self.model_config = SimpleNamespace(rswa_window=None)
        self.adaptive_verification = self.fast_prefill = self.pcp_manager = None
        lengths = SimpleNamespace(gpu=None)
        self.req_states = SimpleNamespace(
            num_computed_tokens=lengths,
            prefill_len=lengths,
            last_sampled_tokens=None,
            draft_tokens=None,
            num_computed_tokens_np=np.full(SLOTS, 7, dtype=np.int32),
        )

    def step_without_drafts(self, requests, graph):
        """A batch in which each request decodes one token."""
        ones, prefilled = np.ones(requests, dtype=np.int32), np.full(requests, 7, dtype=np.int32)
        state = model_runner.BatchReqState(
            req_ids=[str(slot) for slot in range(requests)],
            num_scheduled_tokens=ones,
            num_tokens=requests,
            num_draft_tokens_np=None,
            idx_mapping_np=np.arange(requests),
            prefill_len_np=prefilled,
            num_computed_prefill_tokens_np=prefilled,
            is_prefilling_np=np.zeros(requests, dtype=np.bool_),
            has_prefill=False,
            prefill_runs_as_decode_np=None,
            decode_graph_eligible=True,
            max_seq_len_np=None,
        )
        scheduled = SimpleNamespace(scheduled_spec_decode_tokens={}, has_structured_output_requests=False)
        (patch,) = (patch for patch in gpu_verification.patches() if patch.name == "prepare_inputs")
        prepare_inputs = patch.around(model_runner.GPUModelRunner.prepare_inputs)
        return prepare_inputs(self, scheduled, state, graph, 0)

    def longest_query(self, batch, graph, *, capture):
        """What attention is told of the batch's queries when `graph` is captured or replayed."""
        described = model_states.DefaultModelState.prepare_attn(
            self.model_state, batch, graph.cg_mode, (), None, [], None, for_capture=capture
        )
        return described["max_query_len"]


def test_a_graph_is_replayed_as_it_was_captured(monkeypatch):
    """A step without drafts replays the graph of mixed lengths; a plan for single tokens would not fit it."""
    runner = Runner(monkeypatch)
    graph = BatchExecutionDescriptor(CUDAGraphMode.FULL, 4, 4, max_query_len=runner.decode_query_len)
    captured = InputBatch.make_dummy(4, 4, runner.input_buffers, max_query_len=graph.max_query_len)
    replayed = runner.step_without_drafts(3, graph)
    assert runner.longest_query(captured, graph, capture=True) == 1 + STEPS
    assert runner.longest_query(replayed, graph, capture=False) == 1 + STEPS


def test_outside_of_such_graphs_a_step_is_described_as_it_is(monkeypatch):
    runner = Runner(monkeypatch)
    graph = BatchExecutionDescriptor(CUDAGraphMode.PIECEWISE, 4, None)
    assert runner.longest_query(runner.step_without_drafts(3, graph), graph, capture=False) == 1


# The switch


def play(switch, requests, steps, wait):
    """Steps of `requests` requests; `wait(drafting)` gives a step's seconds and each request's tokens."""
    names = [str(number) for number in range(requests)]
    drafted_steps, now = 0, switch._last[0]
    for _ in range(steps):
        each = switch[requests]
        seconds, tokens = wait(each > 0)
        now += seconds
        drafted_steps += each > 0
        scheduled = dict.fromkeys(names, 1 + each)
        switch.ended(scheduled, drafted=each * requests, sampled=round(tokens * requests), now=now)
    return drafted_steps


def test_the_switch_keeps_what_is_faster():
    gain, loss = gpu_switch.Switch(8, 8192), gpu_switch.Switch(8, 8192)
    steps = 4000
    assert play(gain, 2, steps, lambda drafting: (0.003, 2.0) if drafting else (0.0025, 1.0)) > 0.9 * steps
    assert play(loss, 200, steps, lambda drafting: (0.0125, 1.2) if drafting else (0.01, 1.0)) < 0.15 * steps


def test_the_switch_turns_when_things_change():
    switch = gpu_switch.Switch(8, 8192)
    play(switch, 16, 3000, lambda drafting: (0.012, 1.0) if drafting else (0.010, 1.0))
    assert play(switch, 16, 3000, lambda drafting: (0.012, 2.0) if drafting else (0.010, 1.0)) > 1000


def test_the_switch_hears_what_drafts_would_bring(monkeypatch):
    monkeypatch.setattr(gpu_switch, "_heard", [])
    gpu_switch.listen_to(SimpleNamespace(outlook=Outlook(DEVICE), enabled=True, adaptive=True))
    assert play(gpu_switch.Switch(8, 8192), 4, 3000, lambda drafting: (0.004, 1.0) if drafting else (0.003, 1.0)) == 0


def test_drafting_is_switched_off_and_on_by_hand(monkeypatch):
    monkeypatch.setattr(gpu_switch, "_heard", [])
    speculator = object.__new__(gpu_drafting.GroupedSpeculator)
    speculator.enabled = speculator.adaptive = True
    gpu_switch.listen_to(speculator)
    switch, runner = gpu_switch.Switch(8, 8192), SimpleNamespace(speculator=speculator)
    switch.duel(4).drafting = True
    assert drafting.configure(runner, {}) == {"enabled": True, "adaptive": True}
    assert switch[4] == 8
    assert drafting.configure(runner, {"enabled": False, "max_spec_tokens": 4})["status"] == 400
    assert switch[4] == 8
    assert drafting.configure(runner, {"enabled": False}) == {"enabled": False, "adaptive": True}
    assert switch[4] == 0
    assert drafting.configure(runner, {"enabled": True}) == {"enabled": True, "adaptive": True}
    assert switch[4] == 8
    switch.duel(4).drafting = False
    assert switch[4] == 0
    assert drafting.configure(runner, {"adaptive": False}) == {"enabled": True, "adaptive": False}
    assert switch[4] == 8
    assert drafting.configure(runner, {"enabled": False}) == {"enabled": False, "adaptive": False}
    assert switch[4] == 0
    assert drafting.configure(SimpleNamespace(speculator=object()), {})["status"] == 404


def test_batch_sizes_are_told_apart():
    switch = gpu_switch.Switch(8, 8192)
    play(switch, 64, 3000, lambda drafting: (0.012, 1.0) if drafting else (0.010, 1.0))
    play(switch, 1, 1000, lambda drafting: (0.004, 2.0) if drafting else (0.003, 1.0))
    assert switch[64] == 0
    assert switch[1] == 8


def test_a_step_never_holds_more_than_it_may():
    for limit, most in ((1024, 4), (128, 0)):
        switch = gpu_switch.Switch(8, limit)
        switch.duel(200).drafting = True
        assert switch[200] == most


def heard(requests):
    """How many of the steps with these requests' tokens, a second apart, a duel hears of."""
    switch, told = gpu_switch.Switch(8, 8192), []
    switch.duel(1).step = lambda **step: told.append(step)
    for now, scheduled in enumerate(requests):
        switch.ended(scheduled, drafted=0, sampled=1, now=float(now))
    return len(told)


def test_prefill_and_idle_time_are_left_out():
    assert heard([{"a": 1}] * 100) == 99, "of the first nobody knows how long it took"
    assert heard([{"a": 300}] * 100) == 0, "a prompt in chunks"
    assert heard([{f"r{number}": 1} for number in range(100)]) == 0, "nobody was there before: the engine was idle"


# A step without drafts


class Speculator(gpu_drafting.GroupedSpeculator):
    """One that only counts."""

    def __init__(self):
        self.rested = 0
        self.client = None

    def rest(self, input_batch):
        assert input_batch.req_ids == ["a"]
        self.rested += 1


def sampled_with(asked, drafted, structured=False):
    """Which speculator, and how many places, vLLM sees at the end of a step; what it left, and the speculator."""
    batch = SimpleNamespace(num_draft_tokens=drafted, req_ids=["a"], has_structured_output_reqs=structured)
    state = SimpleNamespace(num_spec_tokens_to_schedule=asked, input_batch=batch)
    handler = SimpleNamespace(req_ids=["old"], num_draft_tokens=STEPS, draft_tokens_np=1)
    runner = SimpleNamespace(
        execute_model_state=state,
        speculator=Speculator(),
        num_speculative_steps=STEPS,
        draft_tokens_handler=handler,
        adaptive_verification=None,
    )
    speculator, seen = runner.speculator, []

    def sample_tokens(runner, _):
        runner.execute_model_state = None
        seen.append((runner.speculator, runner.num_speculative_steps))

    (patch,) = (patch for patch in gpu_drafting.patches() if patch.name == "sample_tokens")
    patch.around(sample_tokens)(runner, None)
    assert (runner.speculator, runner.num_speculative_steps) == (speculator, STEPS)
    return seen[0], handler, speculator


def test_a_step_without_drafts_ends_as_without_speculation():
    seen, handler, speculator = sampled_with(asked=0, drafted=0)
    assert seen == (None, 0)
    assert (handler.req_ids, handler.num_draft_tokens, handler.draft_tokens_np) == (["a"], 0, None)
    assert speculator.rested == 1


@pytest.mark.parametrize(("asked", "drafted"), [(STEPS, 0), (0, STEPS), (STEPS, STEPS)])
def test_a_step_with_drafts_or_before_one_is_the_speculators(asked, drafted):
    """Its drafts stay on the GPU, where the next step finds them."""
    seen, handler, speculator = sampled_with(asked, drafted)
    assert seen == (speculator, 0)
    assert (handler.req_ids, handler.num_draft_tokens, handler.draft_tokens_np) == (["a"], asked, None)
    assert speculator.rested == 0


def test_drafts_are_gathered_where_a_grammar_has_a_say():
    seen, handler, speculator = sampled_with(STEPS, STEPS, structured=True)
    assert seen == (speculator, STEPS)
    assert handler.req_ids == ["old"], "vLLM has done it"
    assert speculator.rested == 0


# Other engines


def test_tokens_are_handed_on_in_pieces_and_all_of_them(engine):
    handed = []
    speculator = object.__new__(gpu_drafting.GroupedSpeculator)
    speculator.running, speculator.newcomers, speculator.siblings = {}, {}, engine.siblings
    speculator.client = SimpleNamespace(
        register_group=lambda *_: None,
        update=lambda group, request, before, tokens: handed.append((group, request, before, list(tokens))),
    )
    kinship = {"seer_group": "g", "seer_request": "r"}
    speculator.added("id", 0, [1, 2], [3], kinship | {"seer_priority": "high"})
    assert (speculator.running["id"].weight, speculator.newcomers) == (2.0, {0: 2.0})
    for token in range(40):
        speculator.sampled({"id": 1, "unknown": 0}, [[9], [token % VOCABULARY]])
    assert len(handed) == 1, "one call of the client is not made for each token"
    speculator.left("id", 0)
    speculator.sampled({"id": 0}, [[1]])
    assert [(group, request) for group, request, _, _ in handed] == [("g", "r")] * 2
    assert [before for _, _, before, _ in handed] == [0, len(handed[0][3])]
    assert handed[0][3] + handed[1][3] == [3, *(token % VOCABULARY for token in range(40))]


# Where it meets vLLM


def test_what_is_patched_is_as_it_was():
    for patch in (*gpu_drafting.patches(), *gpu_verification.patches(), *gpu_switch.patches()):
        patch.check()


def config(method="ngram_gpu", adaptive=True, world=1, executor="uni", additional=None):
    return SimpleNamespace(
        speculative_config=SimpleNamespace(method=method, enable_adaptive_verification=adaptive),
        parallel_config=SimpleNamespace(world_size=world, distributed_executor_backend=executor),
        model_config=SimpleNamespace(max_model_len=4096),
        additional_config=additional,
    )


WRONG = [{"method": "ngram"}, {"adaptive": False}, {"world": 2}, {"executor": "mp"}, {"executor": "ray"}]


@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_be_is_refused(wrong, monkeypatch):
    applied = []
    monkeypatch.setattr(gpu_drafting, "_apply", lambda: applied.append(wrong))
    gpu_drafting.install(config())
    assert applied.pop() == wrong
    with pytest.raises(gpu_drafting.UnsupportedVllmError):
        gpu_drafting.install(config(**wrong))
    assert not applied


def test_it_is_asked_for():
    assert not gpu_drafting.wanted(config())
    assert gpu_drafting.wanted(config(additional={"seer_drafts": True}))
