"""The one error tree.

MainstayError
├── ConfigurationError      SYS_CONFIGURATION  a mistake in how the App is put together; raised before anything runs
│   └── NotBoundError       SYS_NOT_BOUND      something that needs a running App was used without one
└── DeadlineExceeded        EXT_DEADLINE       the time ran out (also a TimeoutError)

Every package adds its own branch in its `errors.py`. Wrong arguments of a call are Python's own `TypeError` and
`ValueError`: a programming error is not a domain error.
"""

from __future__ import annotations

import copyreg
from typing import Any, Literal, get_args

__all__ = ["CodeFamily", "ConfigurationError", "DeadlineExceeded", "MainstayError", "NotBoundError"]

CodeFamily = Literal["AUTH", "VAL", "RES", "SYS", "EXT", "RATE", "BIZ"]


class MainstayError(Exception):
    """Base of every error of the domain.

    `str(error)` is the internal detail and belongs in logs; only `public_message` may be shown to a caller outside.

    Class attributes; all but the code an instance may override by keyword:
        code: stable identifier, one of the families AUTH_, VAL_, RES_, SYS_, EXT_, RATE_, BIZ_ and a name. An error
            that tells of another one far away may have that one's.
        retryable: whether the same call may succeed later.
        no_effect: True only where it is certain that nothing happened on the other side. A durable step that ends with
            such an error has *failed*; one that ends with any other error is *unknown*.
        retry_after_seconds: how long to wait at least before another attempt; None where it is not known.
        public_message: a sentence without internals.
    """

    code: str = "SYS_INTERNAL"
    retryable: bool = False
    no_effect: bool = False
    retry_after_seconds: float | None = None
    public_message: str = "The request could not be completed."

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        family, _, rest = cls.code.partition("_")
        if family not in get_args(CodeFamily) or not rest:
            families = ", ".join(f"{name}_" for name in get_args(CodeFamily))
            msg = f"{cls.__name__}.code is {cls.code!r}; it starts with one of {families} and goes on with a name"
            raise TypeError(msg)

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


class ConfigurationError(MainstayError):
    """The App cannot run as it is put together; the message names the module, the field and the line to write.

    Raised inside a handler or a step it is no outcome of the business: the work is kept, and done once the mistake is
    mended. `no_effect` is therefore False: it speaks for the refused call, and never for a whole step.
    """

    code = "SYS_CONFIGURATION"
    public_message = "The service is not configured correctly."


class NotBoundError(ConfigurationError):
    """Something that works only inside a running App was used without one; the message names the missing line."""

    code = "SYS_NOT_BOUND"
    public_message = "The service is not running."


class DeadlineExceeded(MainstayError, TimeoutError):
    """The time for this work ran out. Whether it took effect is unknown, unless `no_effect` says it never began."""

    code = "EXT_DEADLINE"
    retryable = True
    public_message = "The request took too long."
