"""The connector in vLLM's scheduler: which blocks of a request are in the pool, and which it should get.

Invariants: only requests with a `cache_salt` take part, because the salt is what ties a block to weights; a block is
planned to be saved only when all its tokens are known and computed by the end of the step, so draft tokens that may be
rejected are never in it; a request's last token is left to compute, because its logits are needed. (Where an engine
drafts, vLLM then pads the step with junk drafts: less than the block that would be computed to avoid it.)

A chunk rarely ends where a block does. So the block that a request ends in is saved too when its limit is near, as a
*tail*: a block of which only the first tokens count, named by exactly those. A continuation looks for the longest; it
may be of the block before the one it ends in, where the last step's drafts went over a border.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm.v1.request import RequestStatus

from seer_servers.kvpool.shm.ledger import Field
from seer_servers.kvpool.shm.plan import Load, Plan, Save
from seer_servers.kvpool.shm.store import BlockId, Store, block_key, salt_folder
from seer_servers.plugin.marker import SEER_PROMPT_LEN

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

    from seer_servers.kvpool.shm.ledger import Row

SAVE, LOAD = "seer_save", "seer_load"  # in a request's kv_transfer_params; true unless said otherwise
_MOST_ROUNDS = 2  # a block that can be neither read nor removed must not be tried for ever


@dataclass(slots=True)
class Found:
    """What the pool has of a request beyond the engine's own cache: blocks from `first` on, and how many tokens."""

    first: int
    blocks: list[BlockId] = field(default_factory=list)
    tokens: int = 0
    tail: BlockId | None = None


@dataclass(slots=True)
class Tracked:
    """A request that takes part."""

    request: Request
    cache_salt: str
    folder: str
    saving: bool
    loading: bool
    local: int = 0  # tokens that the engine's own prefix cache had
    pooled: int = 0  # tokens that came from the pool
    planned: int = 0  # leading blocks that need no saving any more
    rounds: int = 0  # loads begun; more than one after a failure or a preemption
    found: Found | None = None  # not yet allocated, or being loaded
    places: list[int] = field(default_factory=list)  # of the blocks being loaded


