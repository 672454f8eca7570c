"""Grouped drafting in Model Runner V1: a request's siblings, here and on other engines, say what may come next.

vLLM calls `propose` after every step. It hands the step's new tokens to the group's index and to the draft server,
takes in what siblings elsewhere have generated, learns from what became of the last drafts and how long the step took,
and answers with as many tokens for each request as the budget finds worth verifying: often none.

Invariants: nothing here waits for anything outside the process; a draft never reaches past a request's last token, the
model's length or a pending minimum length; whatever is drafted, what is sampled stays the same (see `verification`).
"""

import time
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray
from vllm.logger import init_logger

from seer_async.drafting.acceptance import Acceptance
from seer_async.drafting.budget import Budget
from seer_async.drafting.groups import Groups
from seer_async.drafting.index import GroupIndex, Lookup, Path
from seer_async.drafting.steptime import Profile, StepTime
from seer_servers.drafting.client import drafter_client
from seer_servers.drafting.wire import DEFAULT_TTL_S
from seer_servers.plugin.draft_stats import DraftStats, Publisher
from seer_servers.plugin.kinship import kinship_of
from seer_servers.plugin.marker import original_prompt_len

logger = init_logger("vllm.seer")

SWEEP_EVERY = 32  # steps
TAKE_IN_EVERY = 8  # steps, while nothing is drafted: one by one, tokens cost an engine that gains nothing by them
SETTINGS = ("max_spec_tokens", "pattern_lookup_min", "pattern_lookup_max", "min_score")
PROFILE_TOKENS = (1, 2, 4, 8, 16, 32, 64)
PROFILE_ROUNDS = 3


class Row:
    """One request while it runs here. One whose prompt is of embeddings takes no part: its text is not known."""

    def __init__(self, request_id: str, state: Any) -> None:
        params = state.sampling_params
        prompt: list[int] = state.prompt_token_ids or []
        self.takes_part = bool(prompt)
        self.prompt_len = original_prompt_len(params, prompt) or len(prompt)
        kinship = kinship_of(request_id, prompt[: self.prompt_len], params.extra_args or {})
        self.group, self.request, self.weight = kinship
        self.longest = len(prompt) + (params.max_tokens or 1 << 60)
        self.shortest = len(prompt) + params.min_tokens
        self.stops: set[int] = set() if params.ignore_eos else set(params.all_stop_token_ids)
        self.known = 0  # tokens of the response that the group has
        self.path: Path | None = None
        self.survival: list[float] = []  # of the tokens that were drafted: the chance that all up to each come

    def room(self, length: int, model_len: int) -> int:
        """How many tokens may be drafted behind `length` tokens, the last token of the response not among them."""
        room = min(self.longest, model_len) - length - 1
        if length < self.shortest:  # the step's bonus token is kept from ending the response by the length at its start
            room = min(room, self.shortest - length - 1)
        return max(0, room)


class Decoding(NamedTuple):
    """A request of this step that goes on decoding, and its place in the batch."""

    place: int
    row: Row
    length: int


