"""From a request to tickets and back: what the routes that generate have in common.

Invariant: however a handler ends (answered, refused, hung up on), no response of its request is open afterwards.
"""

from __future__ import annotations

import contextlib
import re
import uuid
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from seer_async.core import NO_ENGINE
from seer_async.tickets import Work
from seer_servers.service.errors import ApiError, bad_request
from seer_servers.service.params import asked, refuse

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from aiohttp import web

    from seer_async.service import Service
    from seer_async.tickets import Ticket
    from seer_async.types import Sample
    from seer_servers.service.relay import Relay

_GROUP, _GROUP_SIZE, _REQUEST_ID = "X-Seer-Group", "X-Seer-Group-Size", "X-Request-Id"
_KIND = re.compile(r"^(chatcmpl|cmpl|generate-tokens)-")  # before a client's own name in an answer's id
_NAME_END = 256
_REJECTED = re.compile(r"rejected: /\S+ answered (\d+): (.*)", re.DOTALL)
_RETRY_S = 5.0
_MAX_TOKENS = 16  # of vLLM's SamplingParams

REQUEST_HEADERS: dict[str, Any] = {
    _GROUP: Annotated[str, msgspec.Meta(max_length=_NAME_END)],
    _GROUP_SIZE: Annotated[int, msgspec.Meta(ge=1)],
    _REQUEST_ID: str,
}
"""Those that routes which generate look at."""


class Rendered(msgspec.Struct):
    """A prompt as an engine renders it: token ids, and every sampling parameter resolved.

    Engines leave out what is vLLM's default, which for `max_tokens` is not ours. None is all that the context has.
    """

    token_ids: list[int]
    sampling_params: dict[str, Any]
    cache_salt: str | None = None
    features: Any = None

    def __post_init__(self) -> None:
        """Say the default."""
        self.sampling_params.setdefault("max_tokens", _MAX_TOKENS)


class Intake:
    """Takes in requests for a service."""

    def __init__(self, service: Service, relay: Relay) -> None:
        self.service = service
        self.relay = relay
        self._open: dict[int, tuple[str, list[Ticket]]] = {}  # what requests are called, and what they wait for

    def model_of(self, work: Work) -> str:
        """What answers call the model."""
        return work.options.model or self.service.info.model

    def work(self, rendered: Rendered, request: web.Request, *, adapter: str, stream: bool) -> Work:
        """One prompt's group, sampled with `adapter`, or the model itself."""
        refuse({"features": rendered.features})
        what = asked(
            rendered.sampling_params,
            self.service.config,
            room=self.service.info.max_model_len - len(rendered.token_ids),
            model=adapter,
            salt=rendered.cache_salt or "",
            stream=stream,
            capabilities=self._capabilities(),
        )
        return Work(
            prompt_token_ids=rendered.token_ids,
            n=what.n,
            options=what.options,
            seeds=what.seeds,
            group=group_name(request),
        )

    def _capabilities(self) -> frozenset[str]:
        """What every engine that is up can do."""
        ups = [instance.info for instance in self.service.core.instances.values() if instance.up and instance.info]
        return frozenset.intersection(*(info.capabilities for info in ups)) if ups else self.service.info.capabilities

    async def abort(self, names: Sequence[str], grace_s: float) -> int:
        """End requests by the names that clients know, or responses by the service's; returns how many responses ended.

        A request is called as its answer's id, as what that was made from (its X-Request-Id or `request_id`), or as
        that id with the number of a prompt behind it, which means this one alone.
        """
        wanted = set(names)
        found = [
            response
            for name, tickets in self._open.values()
            for number, ticket in enumerate(tickets)
            if not wanted.isdisjoint((name, _KIND.sub("", name), f"{name}-{number}"))
            for response in ticket.requests
        ]
        return await self.service.abort([*found, *names], grace_s)

    @contextlib.contextmanager
    def submitted(self, works: Sequence[Work], name: str) -> Iterator[list[Ticket]]:
        """Tickets for `works`, all or none; what is still open at the end of the block is given up.

        `name` is the id of the answer that they are for.
        """
        most = self.service.config.serve.max_requests
        if sum(work.n for work in works) > most:
            raise bad_request(f"a request may ask for at most {most} responses (serve.max_requests).", "n")
        tickets: list[Ticket] = []
        self._open[id(tickets)] = name, tickets
        try:
            for work in works:
                tickets.append(self.service.submit(work))  # noqa: PERF401 - those before a refusal must be known
            yield tickets
        finally:
            del self._open[id(tickets)]
            for ticket in tickets:
                if not ticket.done:
                    self.service.cancel(ticket)

    async def samples(self, works: Sequence[Work], name: str) -> list[list[Sample]]:
        """The samples of each of `works`, in order.

        Raises:
            ApiError: One of them failed.
        """
        with self.submitted(works, name) as tickets:
            return [[whole(sample) for sample in await ticket.all()] for ticket in tickets]


def whole(sample: Sample) -> Sample:
    """The sample, or the ApiError that it failed with."""
    if not sample.error:
        return sample
    if match := _REJECTED.match(sample.error):
        raise unknown_model(match[2]) if match[1] == "404" else bad_request(match[2])
    if sample.error.startswith("too long"):
        raise bad_request(sample.error)
    if sample.error.startswith((NO_ENGINE, "the service has ended")):
        raise ApiError(503, sample.error, retry_after=_RETRY_S)
    raise ApiError(500, sample.error)


def adapter_named(name: str | None, service: Service) -> str:
    """The LoRA adapter that a request's model names, empty if that is the model itself.

    Raises:
        ApiError: 404, as vLLM says it: neither is called that.
    """
    names = (service.info.model, *service.info.aliases)
    if not name or name in names:
        return ""
    if name not in service.adapters:
        raise unknown_model(f"The model `{name}` does not exist. Valid aliases: {', '.join(names)}.")
    return name


def unknown_model(message: str) -> ApiError:
    """There is no such model; if a request was under way, its adapter has been unloaded."""
    return ApiError(404, message, param="model")


def group_name(request: web.Request) -> str:
    """The group that the client says its request belongs to; empty if it does not."""
    name = request.headers.get(_GROUP, "")
    size = request.headers.get(_GROUP_SIZE, "1")
    if len(name) > _NAME_END or not name.isascii():
        raise bad_request(f"{_GROUP} must have at most {_NAME_END} characters, all of them ASCII.", _GROUP)
    if not size.isascii() or not size.isdigit() or int(size[:9]) < 1:
        raise bad_request(f"{_GROUP_SIZE} must be the number of responses in the group.", _GROUP_SIZE)
    return name


def request_id(request: web.Request, given: str | None) -> str:
    """A header names the request before its body does, as in vLLM."""
    name = request.headers.get(_REQUEST_ID, "")
    if not name.isascii():
        raise bad_request(f"{_REQUEST_ID} must be ASCII.", _REQUEST_ID)
    return name or given or uuid.uuid4().hex
