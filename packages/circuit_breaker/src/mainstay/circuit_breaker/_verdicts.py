"""What an exception says about the dependency that was called."""

from __future__ import annotations

import asyncio
import enum
from typing import cast

from mainstay.circuit_breaker.errors import Rejected, WrongKind
from mainstay.core import DeadlineExceeded, MainstayError, deadline_fired

Errors = tuple[type[BaseException], ...]

# The caller's mistake, the rules of the business, a missing right, a missing resource: who says so, works.
_ANSWERS = ("VAL_", "BIZ_", "AUTH_", "RES_")


class Verdict(enum.Enum):
    """What an exception says about the dependency."""

    FAILURE = enum.auto()
    """It did not do its work."""
    ANSWER = enum.auto()
    """It worked: declining a card is an answer. Counts like a result."""
    NEUTRAL = enum.auto()
    """Nothing: the caller went away, or the call was never sent. Counts nowhere."""


def judge(error: BaseException, failures: Errors = (Exception,), answers: Errors = ()) -> Verdict:
    """What `error` says.

    Args:
        error: what the call raised.
        failures: exceptions that count against the dependency.
        answers: exceptions that do not, although they are among `failures`.
    """
    if isinstance(error, _UNSENT) or (isinstance(error, _OURS) and getattr(error, "no_effect", False) is True):
        return Verdict.NEUTRAL  # a policy inside refused, or a deadline was over before anything was sent
    group = _each(error)
    if group and not isinstance(error, answers):
        verdicts = {judge(each, failures, answers) for each in group}
        return next(verdict for verdict in Verdict if verdict in verdicts)
    if not isinstance(error, Exception):
        # A cancellation by a deadline of ours is the dependency's slowness; any other is the caller's business.
        timed_out = isinstance(error, asyncio.CancelledError) and deadline_fired()
        return Verdict.FAILURE if timed_out else Verdict.NEUTRAL
    if isinstance(error, answers) or not isinstance(error, failures):
        return Verdict.ANSWER
    if failures == (Exception,) and isinstance(error, MainstayError) and error.code.startswith(_ANSWERS):
        return Verdict.ANSWER
    return Verdict.FAILURE


_OURS = (DeadlineExceeded, asyncio.CancelledError)
_UNSENT = (Rejected, WrongKind)


def is_final(error: BaseException) -> bool:
    """Whether another attempt would end the same way: a policy inside refused the call, or it is written wrongly."""
    if group := _each(error):
        return all(is_final(each) for each in group)
    return isinstance(error, _UNSENT)


def denies(error: BaseException) -> bool:
    """Whether `error` says that nothing happened on the other side."""
    if group := _each(error):
        return all(denies(each) for each in group)
    return getattr(error, "no_effect", False) is True


def _each(error: BaseException) -> tuple[BaseException, ...]:
    """The errors in a group; none in any other."""
    if isinstance(error, BaseExceptionGroup):
        return cast("BaseExceptionGroup[BaseException]", error).exceptions
    return ()


def are_exceptions(kinds: object) -> bool:
    """Whether they are what `except` takes; callers may be unchecked."""
    each = cast("tuple[object, ...]", kinds) if isinstance(kinds, tuple) else (None,)
    return all(isinstance(kind, type) and issubclass(kind, Exception) for kind in each)
