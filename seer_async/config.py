"""The resolved configuration of a run.

A run is configured by defaults, then a TOML file, then `--set a.b=c`, then the CLI's own options. Unknown keys are
errors that name their path. The resolved value is saved with the run, so a run folder says how it was made.
"""

from __future__ import annotations

import re
import tomllib
from typing import TYPE_CHECKING, Any

import msgspec

from seer_async.address import require_distinct
from seer_async.errors import ConfigError, UsageError
from seer_async.sampling import REFUSED, Sampling

if TYPE_CHECKING:
    from pathlib import Path


_POOLS = ("auto", "shm", "mooncake", "none")
_DRAFTS = ("auto", "grouped", "suffix", "ngram", "none")


def _require(ok: bool, message: str) -> None:  # noqa: FBT001 - a condition is what it takes
    if not ok:
        raise ConfigError(message)


class RolloutConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is sampled, and how it is cut.

    `chunk_size` 0 sends every response in one call. `mixed_versions` says what happens to a response whose tokens
    would come from two weight versions: "restart" it from its prompt, or "mark" it off-policy. "mark" also lets a
    rollout start on engines whose weights differ.
    """

    n: int = 8
    chunk_size: int = 512
    mixed_versions: str = "restart"
    max_attempts: int = 10

    def __post_init__(self) -> None:
        _require(self.n >= 1, "rollout.n must be at least 1: the number of responses to each prompt")
        _require(self.chunk_size >= 0, "rollout.chunk_size must be 0 (undivided) or the tokens in a chunk")
        _require(self.mixed_versions in {"restart", "mark"}, 'rollout.mixed_versions must be "restart" or "mark"')
        _require(self.max_attempts >= 1, "rollout.max_attempts must be at least 1")


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The scheduling policy and its knobs.

    `probes` requests of each group run first. One of `fairness` decisions goes to the request that has waited
    longest. `affinity` is how much fuller, relatively, the engine that holds a request's prefix may be before the
    request moves away; `pooled_affinity` is the same between engines that share a KV pool. `lengths` is a file of true
    lengths (a samples.jsonl of an earlier run), for the oracle; with `force_lengths` every response is ended at its
    length there, so that policies can be compared on the same work. `over_issue` is the policy `partial`'s. The policy
    `foresight` wants a KV pool: it leaves started work for longer work, and without a pool a return is a prefill.
    """

    policy: str = "seer"
    probes: int = 1
    fairness: int = 32
    affinity: float = 0.25
    pooled_affinity: float = 0.05
    lengths: str | None = None
    force_lengths: bool = False
    over_issue: float = 2.0

    def __post_init__(self) -> None:
        _require(self.probes >= 0, "scheduler.probes must be 0 or more")
        _require(self.fairness >= 2, "scheduler.fairness must be at least 2")  # noqa: PLR2004 - 1 would be plain FIFO
        _require(self.affinity >= 0, "scheduler.affinity must be 0 or more")
        _require(self.pooled_affinity >= 0, "scheduler.pooled_affinity must be 0 or more")
        _require(self.over_issue >= 1, "scheduler.over_issue must be at least 1")


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How engines are called and watched. Times in seconds.

    `kv_fraction` of an engine's KV is ours to fill. `eject_after` failures in a row close an engine for `eject_s`,
    doubling up to `eject_max_s`. `silent_after` readings missed in a row mean that it is gone. `patience_s` without any
    usable engine end the run with exit code 4. `api_key_env` names the environment variable that holds the engines'
    API key. `kv_pool` False leaves a KV pool that the engines have unused. `stagger` is how far calls are relied on to
    end one after the other, in the order in which they began, when room is made for another: 0 is not at all.
    """

    max_in_flight: int = 1024
    kv_fraction: float = 1.0
    chunk_timeout_s: float = 600.0
    telemetry_s: float = 1.0
    probe_timeout_s: float = 10.0
    silent_after: int = 3
    eject_after: int = 3
    eject_s: float = 1.0
    eject_max_s: float = 30.0
    patience_s: float = 300.0
    api_key_env: str | None = None
    kv_pool: bool = True
    stagger: float = 0.8

    def __post_init__(self) -> None:
        _require(self.max_in_flight >= 1, "engine.max_in_flight must be at least 1")
        _require(0 < self.kv_fraction <= 1, "engine.kv_fraction must be above 0 and at most 1")
        _require(0 <= self.stagger <= 1, "engine.stagger must be from 0 to 1")
        for name in (
            "chunk_timeout_s",
            "telemetry_s",
            "probe_timeout_s",
            "eject_s",
            "eject_max_s",
            "patience_s",
        ):
            _require(getattr(self, name) > 0, f"engine.{name} must be above 0 seconds")
        _require(self.eject_after >= 1, "engine.eject_after must be at least 1")
        _require(self.silent_after >= 1, "engine.silent_after must be at least 1")


class FleetConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The engines: URLs of running ones, or how to start local ones.

    `file` names running ones too: a fleet of `seer fleet up`, or a JSON file (a path with a slash, or ending in .json).
    `engines` local vLLM servers are started when neither is given; they share KV through `kv_pool`, of `kv_pool_gib`
    GiB with `kv_pool_disk_gib` GiB of disk behind it, and draft as `draft` says, at most `draft_tokens` at a time.
    `model` is a folder or hub name for local engines (the default is the small model that Seer fetches by itself);
    `tokenizer` names a folder with tokenizer.json where engines do not give theirs.
    """

    servers: list[str] = []
    file: str | None = None
    engines: int = 2
    model: str | None = None
    tokenizer: str | None = None
    dtype: str | None = None
    max_model_len: int | None = None
    kv_cache_gib: float | None = None
    kv_blocks: int | None = None
    kv_pool: str = "auto"
    kv_pool_gib: float = 4.0
    kv_pool_disk_gib: float = 0.0
    draft: str = "auto"
    draft_tokens: int = 8
    max_num_seqs: int | None = None
    vllm_args: list[str] = []

    def __post_init__(self) -> None:
        _require(
            not (self.servers and self.file),
            "fleet.servers (--server) and fleet.file (--fleet) both name engines: give one of them",
        )
        try:
            require_distinct(self.servers)
        except UsageError as error:
            raise ConfigError(f"fleet.servers (--server): {error}") from None
        _require(self.engines >= 1, "fleet.engines must be at least 1")
        _require(self.kv_pool in _POOLS, f"fleet.kv_pool must be one of {', '.join(_POOLS)}")
        _require(self.draft in _DRAFTS, f"fleet.draft must be one of {', '.join(_DRAFTS)}")
        _require(1 <= self.draft_tokens <= 64, "fleet.draft_tokens must be from 1 to 64")  # noqa: PLR2004 - more only costs
        _require(self.kv_pool_gib > 0, "fleet.kv_pool_gib must be above 0")
        _require(self.kv_pool_disk_gib >= 0, "fleet.kv_pool_disk_gib must be 0 (no disk) or more")


class ServeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`seer serve`. At most `max_requests` responses are open at once, those held in a pause included.

    Beyond, callers are told to come again.

    A streamed response is cut into chunks of `stream_chunk_size` tokens, which is how often its reader hears of it.
    API keys, several with commas between, are in the environment variable `api_key_env`, or one a line in
    `api_key_file`, which is read again when it changes. A body of at most `max_body_mib` must arrive within
    `body_timeout_s`, and not in a trickle. An idle connection is closed after `keep_alive_s`, one whose client takes
    nothing of what is written after `unread_s`. Told to stop, the server finishes what is open for at most
    `shutdown_s`.
    """

    host: str = "127.0.0.1"
    port: int = 8100
    api_key_env: str | None = None
    api_key_file: str | None = None
    max_requests: int = 65_536
    stream_chunk_size: int = 32
    max_body_mib: float = 64.0
    body_timeout_s: float = 60.0
    keep_alive_s: float = 10.0
    unread_s: float = 300.0
    shutdown_s: float = 30.0

    def __post_init__(self) -> None:
        _require(0 <= self.port <= 65_535, "serve.port must be from 0 (any free one) to 65535")  # noqa: PLR2004 - TCP
        _require(self.max_requests >= 1, "serve.max_requests must be at least 1")
        _require(self.stream_chunk_size >= 1, "serve.stream_chunk_size must be at least 1")
        for name in ("max_body_mib", "body_timeout_s", "keep_alive_s", "unread_s", "shutdown_s"):
            _require(getattr(self, name) > 0, f"serve.{name} must be above 0")


class JobsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Rollouts that `seer serve` runs as jobs.

    Finished samples are spooled to `folder` (without one, to seer/rollouts in the user's state folder). What has ended
    is kept for `keep_s` seconds, and for less when all spools together need more than `spool_gib`. At most `max_open`
    jobs run at once.
    """

    folder: str | None = None
    max_open: int = 32
    keep_s: float = 86_400.0
    spool_gib: float = 16.0

    def __post_init__(self) -> None:
        _require(self.max_open >= 1, "jobs.max_open must be at least 1")
        _require(self.keep_s >= 0, "jobs.keep_s must be 0 or more seconds")
        _require(self.spool_gib > 0, "jobs.spool_gib must be above 0")


class OutputConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is written into the run folder beside samples.jsonl and the journal."""

    trace: bool = True
    metrics_s: float = 1.0
    fsync_s: float = 5.0

    def __post_init__(self) -> None:
        _require(self.metrics_s > 0, "output.metrics_s must be above 0 seconds")
        _require(self.fsync_s >= 0, "output.fsync_s must be 0 (never) or more seconds")


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything, resolved."""

    rollout: RolloutConfig = RolloutConfig()
    sampling: Sampling = Sampling()
    scheduler: SchedulerConfig = SchedulerConfig()
    engine: EngineConfig = EngineConfig()
    fleet: FleetConfig = FleetConfig()
    output: OutputConfig = OutputConfig()
    serve: ServeConfig = ServeConfig()
    jobs: JobsConfig = JobsConfig()

    def __post_init__(self) -> None:
        _require(
            self.fleet.draft in {"auto", "none"} or not self.without_drafts,
            f'fleet.draft must be "none" or "auto" here: vLLM refuses {self.without_drafts} on an engine that drafts',
        )

    @property
    def without_drafts(self) -> str:
        """The sampling options that an engine cannot take when it drafts; empty if there are none."""
        names = {"min_p": self.sampling.min_p, "logit_bias": self.sampling.logit_bias}
        return " and ".join(f"sampling.{name}" for name, value in names.items() if value)


Tree = dict[str, Any]


def read_toml(path: Path) -> Tree:
    """Read a TOML config file.

    Raises:
        ConfigError: It is missing or is not TOML; names the file.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read config {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path} is not valid TOML: {error}") from error


def parse_setting(text: str) -> Tree:
    """One `a.b=value`; the value is TOML, or a bare string where it is not valid TOML."""
    path, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_][\w]*(\.[A-Za-z_][\w]*)+", path.strip()):
        raise ConfigError(f"--set {text!r} must look like section.key=value, for example --set engine.kv_fraction=0.9")
    try:
        leaf: Any = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        leaf = value
    for key in reversed(path.strip().split(".")):
        leaf = {key: leaf}
    return dict(leaf)


def merge(*trees: Tree) -> Tree:
    """Merge nested tables, later ones winning."""
    merged: Tree = {}
    for tree in trees:
        for key, value in tree.items():
            both = isinstance(value, dict) and isinstance(merged.get(key), dict)
            merged[key] = merge(merged[key], value) if both else value
    return merged


def resolve(*trees: Tree) -> Config:
    """The config that the merged trees describe.

    Raises:
        ConfigError: A key is unknown or a value is wrong; names the key's path.
    """
    tree = merge(*trees)
    for name in tree.get("sampling", {}):
        if name in REFUSED:
            raise ConfigError(f"sampling.{name} is not supported: {REFUSED[name]}")
    try:
        return msgspec.convert(tree, Config, str_keys=True)  # token ids are keys in logit_bias
    except msgspec.ValidationError as error:
        raise ConfigError(_explain(error)) from error


def _explain(error: msgspec.ValidationError) -> str:
    message, _, where = str(error).partition(" - at `$")
    section = where.rstrip("`").strip(".")
    if match := re.search(r"unknown field `(.+?)`", message):
        path = f"{section}.{match[1]}" if section else match[1]
        return f"unknown config key {path!r}; `seer rollout --dry-run --json` prints every key there is"
    return f"config key {section!r}: {message}"


def to_toml_tree(config: Config) -> Tree:
    """The resolved config as plain tables, for run.json and --dry-run."""
    tree = msgspec.to_builtins(config)
    assert isinstance(tree, dict)
    return tree
