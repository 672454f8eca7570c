"""What a client is told of an error that a handler did not expect."""

from __future__ import annotations

import logging

import msgspec
from aiohttp import web

from seer_async.errors import BusyError, RefusedError, SeerError
from seer_servers.service.errors import ApiError, bad_request

_LOG = logging.getLogger(__name__)


def explained(error: Exception) -> ApiError:
    """The error in vLLM's form. A defect goes to the log, and only that it happened to the client."""
    match error:
        case ApiError():
            return error
        case BusyError():
            return ApiError(429, str(error), retry_after=error.retry_after)
        case RefusedError() | msgspec.DecodeError() | UnicodeDecodeError() | RecursionError():
            return bad_request(str(error))
        case SeerError():
            return ApiError(503, str(error))
        case web.HTTPException():
            return ApiError(error.status, error.reason)
    _LOG.error("a request failed", exc_info=error)
    return ApiError(500, "an error in the service; its log says more")
