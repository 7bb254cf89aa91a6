"""The one error tree.

MainstayError               SYS_INTERNAL
├── ConfigurationError      SYS_CONFIGURATION  a mistake in how the App is put together; raised before anything runs
│   └── NotBoundError       SYS_NOT_BOUND      something that needs a running App was used without one
├── DeadlineExceeded        EXT_DEADLINE       the time ran out (also a TimeoutError)
├── Unauthenticated         AUTH_REQUIRED      the caller is not known
├── Forbidden               AUTH_FORBIDDEN     the caller may not do this
├── InvalidRequest          VAL_REQUEST        the request is wrong in itself
├── NotFound                RES_NOT_FOUND      there is no such thing
├── Conflict                RES_CONFLICT       it is in a state that does not allow this
│   └── AlreadyExists       RES_ALREADY_EXISTS there is one already
├── TooManyRequests         RATE_LIMITED       this caller asks too often
└── Unavailable             SYS_UNAVAILABLE    this service has too much to do, or is not ready

From `Unauthenticated` on they are for application code that needs no class of its own; `not_found` and `already_exists`
make the texts, too. Every package adds its own branch in its `errors.py`. Wrong arguments of a call are Python's own
`TypeError` and `ValueError`: a programming error is not a domain error.
"""

from __future__ import annotations

import copyreg
import re
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Literal, get_args

__all__ = [
    "AlreadyExists",
    "CodeFamily",
    "ConfigurationError",
    "Conflict",
    "DeadlineExceeded",
    "FieldError",
    "Forbidden",
    "InvalidRequest",
    "MainstayError",
    "NotBoundError",
    "NotFound",
    "TooManyRequests",
    "Unauthenticated",
    "Unavailable",
    "already_exists",
    "not_found",
]

CodeFamily = Literal["AUTH", "VAL", "RES", "SYS", "EXT", "RATE", "BIZ"]

_KIND = ("code", "status", "title")
_CODE = re.compile(rf"({'|'.join(get_args(CodeFamily))})_[A-Z0-9][A-Z0-9_]*")
_SERVER = range(500, 600)
_CALLER = range(400, 500)
# Whose failure it is: the service's, or one of those that it calls; or else the caller's.
_STATUSES = {"SYS": _SERVER, "EXT": range(502, 505), "RATE": range(429, 430)}


@dataclass(frozen=True, slots=True)
class FieldError:
    """One thing that is wrong with a request.

    Attributes:
        location: where, from the outside in: names and indexes. A name that the caller has chosen is `*`.
        message: what is expected there; it repeats nothing of what was sent.
        type: the same for programs, such as `missing`.
    """

    location: tuple[str | int, ...]
    message: str
    type: str


class MainstayError(Exception):
    """Base of every error of the domain.

    `str(error)` is the internal detail and belongs in logs; only `public_message` may be shown to a caller outside.

    Three class attributes say what kind of problem it is. A class states all three, or none and is of its base's kind:
        code: stable identifier, one of the families AUTH_, VAL_, RES_, SYS_, EXT_, RATE_, BIZ_ and a name in capitals.
            An instance that tells of another error far away may have that one's code, status and title.
        status: of HTTP. `SYS_` is the service's own failure (5xx), `EXT_` one of another service that it calls (502,
            503, 504), `RATE_` a caller that asks too often (429); the other families are the caller's (4xx). A service
            that has too much to do answers 503: no single caller is to blame.
        title: the kind in a few words, the same for each error of the code.

    Class attributes that an instance may override by keyword:
        retryable: whether the same call may succeed later.
        no_effect: True only where it is certain that nothing happened on the other side. A durable step that ends with
            such an error has *failed*; one that ends with any other error is *unknown*.
        retry_after_seconds: how long to wait at least before another attempt; None where it is not known.
        public_message: a sentence without internals.

    And one for an `__init__` to set:
        errors: what is wrong with the request, and where, where that is several things.
    """

    code: str = "SYS_INTERNAL"
    status: int = 500
    title: str = "Internal error"
    retryable: bool = False
    no_effect: bool = False
    retry_after_seconds: float | None = None
    public_message: str = "The request could not be completed."
    errors: tuple[FieldError, ...] = ()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        stated = [name for name in _KIND if name in vars(cls)]
        if stated and (wrong := _wrong_kind(cls, stated)):
            raise TypeError(wrong)

    def __init__(
        self,
        detail: str = "",
        *,
        retryable: bool | None = None,
        no_effect: bool | None = None,
        retry_after_seconds: float | None = None,
        public_message: str | None = None,
    ) -> None:
        super().__init__(detail or self.public_message)
        if retryable is not None:
            self.retryable = retryable
        if no_effect is not None:
            self.no_effect = no_effect
        if retry_after_seconds is not None:
            self.retry_after_seconds = retry_after_seconds
        if public_message is not None:
            self.public_message = public_message

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions are made anew from `args`, which an `__init__` with other parameters does not take.
        return copyreg.__newobj__, (type(self),), {**self.__dict__, "args": self.args}  # type: ignore[attr-defined]


