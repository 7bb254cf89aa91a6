"""Errors as a caller over HTTP sees them: the one body that every error has.

The tree of this package hangs on `MainstayError`; logging, metrics and health raise nothing of their own.
"""

from __future__ import annotations

import math
from typing import Any

from mainstay.core import MainstayError

__all__ = ["error_body", "retry_after"]


def error_body(code: str, message: str, correlation_id: str | None, **more: Any) -> dict[str, Any]:
    """`{"error": {"code", "message", "correlation_id", …}}`."""
    return {"error": {"code": code, "message": message, "correlation_id": correlation_id, **more}}


def retry_after(error: MainstayError) -> dict[str, str]:
    """The `Retry-After` header of an error that knows when to come back, in whole seconds, rounded up."""
    seconds = error.retry_after_seconds
    return {} if seconds is None or not math.isfinite(seconds) else {"retry-after": str(max(0, math.ceil(seconds)))}
