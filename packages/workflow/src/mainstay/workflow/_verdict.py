"""What the end of an attempt says: whether anything happened, whether to wait, and how it is told."""

from __future__ import annotations

import random
from collections.abc import Mapping
from types import CodeType
from typing import Any, Literal

from mainstay.core import DeadlineExceeded, MainstayError
from mainstay.database import CommitUnknown
from mainstay.workflow._history import DONE, UNKNOWN, StepRecord
from mainstay.workflow.errors import Parked, StepFailed
from mainstay.workflow.step import StepPolicy

SHORTEST_WAIT = 0.01


class NoException(Exception):
    """What a step raised that is no `Exception`, such as a `SystemExit`: it ends an attempt, and never a worker."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(type(error)))
        self.error = error


def rejection_seconds(policy: StepPolicy, error: BaseException, own: CodeType | None) -> float | None:
    """How long to wait where the other side was not asked, so that it was no attempt: a breaker or a bulkhead said no.

    Args:
        policy: of the step.
        error: the end of the attempt.
        own: the code of the step below policies of ours; None where there are none.
    """
    if not isinstance(error, MainstayError) or not error.no_effect or isinstance(error, policy.failed_on):
        return None
    if error.retry_after_seconds is None or not nothing_happened(policy, error, own):
        return None
    # The spread keeps those who were rejected together apart.
    return max(SHORTEST_WAIT, error.retry_after_seconds) * (1 + random.random() / 4)  # noqa: S311  guards nothing


def nothing_happened(policy: StepPolicy, error: BaseException, own: CodeType | None) -> bool:
    """Whether it is certain that the attempt had no effect: the whole step, and not only the call that failed."""
    if isinstance(error, policy.failed_on):
        return True
    if policy.transactional:
        return not isinstance(error, CommitUnknown)
    # A deadline that had passed before something began says what the step's code did not do last; but that code spent
    # the time before on something.
    if not isinstance(error, MainstayError) or not error.no_effect or isinstance(error, DeadlineExceeded):
        return False
    return policy.one_call or (own is not None and not _entered(own, error))


def _entered(own: CodeType, error: BaseException) -> bool:
    """Whether the error came out of the step's own code."""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code is own:
            return True
        trace = trace.tb_next
    return False


def may_have_happened(record: StepRecord) -> bool:
    """Whether the step has to be undone."""
    return record.state in {DONE, UNKNOWN} or (record.state == "open" and (record.dangling or record.maybe))


def error_text(error: Mapping[str, Any]) -> str:
    """A kept exception in one line."""
    return f"{error['type']}: {error['detail']}"


def misconfigured(place: str, error: Mapping[str, Any]) -> Parked:
    """The end of an execution that met a mistake in how the App is put together: it decides nothing about the run."""
    msg = f"{place} met a mistake in the configuration: {error_text(error)}. Mend it, then resume the run"
    return Parked(msg)


def step_failed(name: str, state: Literal["failed", "unknown"], error: Mapping[str, Any]) -> StepFailed:
    """The exception that the workflow function sees."""
    return StepFailed(
        step=name.removeprefix("@"),
        outcome=state,
        error_type=error["type"],
        error_code=error.get("code"),
        detail=error["detail"],
    )


def plain_text(text: str) -> str:
    """What every database takes as text: exceptions may carry anything."""
    return text[:4_000].encode(errors="replace").decode().replace("\0", "?")
