"""What the end of an attempt says: whether anything happened, whether to wait, and how it is told."""

from __future__ import annotations

import random
from collections.abc import Mapping
from types import CodeType
from typing import Any, cast

from mainstay.core import DeadlineExceeded, MainstayError, RetryState
from mainstay.database import CommitUnknown
from mainstay.workflow._history import StepState
from mainstay.workflow._seconds import is_seconds
from mainstay.workflow.errors import Parked, StepCancelled, StepFailed, WorkflowFailed, in_one_line
from mainstay.workflow.step import StepPolicy

SHORTEST_WAIT = 0.01
# What an exception of the service's own is called says nothing: what decides has a member of its own.
GIVEN_UP: dict[str, Any] = {
    "type": "StepCancelled",
    "detail": "the function did not wait for its end",
    "given_up": True,
}
"""The error of a step for whose end the function did not wait."""
CANCELLED: dict[str, Any] = {"type": "Cancelled", "detail": "the run was cancelled", "cancelled": True}
EXPIRED: dict[str, Any] = {
    "type": "DeadlineExceeded",
    "code": DeadlineExceeded.code,
    "status": DeadlineExceeded.status,
    "title": DeadlineExceeded.title,
    "public": DeadlineExceeded.public_message,
}
"""The error of what took too long; who says so adds the `detail`."""
TERMINATED = "Terminated"
"""The `type` of the failure of a run that a person ended as it was."""
UNDONE: dict[str, Any] = {"type": "Cancelled", "detail": "the run was compensated after its end", "cancelled": True}


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
    seconds = _asked_seconds(error)
    if seconds is None or failed_for_good(policy, error) or not nothing_happened(policy, error, own):
        return None
    # The spread keeps those who were rejected together apart.
    return max(SHORTEST_WAIT, seconds) * (1 + random.random() / 4)  # noqa: S311  guards nothing


def delay_or_parked(key: str, policy: StepPolicy, state: RetryState) -> float | None:
    """How long to wait before the next attempt of a step; None where there is none.

    Raises:
        Parked: the policy is code of others, too, and broke, which says nothing about how the attempt ended.
    """
    try:
        return _delay_seconds(policy, state)
    except BaseException as broken:
        msg = (
            f"the retry policy of {key} could not say how to go on: {error_text(describe(broken))}. Mend it, then "
            "resume the run, which attempts the step again with the same key"
        )
        raise Parked(msg) from broken


def _delay_seconds(policy: StepPolicy, state: RetryState) -> float | None:
    error = state.outcome.exception()
    if error is not None and failed_for_good(policy, error):
        return None
    delay = policy.retry.delay_seconds(state)
    if delay is None or error is None:
        return None if delay is None else float(delay)
    return max(float(delay), _asked_seconds(error) or 0.0)  # `Retry` does not look into a group


def _asked_seconds(error: BaseException) -> float | None:
    """The longest wait that rejections ask for: the error, or those in a group; None where none does."""
    asked = [_told(found, "retry_after_seconds") for found in _leaves(error) if _had_no_effect(found)]
    return max((float(each) for each in asked if is_seconds(each)), default=None)


def _had_no_effect(error: BaseException) -> bool:
    return isinstance(error, MainstayError) and _told(error, "no_effect") is True


def _told(error: BaseException, name: str) -> Any:
    """What an error says of itself; None where it cannot, since that may be code of others, too."""
    try:
        return getattr(error, name)
    except BaseException:  # noqa: BLE001  in any way
        return None


def nothing_happened(policy: StepPolicy, error: BaseException, own: CodeType | None) -> bool:
    """Whether it is certain that the attempt had no effect: the whole step, and not only the call that failed."""
    if failed_for_good(policy, error):
        return True
    if policy.transactional:
        return not isinstance(error, CommitUnknown)
    leaves = _leaves(error)
    # A deadline that had passed before something began says what the step's code did not do last; but that code spent
    # the time before on something.
    if not all(_had_no_effect(leaf) and not isinstance(leaf, DeadlineExceeded) for leaf in leaves):
        return False
    # A group tells of several calls, and of those that ended well it tells nothing.
    return (policy.one_call and len(leaves) == 1) or (own is not None and not _entered(own, error))


