"""What a client asks for when it begins a rollout: a JSON object, or a dataset with the options in the query."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

import msgspec

from seer_async.api import RolloutOptions
from seer_async.dataset import numbered, parse_lines
from seer_async.errors import ConfigError, DatasetError
from seer_async.options import GroupOptions
from seer_async.sampling import REFUSED, Sampling
from seer_async.types import Prompt
from seer_servers.service.errors import bad_request
from seer_servers.service.intake import adapter_named
from seer_servers.service.part import NDJSON

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from aiohttp import web

    from seer_async.service import Service

_SEED_BITS = 62


class _Body(RolloutOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    prompts: list[msgspec.Raw]


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """A rollout's prompts, not tokenised yet, and its options, all resolved."""

    prompts: list[Prompt]
    n: int
    options: GroupOptions
    seed: int
    stream: bool


def asked(request: web.Request, body: bytes, service: Service) -> Asked:
    """Read a request.

    Raises:
        ApiError: It is wrong; names the line or field.
    """
    try:
        prompts, options = _parse(request, body)
        sampling = _sampling(options.sampling, service)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, DatasetError, ConfigError) as error:
        raise bad_request(str(error)) from error
    rollout = service.config.rollout
    n = rollout.n if options.n is None else options.n
    chunk_size = rollout.chunk_size if options.chunk_size is None else options.chunk_size
    if not 1 <= n <= service.config.serve.max_requests:
        raise bad_request(f"n must be from 1 to {service.config.serve.max_requests} (serve.max_requests)", "n")
    if chunk_size < 0:
        raise bad_request("chunk_size must be 0 (undivided) or the tokens in a chunk", "chunk_size")
    if chunk_size and (missing := sampling.required_capabilities - _capabilities(service)):
        raise bad_request(f"these options need engines with {', '.join(missing)}, or chunk_size 0", "sampling")
    return Asked(
        prompts=prompts,
        n=n,
        options=GroupOptions(
            sampling=msgspec.structs.replace(sampling, seed=None),
            chunk_size=chunk_size,
            mixed_versions=rollout.mixed_versions,
            model=adapter_named(options.model, service),
        ),
        seed=secrets.randbits(_SEED_BITS) if sampling.seed is None else sampling.seed,
        stream=options.stream,
    )


def _parse(request: web.Request, body: bytes) -> tuple[list[Prompt], RolloutOptions]:
    if request.content_type == NDJSON:
        return parse_lines("dataset", numbered(body.splitlines())), _from_query(request.query)
    given = msgspec.json.decode(body, type=_Body)
    return parse_lines("prompts", _elements(given.prompts)), given


def _elements(prompts: list[msgspec.Raw]) -> Iterator[tuple[int, bytes]]:
    """A JSON array as lines of a dataset."""
    return ((number, bytes(prompt)) for number, prompt in enumerate(prompts, 1))


def _from_query(query: Mapping[str, str]) -> RolloutOptions:
    """Options as query parameters; `sampling` is a JSON object."""
    fields: dict[str, Any] = dict(query)
    if "sampling" in fields:
        fields["sampling"] = msgspec.json.decode(fields["sampling"], type=dict[str, Any])
    return msgspec.convert(fields, RolloutOptions, strict=False)


def _sampling(given: dict[str, Any], service: Service) -> Sampling:
    for name in given:
        if name in REFUSED:
            raise ConfigError(f"sampling.{name} is not supported: {REFUSED[name]}")
    base = msgspec.to_builtins(service.config.sampling)
    return msgspec.convert(base | given, Sampling, str_keys=True)  # token ids are keys in logit_bias


def _capabilities(service: Service) -> frozenset[str]:
    """What every engine that is up can do."""
    ups = [instance.info for instance in service.core.instances.values() if instance.up and instance.info]
    return frozenset.intersection(*(info.capabilities for info in ups)) if ups else service.info.capabilities
