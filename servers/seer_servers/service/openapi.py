"""The OpenAPI 3.1 document, from the routes of the parts and the types of their bodies."""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import msgspec

from seer_async import __version__

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from seer_servers.service.part import Route

_REF = "#/components/schemas/{name}"
_PARAMETER = re.compile(r"\{(\w+)(?::[^{}]*)?\}")


class ErrorDetail(msgspec.Struct):
    """What is wrong; `param` names the field."""

    message: str
    type: str
    param: str | None
    code: int


class ErrorBody(msgspec.Struct):
    """Every error has this body."""

    error: ErrorDetail | str


def document(routes: Sequence[Route]) -> dict[str, Any]:
    """The document for these routes."""
    types = [kind for route in routes for kind in (route.body, route.reply) if kind is not None]
    schemas, components = msgspec.json.schema_components([*types, ErrorBody], ref_template=_REF)
    found = iter(schemas)
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        body = next(found) if route.body is not None else None
        reply = next(found) if route.reply is not None else {}
        paths.setdefault(plain_path(route.path), {})[route.method.lower()] = _operation(route, body, reply)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Seer",
            "version": __version__,
            "description": "A fleet of vLLM servers behind one address. Fields that are not listed go to an engine as "
            "they are.",
        },
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def plain_path(path: str) -> str:
    """A route's path without the patterns of its parameters."""
    return _PARAMETER.sub(r"{\1}", path)


def _operation(route: Route, body: dict[str, Any] | None, reply: dict[str, Any]) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "summary": route.summary,
        "operationId": re.sub(r"\W+", "_", f"{route.method.lower()}{plain_path(route.path)}").strip("_"),
        "parameters": [*_path_parameters(route.path), *_query_parameters(route.query)],
        "responses": _responses(reply, asks=body is not None),
        "security": [] if route.open else [{"key": []}],
    }
    if body is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    return operation


def _path_parameters(path: str) -> Iterable[dict[str, Any]]:
    for name in _PARAMETER.findall(path):
        yield {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}


def _query_parameters(query: dict[str, Any]) -> Iterable[dict[str, Any]]:
    for name, kind in query.items():
        yield {"name": name, "in": "query", "required": False, "schema": msgspec.json.schema(kind)}


def _responses(reply: dict[str, Any], *, asks: bool) -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": _REF.format(name="ErrorBody")}}}
    fine: dict[str, Any] = {"description": HTTPStatus.OK.phrase}
    if reply:
        fine["content"] = {"application/json": {"schema": reply}}
        fine["content"] |= {"text/event-stream": {"schema": {"type": "string"}}} if asks else {}
    return {
        "200": fine,
        "4XX": {"description": "The request is wrong, or comes too early: Retry-After says when", "content": error},
        "5XX": {"description": "No engine could do it", "content": error},
    }
