"""The other way round: the problem that a called service answers with, as an exception again.

    problems = async_problem_hook(SoldOut, NotFound)
    client = httpx.AsyncClient(event_hooks={"response": [problems]})

The exception is of the class among those named that has the problem's code, and a `ServiceProblem` where none has. No
class is found by its code alone: another service's word must not become, say, this service's `ConfigurationError`,
which parks a run, or an error that swears that nothing has happened.

Nothing of the body is believed beyond its limits: its size, the types of its members, their length.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import Any, cast

import httpx

from mainstay.core import FieldError, MainstayError
from mainstay.observability.errors import MEDIA_TYPE, ServiceProblem

__all__ = ["async_problem_hook", "problem_hook"]

_BODY_BYTES = 65_536
_LONGEST_TEXT = 1_000
_LONGEST_NAME = 128
_MOST_ERRORS = 100
_DEEPEST = 32
_YEAR_SECONDS = 365 * 86_400
_CODE = re.compile(r"(?:AUTH|VAL|RES|SYS|EXT|RATE|BIZ)_[A-Z0-9][A-Z0-9_]{0,99}")
_ID = re.compile(r"[A-Za-z0-9._:@/+=-]{1,128}")
_SECONDS = re.compile(r"[0-9]{1,9}")
_RETRYABLE = frozenset(
    {
        HTTPStatus.REQUEST_TIMEOUT,
        HTTPStatus.TOO_EARLY,
        HTTPStatus.TOO_MANY_REQUESTS,
        HTTPStatus.BAD_GATEWAY,
        HTTPStatus.SERVICE_UNAVAILABLE,
        HTTPStatus.GATEWAY_TIMEOUT,
    }
)
_LAST_STATUS = 599


def problem_hook(*errors: type[MainstayError]) -> Callable[[httpx.Response], None]:
    """Make an event hook for the responses of an `httpx.Client`.

    It raises where a response is a problem (400 and above, `application/problem+json`), and lets every other pass.

    Args:
        errors: the classes that are raised for their codes. Each speaks for the other service then, with its
            `no_effect`, too.

    Raises:
        TypeError: a class takes parameters of its own, which a problem does not have, or two have the same code.
    """
    classes = _by_code(errors)

    def hook(response: httpx.Response) -> None:
        if _is_problem(response):
            raise _error(classes, response, _read(response))

    return hook


def async_problem_hook(*errors: type[MainstayError]) -> Callable[[httpx.Response], Awaitable[None]]:
    """Make an event hook for the responses of an `httpx.AsyncClient`; see `problem_hook`.

    Args:
        errors: the classes that are raised for their codes.

    Raises:
        TypeError: a class takes parameters of its own, which a problem does not have, or two have the same code.
    """
    classes = _by_code(errors)

    async def hook(response: httpx.Response) -> None:
        if _is_problem(response):
            raise _error(classes, response, await _aread(response))

    return hook


def _by_code(errors: tuple[type[MainstayError], ...]) -> dict[str, type[MainstayError]]:
    classes = dict[str, type[MainstayError]]()
    for each in errors:
        if each.__init__ is not MainstayError.__init__:
            msg = (
                f"{each.__name__} takes parameters of its own, which a problem does not have: name a class that takes "
                "what MainstayError takes, a base of it for example, or none for a ServiceProblem"
            )
            raise TypeError(msg)
        if classes.setdefault(each.code, each) is not each:
            msg = f"{each.__name__} and {classes[each.code].__name__} have the same code, {each.code}: name one of them"
            raise TypeError(msg)
    return classes


def _is_problem(response: httpx.Response) -> bool:
    kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    return response.status_code >= HTTPStatus.BAD_REQUEST and kind == MEDIA_TYPE


def _read(response: httpx.Response) -> bytes:
    data = bytearray()
    try:
        if response.is_stream_consumed:
            return response.content
        for chunk in response.iter_raw():
            data += chunk
            if len(data) > _BODY_BYTES:
                break
    except (httpx.HTTPError, httpx.StreamError):
        return b""  # the status has come, which says enough
    return _decoded(response, bytes(data))


async def _aread(response: httpx.Response) -> bytes:
    data = bytearray()
    try:
        if response.is_stream_consumed:
            return response.content
        async for chunk in response.aiter_raw():
            data += chunk
            if len(data) > _BODY_BYTES:
                break
    except (httpx.HTTPError, httpx.StreamError):
        return b""
    return _decoded(response, bytes(data))


def _decoded(response: httpx.Response, data: bytes) -> bytes:
    encoding = response.headers.get("content-encoding", "identity").strip().lower()
    if encoding == "identity":
        return data
    if encoding not in {"gzip", "deflate"}:
        return b""
    try:
        return zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(data, _BODY_BYTES + 1)  # either by its head
    except zlib.error:
        return b""


def _members(data: bytes) -> Mapping[str, object]:
    if len(data) > _BODY_BYTES:
        return {}
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return cast("dict[str, object]", found) if isinstance(found, dict) else {}


def _error(classes: Mapping[str, type[MainstayError]], response: httpx.Response, data: bytes) -> MainstayError:
    members = _members(data)
    code = _matching(_CODE, members.get("code"))
    title, detail = _text(members.get("title"), _LONGEST_NAME), _text(members.get("detail"), _LONGEST_TEXT)
    status, request = min(response.status_code, _LAST_STATUS), response.request
    seconds = _seconds(members.get("retry_after_seconds"), response)
    said = f"{request.method} {request.url.host} answered {status} {code or 'without a code'}"
    message = f"{said}: {detail}" if detail else said
    kind = classes.get(code)
    if kind is not None:
        error = kind(message, retry_after_seconds=seconds, public_message=detail or None)
    else:
        error = ServiceProblem(message, retryable=status in _RETRYABLE, retry_after_seconds=seconds)
        error.status, error.code, error.title = status, code or error.code, title or error.title
        error.detail = detail
        error.correlation_id = _matching(_ID, members.get("correlation_id")) or None
    error.errors = _errors(members.get("errors"))
    return error


def _matching(pattern: re.Pattern[str], value: object) -> str:
    return value if isinstance(value, str) and pattern.fullmatch(value) else ""


def _text(value: object, longest: int) -> str:
    """A text of another service on one line; it goes into logs, and to the callers of this one."""
    if not isinstance(value, str):
        return ""
    return "".join(each if each.isprintable() else " " for each in value[:longest]).strip()


def _seconds(value: object, response: httpx.Response) -> float | None:
    header = response.headers.get("retry-after", "").strip()
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        value = float(header) if _SECONDS.fullmatch(header) else None
    return None if value is None else float(min(value, _YEAR_SECONDS))


def _errors(value: object) -> tuple[FieldError, ...]:
    found = list[FieldError]()
    for each in cast("list[object]", value)[:_MOST_ERRORS] if isinstance(value, list) else ():
        if isinstance(each, dict):
            told = cast("dict[str, Any]", each)
            location = told.get("location")
            if isinstance(location, list):
                parts = cast("list[object]", location)[:_DEEPEST]
                place = tuple(
                    part if isinstance(part, int) else _text(part, _LONGEST_NAME)
                    for part in parts
                    if isinstance(part, int | str)
                )
                message, kind = _text(told.get("message"), _LONGEST_TEXT), _text(told.get("type"), _LONGEST_NAME)
                found.append(FieldError(place, message, kind))
    return tuple(found)
