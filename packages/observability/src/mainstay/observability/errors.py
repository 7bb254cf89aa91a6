"""Errors as a caller outside sees them: one problem (RFC 9457) for each error, whichever framework answers it.

MainstayError
└── ServiceProblem      EXT_SERVICE     a service that was called answered with a problem (see `problems`)
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import singledispatch
from typing import Any, cast
from urllib.parse import quote

from mainstay.core import (
    Conflict,
    DeadlineExceeded,
    FieldError,
    Forbidden,
    InvalidRequest,
    MainstayError,
    NotFound,
    TooManyRequests,
    Unauthenticated,
    Unavailable,
    current,
)

__all__ = ["MEDIA_TYPE", "Problem", "ServiceProblem", "problem_of"]

MEDIA_TYPE = "application/problem+json"
_YEAR_SECONDS = 365 * 86_400
_ERRORS = range(400, 600)  # statuses that say one


class ServiceProblem(MainstayError):
    """A service that was called answered with a problem that the caller has no class for.

    Where nothing handles it, it is told as a failure of that service: its own callers did not cause it.

    Attributes:
        code, status, title: as the other service has answered.
        detail: its text for people; empty without one.
        correlation_id: its own; None without one.
    """

    code = "EXT_SERVICE"
    status = 502
    title = "Called service failed"
    public_message = "A service that is needed for this could not do its part."
    detail: str = ""
    correlation_id: str | None = None


def _kind(error: type[MainstayError]) -> tuple[str, str]:
    return error.code, error.title


BY_STATUS: dict[int, tuple[str, str]] = {
    400: _kind(InvalidRequest),
    401: _kind(Unauthenticated),
    403: _kind(Forbidden),
    404: _kind(NotFound),
    405: ("VAL_METHOD", "Method not allowed"),
    406: ("VAL_ACCEPT", "Not acceptable"),
    409: _kind(Conflict),
    410: ("RES_GONE", "Gone"),
    413: ("VAL_TOO_LARGE", "Too large"),
    415: ("VAL_MEDIA_TYPE", "Unsupported media type"),
    422: _kind(InvalidRequest),
    429: _kind(TooManyRequests),
    502: _kind(ServiceProblem),
    503: _kind(Unavailable),
    504: _kind(DeadlineExceeded),
}
"""Code and title of what frameworks say with a status alone; any other is an invalid request or an internal error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What is told of an error to a caller outside (RFC 9457); nothing in it repeats what the caller sent.

    Attributes:
        code: stable identifier of the kind of problem.
        status: of HTTP.
        title: the kind in a few words.
        detail: this problem in a sentence, for people.
        correlation_id: of the request; None where there is none.
        retry_after_seconds: how long to wait before another attempt; None where it is not known.
        errors: what is wrong with the request, and where.
        details: more for programs, from `HTTPException(detail={…})`; what JSON has.
        headers: of the answer, besides its type, its length and a `Retry-After` in seconds.
    """

    code: str
    status: int
    title: str
    detail: str
    correlation_id: str | None = None
    retry_after_seconds: float | None = None
    errors: tuple[FieldError, ...] = ()
    details: object = None
    headers: tuple[tuple[str, str], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The members of the body; those without a value are left out, except the correlation id."""
        members: dict[str, Any] = {
            "type": f"urn:problem-type:{self.code}",
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
        }
        if self.correlation_id is not None:
            members["instance"] = f"urn:correlation:{quote(self.correlation_id, safe='')}"
        members |= {"code": self.code, "correlation_id": self.correlation_id}
        if self.retry_after_seconds is not None:
            members["retry_after_seconds"] = self.retry_after_seconds
        if self.errors:
            members["errors"] = [
                {"location": list(each.location), "message": each.message, "type": each.type} for each in self.errors
            ]
        if self.details is not None:
            members["details"] = self.details
        return members

    def body(self) -> bytes:
        """The body, as JSON."""
        return json.dumps(self.to_dict()).encode()

    def all_headers(self, body: bytes) -> list[tuple[bytes, bytes]]:
        """The headers of an answer with this body, as ASGI has them.

        `Retry-After` is in whole seconds, rounded up.
        """
        found = [("content-type", MEDIA_TYPE), ("content-length", str(len(body)))]
        if self.retry_after_seconds is not None:
            found.append(("retry-after", str(math.ceil(self.retry_after_seconds))))
        return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in (*found, *self.headers)]


def problem_of(error: BaseException) -> Problem:
    """The problem that a caller outside is told about `error`, with the correlation id of the current context.

    A `MainstayError` says its own kind. A group of errors is the problem of those in it where all of them are of one
    kind. Anything else is an internal error, of which nothing is told. With the extra `fastapi`, FastAPI's and
    Starlette's own exceptions have their problems, too, once `mainstay.observability.fastapi` is imported.

    It never raises: an error that cannot speak of itself is an internal one.
    """
    try:
        return problem_by_class(error)
    except Exception:  # noqa: BLE001  an error is code of others, and may fail in any way when it is asked
        return problem_of_kind(MainstayError)


@singledispatch
def problem_by_class(_error: BaseException) -> Problem:
    """What `problem_of` finds by the class of an error; files that know more classes register them here."""
    return problem_of_kind(MainstayError)


def problem_of_kind(
    kind: type[MainstayError] | MainstayError,
    detail: str | None = None,
    *,
    status: int | None = None,
    retry_after_seconds: float | None = None,
    errors: tuple[FieldError, ...] = (),
) -> Problem:
    """The problem of a kind of error; its public message is the detail where none is passed."""
    return Problem(
        code=kind.code,
        status=int(kind.status if status is None else status),
        title=kind.title,
        detail=kind.public_message if detail is None else detail,
        correlation_id=current().correlation_id,
        retry_after_seconds=_sensible(retry_after_seconds),
        errors=errors,
    )


@problem_by_class.register
def _domain_error(error: MainstayError) -> Problem:
    # Their classes were checked, but one object may have been given anything.
    texts = cast("tuple[object, ...]", (error.code, error.title, error.public_message))
    if error.status not in _ERRORS or not all(isinstance(each, str) for each in texts):
        return problem_of_kind(MainstayError)
    return problem_of_kind(error, retry_after_seconds=error.retry_after_seconds, errors=error.errors)


@problem_by_class.register
def _problem_of_a_service(error: ServiceProblem) -> Problem:
    # A callee that is busy or late makes this service so; for everything else that it may say of its caller, its caller
    # is this service.
    status = {429: 503, 503: 503, 504: 504}.get(error.status, ServiceProblem.status)
    return problem_of_kind(ServiceProblem, status=status, retry_after_seconds=error.retry_after_seconds)


@problem_by_class.register(BaseExceptionGroup)
def _group(error: BaseExceptionGroup[BaseException]) -> Problem:
    found = [problem_of(each) for each in leaves(error)]
    if len({(each.code, each.status) for each in found}) != 1:
        return problem_of_kind(MainstayError)
    return max(found, key=lambda each: each.retry_after_seconds or 0.0)


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The errors in a group and in the groups in it, however deep; of what is no group, itself."""
    left = [error]
    while left:
        each = left.pop()
        if isinstance(each, BaseExceptionGroup):
            left.extend(reversed(cast("BaseExceptionGroup[BaseException]", each).exceptions))
        else:
            yield each


def _sensible(seconds: float | None) -> float | None:
    """How long to wait, as far as a program may wait so long."""
    if seconds is None or not math.isfinite(seconds):
        return None
    return min(max(0.0, seconds), _YEAR_SECONDS)
