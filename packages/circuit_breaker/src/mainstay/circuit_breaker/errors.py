"""Why a call was not made.

CircuitBreakerError       SYS_CIRCUIT_BREAKER  base
└── Rejected              SYS_REJECTED         a policy refused the call; nothing reached the other side
    ├── CircuitOpen       EXT_CIRCUIT_OPEN     the dependency is failing, or is being let recover
    ├── BulkheadFull      SYS_BULKHEAD_FULL    too many calls are already under way or waiting
    ├── RateLimited       SYS_RATE_LIMITED     too many calls in too short a time
    └── Throttled         EXT_THROTTLED        the dependency answers so few calls that this one is not worth sending

Of all that are `Rejected` `no_effect` is true, and the status is 503: the limits are this service's own, and none
of its callers has asked too often (`RATE_`, 429) because of them.

A wrong argument is Python's own `TypeError` or `ValueError`, a wrong setting pydantic's `ValidationError` (a
`ValueError`). A callable of the wrong kind is a `WrongKind`, the `TypeError` that policies let through uncounted.
"""

from __future__ import annotations

from mainstay.core import MainstayError

__all__ = ["BulkheadFull", "CircuitOpen", "HarmfulOrderWarning", "RateLimited", "Rejected", "Throttled", "WrongKind"]


class CircuitBreakerError(MainstayError):
    """Base of the errors of this package."""

    code = "SYS_CIRCUIT_BREAKER"
    status = 500
    title = "Circuit breaker failed"


class Rejected(CircuitBreakerError):
    """A policy refused the call before anything was sent.

    Attributes:
        name: of the policy that refused.
        state: what it was in, such as `open` or `full`.
        retry_after_seconds: how long to wait at least; None where it is not known. A circuit that is forced open says
            what `force_open` was told, or its `break_seconds`.
    """

    code = "SYS_REJECTED"
    status = 503
    title = "Call rejected"
    retryable = True
    no_effect = True
    public_message = "The service is busy. Please try again later."

    def __init__(self, name: str, state: str, retry_after_seconds: float | None = None) -> None:
        # Rejecting is a hot path while a dependency is down: the message is made only when it is read, and what
        # `super().__init__` would set is set (`args`, by `__new__`) or the class's own.
        self.name = name
        self.state = state
        self.retry_after_seconds = retry_after_seconds

    def __str__(self) -> str:
        after = self.retry_after_seconds
        return f"{self.name} is {self.state}" + ("" if after is None else f"; try again in {after:.3g} s")


class CircuitOpen(Rejected):
    """The circuit is open, or half open with every probe taken, or ramping up and this call is over its share."""

    code = "EXT_CIRCUIT_OPEN"
    status = 503
    title = "Circuit open"


class BulkheadFull(Rejected):
    """As many calls as allowed are under way, and the queue is full or the wait in it was too long."""

    code = "SYS_BULKHEAD_FULL"
    status = 503
    title = "Too many calls under way"


class RateLimited(Rejected):
    """The calls allowed for this stretch of time are used up."""

    code = "SYS_RATE_LIMITED"
    status = 503
    title = "Too many calls in a short time"


class Throttled(Rejected):
    """So few of the recent calls were answered that sending more would only add to the load."""

    code = "EXT_THROTTLED"
    status = 503
    title = "Too few calls answered"


class WrongKind(TypeError):
    """A callable cannot be used here; the message says what to write instead.

    It says nothing of the dependency: policies do not count it, repeat the call, or answer it with a fallback.
    """


class HarmfulOrderWarning(UserWarning):
    """The order of a pipeline defeats one of its policies; the message says which, and where to put it."""
