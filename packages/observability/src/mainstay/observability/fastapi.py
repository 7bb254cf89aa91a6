"""One line for a FastAPI application: `instrument(api, app)`.

FastAPI's own answer to an invalid request repeats what was sent, a password beside the wrong field included, even
where the model says `SecretStr`. Here an error says where and why, never what.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.utils import is_body_allowed_for_status_code
from starlette.exceptions import HTTPException

from mainstay.core import App, ConfigurationError, MainstayError, current
from mainstay.observability.asgi import ObservabilityMiddleware
from mainstay.observability.errors import error_body, retry_after

__all__ = ["instrument"]

_CODES = {
    400: "VAL_REQUEST",
    401: "AUTH_REQUIRED",
    403: "AUTH_FORBIDDEN",
    404: "RES_NOT_FOUND",
    405: "VAL_METHOD",
    409: "RES_CONFLICT",
    410: "RES_GONE",
    413: "VAL_TOO_LARGE",
    415: "VAL_MEDIA_TYPE",
    422: "VAL_REQUEST",
    429: "RATE_LIMITED",
    502: "EXT_FAILED",
    503: "SYS_UNAVAILABLE",
    504: "EXT_DEADLINE",
}
_FIRST_SERVER_ERROR = _UNHANDLED = 500
# Messages that pydantic builds from the value itself.
_TELLING = {
    "union_tag_invalid": "The tag names none of the expected kinds",
    "uuid_parsing": "Input should be a valid UUID",
    "json_invalid": "Input should be valid JSON",
}


def instrument(api: FastAPI, app: App | None = None, *, trusted: bool = False) -> None:
    """Give `api` context, metrics, probes and error bodies.

    Call it last, after every other `add_middleware` (the last is outermost) and `exception_handler`.

    Args:
        api: the application.
        app: the Mainstay App whose probes it serves; None serves none.
        trusted: whether callers may name actor and tenant in headers; see `ObservabilityMiddleware`.

    Raises:
        ConfigurationError: the application has a handler for every Exception, which would never be called.
    """
    if Exception in api.exception_handlers or _UNHANDLED in api.exception_handlers:
        msg = (
            "instrument(api) answers unhandled errors itself, with their correlation id, so the exception handler of "
            "this api for Exception or 500 would never be called: remove it, or register it for the errors it means"
        )
        raise ConfigurationError(msg)
    api.add_middleware(ObservabilityMiddleware, app=app, trusted=trusted)
    api.add_exception_handler(MainstayError, _domain_error)
    api.add_exception_handler(RequestValidationError, _invalid_request)
    api.add_exception_handler(HTTPException, _http_error)


async def _domain_error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, MainstayError)  # noqa: S101  registered for this class only
    body = error_body(error.code, error.public_message, current().correlation_id)
    return JSONResponse(body, error.status, headers=retry_after(error))


async def _invalid_request(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)  # noqa: S101  registered for this class only
    fields = [
        {
            "location": [part if isinstance(part, int) else str(part)[:128] for part in problem["loc"]],
            "message": _TELLING.get(problem["type"], problem["msg"]),
            "type": problem["type"],
        }
        for problem in cast("list[dict[str, Any]]", error.errors())
    ]
    return JSONResponse(
        error_body("VAL_REQUEST", "The request is not valid.", current().correlation_id, fields=fields), 422
    )


async def _http_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101  registered for this class only
    if not is_body_allowed_for_status_code(error.status_code):
        return Response(status_code=error.status_code, headers=dict(error.headers or {}))
    server = error.status_code >= _FIRST_SERVER_ERROR
    code = _CODES.get(error.status_code, "SYS_INTERNAL" if server else "VAL_REQUEST")
    detail = cast("object", error.detail)  # said to be text, but FastAPI's subclass takes anything
    message = detail if isinstance(detail, str) else MainstayError.public_message
    headers: Mapping[str, str] | None = error.headers
    return JSONResponse(
        error_body(code, message, current().correlation_id), error.status_code, headers=dict(headers or {})
    )