class GroupedDrafter:
    """vLLM's `custom_class` proposer."""

    def __init__(self, vllm_config: Any) -> None:
        self._model_len: int = vllm_config.model_config.max_model_len
        self._vocabulary: int = vllm_config.model_config.get_vocab_size()
        self._most: int = vllm_config.speculative_config.num_speculative_tokens
        self.lookup = Lookup(max_spec_tokens=self._most)
        self.enabled = True
        self.adaptive = True  # the budget decides; else all that the index finds is drafted
        self.groups = Groups()
        self.acceptance = Acceptance()
        self.budget = Budget(StepTime())
        self.stats = DraftStats()
        self._publisher = Publisher()
        self.client = drafter_client()
        self._rows: dict[str, Row] = {}
        self._runner: Any = None
        self._scheduled: Any = None
        self._last: tuple[float, frozenset[str]] = (0.0, frozenset())
        GroupIndex.warm_up()

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to load; vLLM's CPU runner asks."""

    def settings(self) -> dict[str, Any]:
        """What `configure` can change."""
        return {"enabled": self.enabled, "adaptive": self.adaptive} | {
            name: getattr(self.lookup, name) for name in SETTINGS
        }

    def configure(self, *, enabled: bool | None = None, adaptive: bool | None = None, **lookup: Any) -> None:
        """Change settings; raises ValueError if they do not fit, and then changes none."""
        new = msgspec.structs.replace(self.lookup, **lookup)
        if new.max_spec_tokens > self._most:
            raise ValueError(f"max_spec_tokens is at most {self._most}, the engine's num_speculative_tokens.")
        if new.pattern_lookup_min > new.pattern_lookup_max:
            raise ValueError("pattern_lookup_min is above pattern_lookup_max.")
        self.lookup = new
        self.enabled = self.enabled if enabled is None else enabled
        self.adaptive = self.adaptive if adaptive is None else adaptive

    def profile(self, runner: Any) -> None:
        """Time the model on steps of several sizes: what the cost model starts from."""
        times = []
        for tokens in PROFILE_TOKENS * PROFILE_ROUNDS:
            start = time.perf_counter()
            runner._dummy_run(tokens)  # noqa: SLF001 - what vLLM itself profiles with
            times.append((tokens, (time.perf_counter() - start) * 1e3))
        best = [(tokens, min(ms for of, ms in times if of == tokens)) for tokens in PROFILE_TOKENS]
        self.budget.times = StepTime(Profile.fit(best))
        logger.info("Seer drafting: a step of n tokens takes about %.1f + %.2f n ms", *self.budget.times.profile)

    def prepare(self, runner: Any, scheduler_output: Any) -> None:
        """See the step that the next `propose` ends."""
        self._runner, self._scheduled = runner, scheduler_output

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: NDArray[np.int32],
        token_ids_cpu: NDArray[np.int32],
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Drafts for each row of the batch; none for a row that is still prefilling.

        `num_tokens_no_spec` [rows] and `token_ids_cpu` [rows, max_model_len] hold the rows' tokens with this step's.
        """
        del slot_mappings
        start = time.perf_counter()
        batch = self._decoding(sampled_token_ids, num_tokens_no_spec)
        self._learn_time(start, batch)
        drafting = self.enabled and (not self.adaptive or self.budget.wants_drafts(len(batch)))
        if drafting or self._scheduled.scheduled_spec_decode_tokens or self.stats.steps % TAKE_IN_EVERY == 0:
            self._take_in(batch, sampled_token_ids, token_ids_cpu)
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        if drafting:
            self._draft(batch, token_ids_cpu, drafts)
        self.stats.step(time.perf_counter() - start, off=self.budget.off, switch_offs=self.budget.switch_offs)
        if self.stats.steps % SWEEP_EVERY == 0:
            self._sweep()
        return drafts

    def _decoding(self, sampled: list[list[int]], lengths: NDArray[np.int32]) -> list[Decoding]:
        ids: list[str] = self._runner.input_batch.req_ids
        return [Decoding(i, self._row(ids[i]), int(lengths[i])) for i, tokens in enumerate(sampled) if tokens]

    def _row(self, request_id: str) -> Row:
        row = self._rows.get(request_id)
        if row is None:
            state = self._runner.requests[request_id]
            row = self._rows[request_id] = Row(request_id, state)
            if not row.takes_part:
                return row
            row.known = self.groups.length(row.group, row.request)  # of earlier chunks
            self.groups.add(row.group, "prompt", 0, state.prompt_token_ids[: row.prompt_len])
            if self.client:
                self.client.register_group(row.group, DEFAULT_TTL_S)
        return row

    def _learn_time(self, now: float, batch: list[Decoding]) -> None:
        """Learn from the time since the last step, if it was this step's alone: every request decoded, none waited.

        What the step brought is what could be expected of its drafts: with few requests what they really get is luck,
        and drafting would be judged by that. The chances are learned from what really comes.
        """
        then, before = self._last
        counts: dict[str, int] = self._scheduled.num_scheduled_tokens
        drafted: dict[str, list[int]] = self._scheduled.scheduled_spec_decode_tokens
        self._last = now, frozenset(counts)
        if not (self.enabled and self.adaptive):
            return
        plain = all(count == 1 + len(drafted.get(request_id, ())) for request_id, count in counts.items())
        if plain and len(batch) == len(counts) and not before.isdisjoint(counts):
            verified = sum(map(len, drafted.values()))
            ids: list[str] = self._runner.input_batch.req_ids
            right = sum(sum(row.survival[: len(drafted.get(ids[place], ()))]) for place, row, _ in batch)
            self.budget.learn(len(batch), verified, len(batch) + right, (now - then) * 1e3)

    def _take_in(self, batch: list[Decoding], sampled: list[list[int]], tokens: NDArray[np.int32]) -> None:
        drafted: dict[str, list[int]] = self._scheduled.scheduled_spec_decode_tokens
        ids: list[str] = self._runner.input_batch.req_ids
        for place, row, length in (one for one in batch if one.row.takes_part):
            self._judge(row, len(drafted.get(ids[place], ())), len(sampled[place]) - 1)
            new = _until_stop(tokens[place, row.prompt_len + row.known : length], row.stops)
            self.groups.add(row.group, row.request, row.known, new)
            if self.client and len(new):
                self.client.update(row.group, row.request, row.known, new.tolist())
            row.known = max(row.known, length - row.prompt_len)
        for other in self.client.fetched() if self.client else ():
            # What others send is not to be trusted.
            if other.tokens.min() >= 0 and other.tokens.max() < self._vocabulary:
                self.groups.add(other.group, other.request, other.prev_token_count, other.tokens)

    def _judge(self, row: Row, verified: int, accepted: int) -> None:
        path, row.path = row.path, None
        if path is not None and verified:
            scores = path.scores[:verified]
            self.acceptance.observe(path.match, scores, min(accepted, len(scores)))
            self.stats.verified(row.group, len(scores), min(accepted, len(scores)))

    def _draft(self, batch: list[Decoding], tokens: NDArray[np.int32], drafts: list[list[int]]) -> None:
        found = [self._propose(decoding, tokens) for decoding in batch]
        survival = [self.acceptance.survival(path.match, path.scores) if path else [] for path in found]
        counts = self.budget.allot(survival, [decoding.row.weight for decoding in batch])
        if not self.adaptive:
            counts = [len(path) for path in survival]
        for (place, row, _), path, chances, count in zip(batch, found, survival, counts, strict=True):
            if path and count:
                row.path, row.survival = path, chances[:count]
                drafts[place] = path.tokens[:count]

    def _propose(self, decoding: Decoding, tokens: NDArray[np.int32]) -> Path | None:
        place, row, length = decoding
        room = row.room(length, self._model_len)
        if not room or not row.takes_part:
            return None
        tail = tokens[place, max(0, length - self.lookup.pattern_lookup_max) : length]
        path = self.groups.propose(row.group, tail, self.lookup)
        return path and Path(path.tokens[:room], path.scores[:room], path.match)

    def _sweep(self) -> None:
        for request_id in self._rows.keys() - self._runner.requests.keys():
            del self._rows[request_id]
        self.groups.trim()
        if self._publisher.due():
            now = {
                "groups": len(self.groups),
                "tokens": self.groups.tokens,
                "bytes": self.groups.nbytes,
                "groups_forgotten": self.groups.forgotten,
                "step_ms": self.budget.times.parameters(),
                "acceptance": self.acceptance.table(),
            }
            self._publisher.publish(self.stats.page() | now | (self.client.stats() if self.client else {}))


def _until_stop(tokens: NDArray[np.int32], stops: set[int]) -> NDArray[np.int32]:
    """The tokens up to the one that ends the response: what a step sampled behind it is thrown away."""
    if stops:
        for place, token in enumerate(tokens.tolist()):
            if token in stops:
                return tokens[: place + 1]
    return tokens
