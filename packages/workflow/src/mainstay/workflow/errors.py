"""The errors of this package, and the signals that end a run's execution without being errors.

MainstayError
└── WorkflowError           SYS_WORKFLOW            base
    ├── NotInRun            SYS_NOT_IN_RUN          a step or a workflow was called where no run executes
    ├── RunConflict         RES_RUN_CONFLICT        the id belongs to a run with another input
    ├── SignalConflict      RES_SIGNAL_CONFLICT     the id belongs to a message with another value
    ├── RunNotFound         RES_RUN_NOT_FOUND       no run has this id
    ├── RunStateError       RES_RUN_STATE_CONFLICT  the run is not in a state in which this can be done
    ├── ApprovalNotFound    RES_APPROVAL_NOT_FOUND  the run does not ask for this
    ├── ApprovalConflict    RES_APPROVAL_CONFLICT   it is decided already, or not asked any more
    ├── DecisionDenied      AUTH_DECISION_DENIED    who wants to decide may not
    ├── RunParked           SYS_RUN_PARKED          the run waits for a person
    ├── PayloadNotStored    SYS_PAYLOAD_NOT_STORED  the App's codec cannot make of a payload what is stored
    ├── PayloadUnreadable   SYS_PAYLOAD_UNREADABLE  a stored payload cannot be read by this App's codec
    ├── WorkflowFailed      BIZ_WORKFLOW_FAILED     the run failed, was cancelled or was terminated
    └── StepFailed          BIZ_STEP_FAILED         raised inside a workflow function when a step ends without a result
        └── StepCancelled   BIZ_STEP_FAILED         … because the function did not wait for it (also a TimeoutError)

BaseException
└── ControlFlow             never seen by `except Exception`: it is about who runs a workflow, not about what it does
    ├── Lost                another worker owns the run now: give up silently, record nothing
    ├── Released            this worker stops: the run goes back to the queue
    ├── Suspended           the run waits for long: back into the queue until then
    ├── CancelRequested     the run is to be cancelled: compensate
    ├── Continued           the run goes on with new input and without its history
    ├── Ended               the function has ended, and this is a task that outlived it
    ├── Parked              the run cannot go on without a person
    └── CompensationExhausted   a compensation used up its attempts
"""

from __future__ import annotations

from typing import Literal

from mainstay.core import MainstayError

__all__ = [
    "ApprovalConflict",
    "ApprovalNotFound",
    "CancelRequested",
    "CompensationExhausted",
    "Continued",
    "ControlFlow",
    "DecisionDenied",
    "Ended",
    "Lost",
    "NotInRun",
    "Parked",
    "PayloadNotStored",
    "PayloadUnreadable",
    "Released",
    "RunConflict",
    "RunNotFound",
    "RunParked",
    "RunStateError",
    "SignalConflict",
    "StepCancelled",
    "StepFailed",
    "Suspended",
    "WorkflowError",
    "WorkflowFailed",
]


def in_one_line(error_type: str, detail: str) -> str:
    """An exception that was kept, as a log says it; many have no text."""
    return f"{error_type}: {detail}" if detail else error_type


class WorkflowError(MainstayError):
    """Base of this package's errors."""

    code = "SYS_WORKFLOW"
    status = 500
    title = "Workflow failed"


class NotInRun(WorkflowError):
    """A step or a workflow was called outside a run; the message names what to call instead."""

    code = "SYS_NOT_IN_RUN"
    status = 500
    title = "Called outside of a run"
    no_effect = True


class RunConflict(WorkflowError):
    """A run with this id exists, of another workflow or with another input."""

    code = "RES_RUN_CONFLICT"
    status = 409
    title = "Run requested with other content"
    no_effect = True
    public_message = "This was already requested with other content."


class SignalConflict(WorkflowError):
    """A message with this id was sent to the run, of another signal or with another value."""

    code = "RES_SIGNAL_CONFLICT"
    status = 409
    title = "Signal sent with other content"
    no_effect = True
    public_message = "This was already sent with other content."


class PayloadNotStored(WorkflowError):
    """A payload cannot be stored: the codec of this App cannot encode it, since its key is away for example."""

    code = "SYS_PAYLOAD_NOT_STORED"
    status = 500
    title = "Payload not stored"
    no_effect = True


class PayloadUnreadable(WorkflowError):
    """A stored payload cannot be read: its codec is not part of this App, or lacks the key."""

    code = "SYS_PAYLOAD_UNREADABLE"
    status = 500
    title = "Payload unreadable"
    no_effect = True


class RunNotFound(WorkflowError):
    """No run has this id."""

    code = "RES_RUN_NOT_FOUND"
    status = 404
    title = "No such run"
    no_effect = True
    public_message = "There is no such run."


class RunStateError(WorkflowError):
    """What was asked for cannot be done to a run in its state, such as resuming one that is not parked."""

    code = "RES_RUN_STATE_CONFLICT"
    status = 409
    title = "Run in another state"
    no_effect = True
    public_message = "The run is not in a state that allows this."


