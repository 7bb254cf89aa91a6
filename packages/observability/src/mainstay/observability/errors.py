"""Errors as a caller over HTTP sees them: which status a code means, and the one body that every error has.

The tree of this package hangs on `MainstayError`; logging, metrics and health raise nothing of their own.
"""

from __future__ import annotations

import math
from typing import Any

from mainstay.core import MainstayError

__all__ = ["error_body", "retry_after", "status_of"]

# By family first; a word in the rest of the code makes it more exact.
_FAMILY = {"AUTH": 401, "VAL": 422, "RES": 404, "SYS": 500, "EXT": 502, "RATE": 429, "BIZ": 409}
_WORDS = (
    ("AUTH", ("FORBIDDEN", "DENIED", "PERMISSION"), 403),
    ("RES", ("CONFLICT", "EXISTS"), 409),
    ("RES", ("GONE",), 410),
    ("SYS", ("NOT_BOUND", "UNAVAILABLE", "OVERLOADED"), 503),
    ("EXT", ("DEADLINE", "TIMEOUT"), 504),
    ("EXT", ("UNAVAILABLE", "REJECTED", "OPEN", "FULL", "OVERLOADED"), 503),
)


def status_of(error: MainstayError) -> int:
    """The HTTP status for an error, by the family of its code.

    AUTH 401 (403 when forbidden), VAL 422, RES 404 (409 on a conflict), SYS 500, EXT 502 (504 when time ran out, 503
    when it was not even tried), RATE 429, BIZ 409.
    """
    family, _, rest = error.code.partition("_")
    for known, words, status in _WORDS:
        if known == family and any(word in rest for word in words):
            return status
    if family == "EXT" and error.no_effect and error.retry_after_seconds is not None:
        return 503
    return _FAMILY[family]


def error_body(code: str, message: str, correlation_id: str | None, **more: Any) -> dict[str, Any]:
    """`{"error": {"code", "message", "correlation_id", …}}`."""
    return {"error": {"code": code, "message": message, "correlation_id": correlation_id, **more}}


def retry_after(error: MainstayError) -> dict[str, str]:
    """The `Retry-After` header of an error that knows when to come back, in whole seconds, rounded up."""
    seconds = error.retry_after_seconds
    return {} if seconds is None or not math.isfinite(seconds) else {"retry-after": str(max(0, math.ceil(seconds)))}
