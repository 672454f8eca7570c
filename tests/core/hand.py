"""A core driven by hand, one event at a time, for cases that a test spells out."""

from typing import Any

from seer_async import invariants
from seer_async.config import resolve
from seer_async.core import Core
from seer_async.errors import FailureKind
from seer_async.events import (
    Cancel,
    ChunkFailed,
    ChunkFinished,
    Command,
    Dispatch,
    Emit,
    EngineDown,
    EngineReport,
    EngineUp,
    Event,
    GroupAdded,
    InputClosed,
    Record,
    Stop,
    Wake,
    Woke,
)
from seer_async.types import ChunkReply, EngineInfo, EngineStats, Prompt, Sample, VersionSpan

PROMPT = [1, 2, 3]


class Hand:
    """`sent` are the calls in flight, in order; `samples`, `records`, `wakes` and `stopped` what the core has said."""

    def __init__(
        self,
        *engines: str,
        tokenizer: Any = None,
        lengths: dict[str, int] | None = None,
        lasting: bool = False,
        **tree: Any,
    ) -> None:
        plain = {"engine": {"stagger": 0.0}}  # chunks of the size given, and bounds that just add up
        self.core = Core(
            resolve(plain, tree),
            engines or ("a",),
            run="r",
            seed=1,
            tokenizer=tokenizer,
            lengths=lengths,
            lasting=lasting,
        )
        self.now = 0.0
        self.sent: list[Dispatch] = []
        self.records: list[Record] = []
        self.samples: dict[str, Sample] = {}
        self.wakes: list[float] = []
        self.stopped: str | None = None

    def post(self, event: Event) -> list[Command]:
        commands = self.core.handle(event, self.now)
        for command in commands:
            self._execute(command)
        invariants.check(self.core)
        return commands

    def _execute(self, command: Command) -> None:
        match command:
            case Dispatch():
                self.sent.append(command)
            case Record():
                self.records.append(command)
            case Cancel():
                self.sent = [call for call in self.sent if call.call != command.call]
            case Emit():
                self.samples[command.sample.id] = command.sample
            case Wake():
                self.wakes.append(command.at)
            case Stop():
                self.stopped = command.reason

    # Events

    def groups(self, *ids: str, n: int = 1, limit: int = 100, prompt: list[int] = PROMPT, **options: Any) -> "Hand":
        for name in ids:
            self.post(GroupAdded(prompt=Prompt(id=name, token_ids=prompt), n=n, limit=limit, **options))
        return self

    def close(self) -> "Hand":
        self.post(InputClosed())
        return self

    def up(
        self, *engines: str, blocks: int = 1000, seqs: int | None = None, version: str = "v", boot: str = ""
    ) -> "Hand":
        """Blocks of 10 tokens; one of them is the engine's own."""
        for name in engines or self.core.instances:
            info = EngineInfo(
                boot=boot or name,
                model="m",
                max_model_len=10**6,
                block_size=10,
                num_blocks=blocks + 1,
                max_num_seqs=seqs,
                weight_version=version,
            )
            self.post(EngineUp(engine=name, info=info))
        return self

    def down(self, engine: str) -> None:
        self.post(EngineDown(engine=engine, reason="gone"))

    def report(self, engine: str, **fields: Any) -> None:
        zero = dict.fromkeys(
            ("running", "waiting", "kv_used", "preemptions", "generated_tokens", "prompt_tokens", "cached_tokens"), 0
        )
        info = self.core.instances[engine].info
        assert info is not None
        self.post(EngineReport(engine=engine, stats=EngineStats(**{"boot": info.boot} | zero | fields)))

    def answer(self, request: str, tokens: int | None = None, finish: str = "length", version: str = "", **fields: Any):
        """The engine answers the request's call with `tokens` tokens (as many as asked for) numbered from 1000."""
        call = self.take(request)
        have = len(call.prefix) - len(PROMPT)
        count = call.max_tokens if tokens is None else tokens
        ids = fields.pop("token_ids", [1000 + have + i for i in range(count)])
        reply = ChunkReply(
            token_ids=ids,
            logprobs=[-0.5] * len(ids),
            finish_reason=finish,
            versions=(VersionSpan(version, 0, len(ids)),) if version else (),
            **fields,
        )
        return self.post(ChunkFinished(call=call.call, reply=reply))

    def fail(self, request: str, kind: FailureKind = FailureKind.SERVER, **fields: Any) -> list[Command]:
        return self.post(ChunkFailed(call=self.take(request).call, kind=kind, message="it says no", **fields))

    def wake(self, at: float) -> list[Command]:
        self.now = at
        return self.post(Woke())

    # What is in flight

    def take(self, request: str) -> Dispatch:
        call = next(call for call in self.sent if call.request == request)
        self.sent.remove(call)
        return call

    @property
    def running(self) -> list[str]:
        """Requests in flight, in the order of their calls."""
        return [call.request for call in self.sent]

    @property
    def engine_of(self) -> dict[str, str]:
        return {call.request: call.engine for call in self.sent}