class ApprovalNotFound(WorkflowError):
    """The run does not ask for this."""

    code = "RES_APPROVAL_NOT_FOUND"
    status = 404
    title = "No such question"
    no_effect = True
    public_message = "There is no such question."


class ApprovalConflict(WorkflowError):
    """What was to be decided is decided otherwise, is not asked any more, or is asked more than once."""

    code = "RES_APPROVAL_CONFLICT"
    status = 409
    title = "Already decided"
    no_effect = True
    public_message = "This is decided already, or cannot be decided any more."


class DecisionDenied(WorkflowError):
    """The actor of the context may not decide this, or there is none."""

    code = "AUTH_DECISION_DENIED"
    status = 403
    title = "Decision not allowed"
    no_effect = True
    public_message = "You may not decide this."


class RunParked(WorkflowError):
    """The run waits for a person: `mainstay workflow show` says why, `resume` or `cancel` takes it on."""

    code = "SYS_RUN_PARKED"
    status = 503
    title = "Run waits for a person"


class WorkflowFailed(WorkflowError):
    """The run failed or was cancelled, and is compensated; or a person terminated it, and nothing is undone.

    Attributes:
        code, status, title: those of the error behind it, where it has them, so that both are the same problem over
            HTTP.
        error_type: the name of the exception that ended the workflow function, `Cancelled` if the run was cancelled,
            `Terminated` if it was terminated.
        error_code: its code, where it was a `MainstayError`; where a step failed, that of the error behind the failure.
        step: the name of the step that failed, where it was one.
        detail: that exception's text; internal.
        public_message: that exception's own, where it has one.
    """

    code = "BIZ_WORKFLOW_FAILED"
    status = 409
    title = "Run failed"

    def __init__(
        self,
        message: str,
        *,
        error_type: str,
        detail: str,
        error_code: str | None = None,
        step: str | None = None,
        public_message: str | None = None,
    ) -> None:
        super().__init__(message, public_message=public_message)
        self.error_type = error_type
        self.error_code = error_code
        self.step = step
        self.detail = detail


class StepFailed(WorkflowError):
    """A step ended without a result, after all of its attempts. The same error is raised again on replay.

    Attributes:
        step: the step's name.
        outcome: `failed`: certainly nothing happened; `unknown`: something may have, and compensation includes the
            step.
        error_type: the name of the last attempt's exception.
        error_code, error_status, error_title: its kind, where it was a `MainstayError`.
        detail: its text; internal.
        public_message: its own, where it has one.
        key: names the step within its run; empty where none is known.
    """

    code = "BIZ_STEP_FAILED"
    status = 409
    title = "Step failed"
    key: str = ""
    error_status: int | None = None
    error_title: str | None = None

    def __init__(
        self,
        *,
        step: str,
        outcome: Literal["failed", "unknown"],
        error_type: str,
        error_code: str | None,
        detail: str,
        public_message: str | None = None,
    ) -> None:
        nothing = "nothing happened" if outcome == "failed" else "it may have happened"
        super().__init__(
            f"step {step} ended with {in_one_line(error_type, detail)} ({nothing})",
            no_effect=outcome == "failed",
            public_message=public_message,
        )
        self.step = step
        self.outcome: Literal["failed", "unknown"] = outcome
        self.error_type = error_type
        self.error_code = error_code
        self.detail = detail


class StepCancelled(StepFailed, TimeoutError):
    """The workflow function did not wait for the end of a step or wait, by `asyncio.timeout` for example.

    The step's code was cancelled. This is recorded, and raised in place of the cancellation, so that a replay takes the
    same way: `except TimeoutError` around the time limit sees it live and on every replay. A limit that says so itself
    is `@flows.step(timeout_seconds=…)`.
    """


class ControlFlow(BaseException):
    """Base of what ends an execution without being an error of the workflow."""


class Lost(ControlFlow):
    """Another worker owns the run, or may soon: nothing may be recorded or begun any more."""


class Released(ControlFlow):
    """This worker stops and gives the run back."""


class Suspended(ControlFlow):
    """The run waits for so long that it need not be in memory.

    Attributes:
        until: on the clock's monotonic time.
    """

    def __init__(self, until: float) -> None:
        super().__init__(until)
        self.until = until


class CancelRequested(ControlFlow):
    """The run is to be cancelled at this boundary between steps."""


class Continued(ControlFlow):
    """The function has had enough of its history: the run goes on with new input.

    Attributes:
        workflow, version: what executes it then.
        input: JSON.
    """

    def __init__(self, workflow: str, version: int, input: str) -> None:
        super().__init__(workflow, version)
        self.workflow = workflow
        self.version = version
        self.input = input


class Ended(ControlFlow):
    """The workflow function has ended; a task that it began and did not wait for may do nothing more."""


class Parked(ControlFlow):
    """The run cannot go on without a person; the argument says why."""


class CompensationExhausted(ControlFlow):
    """A compensation used up its attempts; the argument says which and why."""