def failed_for_good(policy: StepPolicy, error: BaseException) -> bool:
    """Whether the step said by an error of `failed_on` that nothing happened, and nothing will."""
    return isinstance(error, policy.failed_on) or all(isinstance(leaf, policy.failed_on) for leaf in _leaves(error))


def _leaves(error: BaseException) -> list[BaseException]:
    """The errors of a group, however deep it is, or the one."""
    leaves, left = list[BaseException](), [error]
    while left:
        each = left.pop()
        if isinstance(each, BaseExceptionGroup):
            left.extend(reversed(cast("BaseExceptionGroup[BaseException]", each).exceptions))
        else:
            leaves.append(each)
    return leaves


def _entered(own: CodeType, error: BaseException) -> bool:
    """Whether the error came out of the step's own code."""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code is own:
            return True
        trace = trace.tb_next
    return False


def describe(error: BaseException) -> dict[str, Any]:
    """What is kept of an exception."""
    if isinstance(error, NoException):
        error = error.error
    try:
        detail = str(error)[:2_000]
    except BaseException:  # noqa: BLE001  an error's own code may fail as well, and in any way
        detail = "(its text could not be made)"
    kept: dict[str, Any] = {"type": type(error).__name__, "detail": detail}
    behind = isinstance(error, StepFailed) and error.error_code is not None  # which is what others have to know
    if isinstance(error, StepFailed):
        kept |= {"step": error.step}
    if isinstance(error, MainstayError):
        of = "error_" if behind else ""
        kept |= {name: _told(error, of + name) for name in ("code", "status", "title")}
        kept |= {"public": _told(error, "public_message")}
    status = kept.pop("status", None)
    kept = {
        name: value if value is None or isinstance(value, str) else type(value).__name__ for name, value in kept.items()
    }
    return kept | {"status": int(status)} if isinstance(status, int) and 400 <= status < 600 else kept  # noqa: PLR2004  HTTP's


def error_text(error: Mapping[str, Any]) -> str:
    """A kept exception in one line."""
    return in_one_line(error["type"], error["detail"])


def misconfigured(place: str, error: Mapping[str, Any]) -> Parked:
    """The end of an execution that met a mistake in how the App is put together: it decides nothing about the run."""
    msg = f"{place} met a mistake in the configuration: {error_text(error)}. Mend it, then resume the run"
    return Parked(msg)


def step_failed(label: str, key: str, state: StepState, error: Mapping[str, Any]) -> StepFailed | WorkflowFailed:
    """The exception that the workflow function sees, live and on every replay."""
    if "run" in error:
        return workflow_failed(f"child {error['run']} ended", error)
    kind = StepCancelled if error.get("given_up") else StepFailed
    failure = kind(
        step=label.removeprefix("@"),
        outcome="failed" if state is StepState.FAILED else "unknown",
        error_type=error["type"],
        error_code=error.get("code"),
        detail=error["detail"],
        public_message=error.get("public"),
    )
    failure.key = key
    failure.error_status, failure.error_title = error.get("status"), error.get("title")
    return failure


def workflow_failed(how: str, failure: Mapping[str, Any]) -> WorkflowFailed:
    """The exception for the end of a run: the same problem as what ended it, where that said all three of its kind."""
    failed = WorkflowFailed(
        f"{how} with {error_text(failure)}",
        error_type=failure["type"],
        detail=failure["detail"],
        error_code=failure.get("code"),
        step=failure.get("step"),
        public_message=failure.get("public"),
    )
    code, status, title = failure.get("code"), failure.get("status"), failure.get("title")
    if code is not None and status is not None and title is not None:
        failed.code, failed.status, failed.title = code, status, title
    return failed


def plain_text(text: str) -> str:
    """What every database takes as text: exceptions may carry anything."""
    return text[:4_000].encode(errors="replace").decode().replace("\0", "?")