class SchedulerSide:
    """Finds, plans and forgets.

    `ranks` is the number of workers, each of which has its own part of every block; `between_steps` says whether loads
    happen between steps or at the start of the step that needs them.
    """

    def __init__(
        self,
        store: Store,
        row: Row,
        fingerprint: bytes,
        *,
        block_size: int,
        ranks: int,
        between_steps: bool,
    ) -> None:
        self._store = store
        self._row = row
        self._fingerprint = fingerprint
        self._block_size = block_size
        self._ranks = ranks
        self._between_steps = between_steps
        self._tracked: dict[str, Tracked] = {}
        self._loads: list[Load] = []  # for the next step
        self._loading: set[str] = set()

    def find(self, request: Request, computed: int) -> tuple[int, bool]:
        """Tokens the pool can add to the first `computed`, and whether they are loaded between steps."""
        tracked = self._track(request)
        if tracked is None or not tracked.loading or tracked.rounds >= _MOST_ROUNDS:
            return 0, False
        tracked.local = computed
        tracked.found = found = self._find(tracked, computed)
        return found.tokens, self._between_steps and found.tokens > 0

    def allocated(self, request: Request, blocks: KVCacheBlocks, tokens: int) -> None:
        """The scheduler has made room for `tokens` of what `find` found, or goes on after they were loaded."""
        tracked = self._tracked.get(request.request_id)
        if tracked is None or tracked.found is None or request.request_id in self._loading:
            return
        found = tracked.found
        self._row.add(Field.QUERIES, request.num_tokens - tracked.local)
        if not tokens:
            tracked.found = None
            return
        assert tokens == found.tokens
        (places,) = blocks.get_block_ids()
        tracked.places = places[found.first : found.first + len(found.blocks)]
        tracked.pooled = tokens
        tracked.rounds += 1
        self._row.add(Field.HITS, tokens)
        self._loads.append(Load(request.request_id, list(zip(tracked.places, found.blocks, strict=True))))
        self._loading.add(request.request_id)

    def plan(self, step: SchedulerOutput) -> Plan:
        """Return the work that goes with a step."""
        gone = step.preempted_req_ids or set()
        loads = [load for load in self._loads if load.request not in gone]
        self._loads = []
        return Plan(loads, [save for save in self._saves(step) if save.blocks])

    def loaded(self, requests: set[str] | None, bad_places: set[int]) -> None:
        """The workers are done with these loads (None: with all); before the first bad place they went well."""
        for name in self._loading.copy() if requests is None else requests & self._loading:
            self._loading.discard(name)
            tracked = self._tracked.get(name)
            if tracked is None or tracked.found is None:
                continue
            found, tracked.found = tracked.found, None
            good = next((n for n, place in enumerate(tracked.places) if place in bad_places), None)
            if good is not None:
                tracked.pooled = good * self._block_size
            elif found.tail is not None:
                self._store.expend([found.tail])  # it has served its one purpose

    def finished(self, request: Request) -> dict[str, Any] | None:
        """Forget a request; returns what its reply says about the pool."""
        tracked = self._tracked.pop(request.request_id, None)
        self._loading.discard(request.request_id)
        self._loads = [load for load in self._loads if load.request != request.request_id]
        if tracked is None:
            return None
        if request.status == RequestStatus.FINISHED_STOPPED:
            self._expend(tracked)
        return {"seer_local_tokens": tracked.local, "seer_pool_tokens": tracked.pooled}

    def _track(self, request: Request) -> Tracked | None:
        tracked = self._tracked.get(request.request_id)
        if tracked is None and request.cache_salt and not request.mm_features:
            asked = request.kv_transfer_params or {}
            tracked = Tracked(
                request,
                request.cache_salt,
                salt_folder(request.cache_salt),
                saving=asked.get(SAVE) is not False,
                loading=asked.get(LOAD) is not False and not request.skip_reading_prefix_cache,
            )
            self._tracked[request.request_id] = tracked
        return tracked

    # Loading

    def _find(self, tracked: Tracked, computed: int) -> Found:
        size, request = self._block_size, tracked.request
        found = Found(computed // size)
        most = request.num_tokens - 1
        full = min(most // size, len(request.block_hashes))
        for depth in range(found.first, full):
            block = self._block(tracked, depth)
            if not self._held(block):
                break
            found.blocks.append(block)
        found.tokens = len(found.blocks) * size
        depth = found.first + len(found.blocks)
        if depth >= full - 1:
            self._find_tail(tracked, found, depth, min(most, (depth + 1) * size))
        return found

    def _find_tail(self, tracked: Tracked, found: Found, depth: int, most: int) -> None:
        for tokens in range(most, depth * self._block_size, -1):
            tail = self._tail(tracked, depth, tokens)
            if self._held(tail):
                found.blocks.append(tail)
                found.tokens += tokens - depth * self._block_size
                found.tail = tail
                return

    def _held(self, block: BlockId) -> bool:
        return all(self._store.tier(block._replace(rank=rank)) is not None for rank in range(self._ranks))

    # Saving

    def _saves(self, step: SchedulerOutput) -> list[Save]:
        computed = {new.req_id: new.num_computed_tokens for new in step.scheduled_new_reqs}
        cached = step.scheduled_cached_reqs
        computed |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        return [
            self._save(self._tracked[name], computed[name] + scheduled, step)
            for name, scheduled in step.num_scheduled_tokens.items()
            if name in self._tracked and self._tracked[name].saving
        ]

    def _save(self, tracked: Tracked, computed: int, step: SchedulerOutput) -> Save:
        request, size = tracked.request, self._block_size
        known = min(computed, request.num_tokens)
        full = min(known // size, len(request.block_hashes))
        tail = self._tail(tracked, full, known) if known > full * size and self._may_end(request, step) else None
        if full <= tracked.planned and tail is None:
            return Save(tracked.cache_salt, [])
        state = step.kv_connector_block_state
        assert state is not None
        (places,) = state.get_block_ids(request.request_id) or ([],)
        blocks = [(places[depth], self._block(tracked, depth)) for depth in range(tracked.planned, full)]
        if tail is not None:
            blocks.append((places[full], tail))
        tracked.planned = max(tracked.planned, full)
        return Save(tracked.cache_salt, blocks)

    def _may_end(self, request: Request, step: SchedulerOutput) -> bool:
        """Whether the tokens that this step samples may be the last."""
        drafts = len(step.scheduled_spec_decode_tokens.get(request.request_id, ()))
        return bool(request.num_output_tokens + request.num_output_placeholders + 1 + drafts >= request.max_tokens)

    # Names

    def _block(self, tracked: Tracked, depth: int) -> BlockId:
        return BlockId(tracked.folder, block_key(self._fingerprint, tracked.request.block_hashes[depth]), depth)

    def _tail(self, tracked: Tracked, depth: int, end: int) -> BlockId:
        """The block after `depth` full ones, of which the tokens before `end` count."""
        request = tracked.request
        before = request.block_hashes[depth - 1] if depth else _adapter(request)  # as the hashes of full blocks know it
        tokens = array("q", request.all_token_ids[depth * self._block_size : end])
        return BlockId(tracked.folder, block_key(self._fingerprint, before + b"tail" + tokens.tobytes()), depth)

    def _expend(self, tracked: Tracked) -> None:
        """The model ended the response: nobody continues it, so what lies beyond the prompt can go first."""
        params = tracked.request.sampling_params
        prompt = (params.extra_args or {}).get(SEER_PROMPT_LEN) if params else None
        if isinstance(prompt, int) and tracked.saving:
            first = -(-prompt // self._block_size)
            self._store.expend([self._block(tracked, depth) for depth in range(first, tracked.planned)])


def _adapter(request: Request) -> bytes:
    """What tells a LoRA adapter from others, and from the model itself."""
    adapter = request.lora_request
    return repr((adapter.lora_name, adapter.lora_path)).encode() if adapter else b""
