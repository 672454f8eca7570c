"""The OpenAPI 3.1 document, from the routes of the parts and the types of their bodies."""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import msgspec

from seer_async import __version__
from seer_servers.service.part import EVENTS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from seer_servers.service.part import Route

_REF = "#/components/schemas/{name}"
_JSON = "application/json"
_LINE, _EVENT = "One of these on each line", "One of these as the data of each event"
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
    schemas = _Schemas([ErrorBody, *(kind for route in routes for kind in _types(route))])
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(plain_path(route.path), {})[route.method.lower()] = _operation(route, schemas)
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
            "schemas": schemas.components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def plain_path(path: str) -> str:
    """A route's path without the patterns of its parameters."""
    return _PARAMETER.sub(r"{\1}", path)


class _Schemas:
    """The schemas of types; those of structs are components, which others refer to."""

    def __init__(self, types: Sequence[Any]) -> None:
        found, self.components = msgspec.json.schema_components(types, ref_template=_REF)
        self._of = list(zip(types, found, strict=True))

    def of(self, kind: Any) -> dict[str, Any]:
        return next(schema for known, schema in self._of if known is kind)

    def piece(self, kinds: Sequence[Any], what: str) -> dict[str, Any]:
        """The schema of one piece of a stream."""
        return {"description": what, "anyOf": [self.of(kind) for kind in kinds]}


def _types(route: Route) -> Iterator[Any]:
    yield from (kind for kind in (route.body, route.reply) if kind is not None)
    yield from (kind for kinds in route.streams.values() for kind in kinds)
    yield from route.lines.values()


def _operation(route: Route, schemas: _Schemas) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "summary": route.summary,
        "operationId": re.sub(r"\W+", "_", f"{route.method.lower()}{plain_path(route.path)}").strip("_"),
        "parameters": [*_path_parameters(route.path), *_given("query", route.query), *_given("header", route.headers)],
        "responses": _responses(route, schemas),
        "security": [] if route.open else [{"key": []}],
    }
    if route.body is not None:
        content = {_JSON: {"schema": schemas.of(route.body)}}
        content |= {media: {"schema": schemas.piece((kind,), _LINE)} for media, kind in route.lines.items()}
        operation["requestBody"] = {"required": True, "content": content}
    return operation


def _path_parameters(path: str) -> Iterator[dict[str, Any]]:
    for name in _PARAMETER.findall(path):
        yield {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}


def _given(place: str, names: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for name, kind in names.items():
        yield {"name": name, "in": place, "required": False, "schema": msgspec.json.schema(kind)}


def _responses(route: Route, schemas: _Schemas) -> dict[str, Any]:
    error = {_JSON: {"schema": schemas.of(ErrorBody)}}
    answers: dict[str, Any] = {}
    if route.reply is not None or not route.streams:
        answers[str(route.status)] = _answer(route.status, {} if route.reply is None else {_JSON: route.reply}, schemas)
    for media, kinds in route.streams.items():
        answer = answers.setdefault("200", {"description": HTTPStatus.OK.phrase, "content": {}})
        what = _EVENT if media == EVENTS else _LINE
        answer["content"][media] = {"schema": schemas.piece(kinds, what)}
    return answers | {
        "4XX": {"description": "The request is wrong, or comes too early: Retry-After says when", "content": error},
        "5XX": {"description": "No engine could do it", "content": error},
    }


def _answer(status: int, kinds: dict[str, Any], schemas: _Schemas) -> dict[str, Any]:
    answer: dict[str, Any] = {"description": HTTPStatus(status).phrase}
    if kinds:
        answer["content"] = {media: {"schema": schemas.of(kind)} for media, kind in kinds.items()}
    return answer