def _wrong_kind(cls: type[MainstayError], stated: list[str]) -> str | None:
    """The mistake in what a class says of its kind; None without one."""
    name, code = cls.__name__, cls.code
    if "code" in stated and not _CODE.fullmatch(code):
        families = ", ".join(f"{family}_" for family in get_args(CodeFamily))
        return f"{name}.code is {code!r}; it starts with one of {families} and goes on with a name in capitals"
    if missing := [each for each in _KIND if each not in stated]:
        return (
            f"{name} states {' and '.join(stated)} without {' and '.join(missing)}: code, status and title belong "
            "together; a class states all three, or none and is of the same kind as its base"
        )
    family = code.partition("_")[0]
    allowed = _STATUSES.get(family, _CALLER)
    if cls.status not in allowed or cls.status not in set(HTTPStatus):
        return (
            f"{name}.status is {cls.status!r}; for {family}_ it is a status of HTTP from {allowed[0]} to {allowed[-1]}"
        )
    if not cls.title.strip() or not cls.title.isprintable():
        return f"{name}.title is {cls.title!r}; it says the kind of problem in a few words on one line"
    return None


class ConfigurationError(MainstayError):
    """The App cannot run as it is put together; the message names the module, the field and the line to write.

    Raised inside a handler or a step it is no outcome of the business: the work is kept, and done once the mistake is
    mended. `no_effect` is therefore False: it speaks for the refused call, and never for a whole step.
    """

    code = "SYS_CONFIGURATION"
    status = 500
    title = "Service configured wrongly"
    public_message = "The service is not configured correctly."


class NotBoundError(ConfigurationError):
    """Something that works only inside a running App was used without one; the message names the missing line."""

    code = "SYS_NOT_BOUND"
    status = 503
    title = "Service not running"
    public_message = "The service is not running."


class DeadlineExceeded(MainstayError, TimeoutError):
    """The time for this work ran out. Whether it took effect is unknown, unless `no_effect` says it never began."""

    code = "EXT_DEADLINE"
    status = 504
    title = "Time ran out"
    retryable = True
    public_message = "The request took too long."


class Unauthenticated(MainstayError):
    """The caller has not said who it is, or could not prove it."""

    code = "AUTH_REQUIRED"
    status = 401
    title = "Authentication required"
    public_message = "This needs valid credentials."


class Forbidden(MainstayError):
    """The caller is known and may not do this."""

    code = "AUTH_FORBIDDEN"
    status = 403
    title = "Not allowed"
    public_message = "You may not do this."


class InvalidRequest(MainstayError):
    """The request is wrong in itself: it can never be done, in no state of things."""

    code = "VAL_REQUEST"
    status = 422
    title = "Invalid request"
    public_message = "The request is not valid."


class NotFound(MainstayError):
    """There is no such thing; `not_found` makes one."""

    code = "RES_NOT_FOUND"
    status = 404
    title = "Not found"
    public_message = "This does not exist."


class Conflict(MainstayError):
    """The thing is there, in a state that does not allow this."""

    code = "RES_CONFLICT"
    status = 409
    title = "Conflict"
    public_message = "This is not possible in the present state."


class AlreadyExists(Conflict):
    """There is one already; `already_exists` makes one."""

    code = "RES_ALREADY_EXISTS"
    status = 409
    title = "Exists already"
    public_message = "This exists already."


class TooManyRequests(MainstayError):
    """This caller asks too often. An overload that no single caller causes is `Unavailable`."""

    code = "RATE_LIMITED"
    status = 429
    title = "Too many requests"
    retryable = True
    public_message = "There were too many requests. Please try again later."


class Unavailable(MainstayError):
    """This service has too much to do, is not ready yet, or is stopping."""

    code = "SYS_UNAVAILABLE"
    status = 503
    title = "Service unavailable"
    retryable = True
    public_message = "The service is not available at the moment. Please try again later."


def not_found(what: str, id: object) -> NotFound:
    """Make the error for an id that nothing has.

    `raise not_found("order", order_id)` says it to the caller without the id.

    Args:
        what: the kind of thing in a word or two, which the caller is told.
        id: what was asked for, which is only in the detail for logs.
    """
    return NotFound(f"there is no {what} {id!r}", public_message=f"There is no such {what}.")


def already_exists(what: str, id: object) -> AlreadyExists:
    """Make the error for an id that is taken.

    `raise already_exists("order", order_id)` says it to the caller without the id.

    Args:
        what: the kind of thing in a word or two, which the caller is told.
        id: what was to be made, which is only in the detail for logs.
    """
    return AlreadyExists(f"{what} {id!r} exists already", public_message=f"This {what} exists already.")
