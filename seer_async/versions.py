"""Which weights responses are sampled from: versions of the model's, and which LoRA adapter of a name.

Invariants: a response's tokens are of one version, unless it is marked; a core that lasts sends nothing to an engine
that has another version than `current`.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from seer_async.buffer import RequestBuffer
    from seer_async.calls import Call
    from seer_async.instance import Instance
    from seer_async.options import GroupOptions
    from seer_async.request import Request
    from seer_async.types import ChunkReply


class Versions:
    """`current` is the latest version heard of, from an engine that runs or by order."""

    def __init__(self, buffer: RequestBuffer, *, lasting: bool) -> None:
        self.current: str | None = None
        self._buffer = buffer
        self._lasting = lasting
        self._adapters = Counter[str]()  # how often each LoRA adapter was replaced

    @property
    def required(self) -> str | None:
        """The one version that may be sampled from; None if any may."""
        return self.current if self._lasting else None

    def set(self, version: str) -> None:
        """Sample from these weights from now on."""
        self.current = version
        self._buffer.unpark()

    def changed(self, instance: Instance, version: str) -> None:
        """An engine has got other weights."""
        instance.version = version
        self.set(version)

    def of_reply(self, call: Call, reply: ChunkReply) -> tuple[str, bool]:
        """The version of the reply's last token, and whether the response now mixes versions."""
        versions = [span.version for span in reply.versions if span.end > span.start]
        if not versions:
            versions = [call.weight_version, reply.version_after or call.instance.version]
        last = versions[-1]
        if last != call.weight_version == call.instance.version:  # the reply knows before the telemetry does
            self.changed(call.instance, last)
        before = call.request.version or versions[0]
        return last, any(version != before for version in versions)

    def fit(self, request: Request, instance: Instance) -> bool:
        """Whether the engine may go on with what the request has generated."""
        return (
            request.version is None
            or request.version == instance.version
            or request.group.options.mixed_versions == "mark"
        )

    def outdated(self, request: Request, ups: Sequence[Instance]) -> bool:
        """Whether what the request has generated can never be continued: its weights are gone."""
        if request.version is None or request.group.options.mixed_versions == "mark":
            return False
        if self._lasting:
            return request.version != self.current
        return not any(self.fit(request, instance) for instance in ups)

    def replace_adapter(self, model: str) -> None:
        """What is sampled with this adapter from now on has nothing to do with what was before."""
        self._adapters[model] += 1

    def lineage(self, options: GroupOptions) -> str:
        """The adapter and which one of its name, if there is one."""
        return f"@{options.model}#{self._adapters[options.model]}" if options.model else ""

    def salt(self, options: GroupOptions) -> str:
        """What keeps KV apart beside run and version: the adapter, and the client's salt."""
        return self.lineage(options) + (f"/{options.salt}" if options.salt else "")
