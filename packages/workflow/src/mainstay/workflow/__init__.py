"""Durable sagas: workflow functions whose steps survive a crash and are compensated in reverse."""

from mainstay.workflow.approval import Approval, ApprovalView, Asked, Decision, DecisionAttempt
from mainstay.workflow.approvals import Approvals
from mainstay.workflow.codec import PayloadCodec
from mainstay.workflow.engine import RunView, WorkflowEngine
from mainstay.workflow.errors import (
    ApprovalConflict,
    ApprovalNotFound,
    DecisionDenied,
    NotInRun,
    PayloadNotStored,
    PayloadUnreadable,
    RunConflict,
    RunNotFound,
    RunParked,
    RunStateError,
    SignalConflict,
    StepCancelled,
    StepFailed,
    WorkflowError,
    WorkflowFailed,
)
from mainstay.workflow.forms import Group, StepClass, class_step, diagram, parallel, saga, sequence, when
from mainstay.workflow.module import WorkflowModule
from mainstay.workflow.outcome import Done, Failed, Unknown
from mainstay.workflow.router import WorkflowRouter
from mainstay.workflow.settings import WorkflowSettings
from mainstay.workflow.signal import Signal
from mainstay.workflow.step import CompensationInfo, Step, StepInfo, current_compensation, current_step
from mainstay.workflow.value import Published, Value, ValueView
from mainstay.workflow.workflow import Handle, RunInput, RunStatus, Workflow

__all__ = [
    "Approval",
    "ApprovalConflict",
    "ApprovalNotFound",
    "ApprovalView",
    "Approvals",
    "Asked",
    "CompensationInfo",
    "Decision",
    "DecisionAttempt",
    "DecisionDenied",
    "Done",
    "Failed",
    "Group",
    "Handle",
    "NotInRun",
    "PayloadCodec",
    "PayloadNotStored",
    "PayloadUnreadable",
    "Published",
    "RunConflict",
    "RunInput",
    "RunNotFound",
    "RunParked",
    "RunStateError",
    "RunStatus",
    "RunView",
    "Signal",
    "SignalConflict",
    "Step",
    "StepCancelled",
    "StepClass",
    "StepFailed",
    "StepInfo",
    "Unknown",
    "Value",
    "ValueView",
    "Workflow",
    "WorkflowEngine",
    "WorkflowError",
    "WorkflowFailed",
    "WorkflowModule",
    "WorkflowRouter",
    "WorkflowSettings",
    "class_step",
    "current_compensation",
    "current_step",
    "diagram",
    "parallel",
    "saga",
    "sequence",
    "when",
]
