"""Approvals: what a run asks people, and who may decide it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from mainstay.core import App, Binding, Kept, once
from mainstay.workflow import _names
from mainstay.workflow._asks import Limits
from mainstay.workflow._branch import current_branch
from mainstay.workflow._seconds import checked_seconds
from mainstay.workflow.errors import NotInRun, StepCancelled, StepFailed
from mainstay.workflow.step import Step

if TYPE_CHECKING:
    from mainstay.workflow.engine import WorkflowEngine

__all__ = ["Approval", "ApprovalView", "Asked", "Decision", "DecisionAttempt"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Decision:
    """What a person decided.

    Attributes:
        approved: or rejected.
        by: the actor of the context in which it was decided.
        reason: in the person's words; empty where none was given.
        at: when, by the database's clock.
        escalated: whether the ask was escalated by then.
    """

    approved: bool
    by: str
    reason: str
    at: datetime
    escalated: bool

    def to_text(self) -> str:
        """As JSON."""
        kept = {"approved": self.approved, "by": self.by, "reason": self.reason, "at": self.at.isoformat()}
        return json.dumps({**kept, "escalated": self.escalated})

    @classmethod
    def from_text(cls, text: str) -> Decision:
        """What `to_text` wrote."""
        kept: dict[str, Any] = json.loads(text)
        at = datetime.fromisoformat(kept.pop("at"))
        return cls(at=at, **kept)


@dataclass(frozen=True, slots=True)
class Asked(Generic[T]):
    """One ask of a run.

    Attributes:
        run_id: the run that asks.
        name: of the approval.
        place: names the ask within its run: `large-refund:1`, or `0.1/large-refund:1` in a branch of a gather.
        question: what is asked.
        at: since when, by the database's clock.
        due_at: until when; None without a deadline.
        escalated: whether it is.
    """

    run_id: str
    name: str
    place: str
    question: T
    at: datetime
    due_at: datetime | None
    escalated: bool


@dataclass(frozen=True, slots=True)
class DecisionAttempt(Generic[T]):
    """What a person wants to decide.

    Attributes:
        asked: the ask.
        approved, by, reason: as of `Decision`.
        allowed: whether the person may decide; an attempt that is not allowed is refused and changes nothing.
    """

    asked: Asked[T]
    approved: bool
    by: str
    reason: str
    allowed: bool


ApprovalView = Asked[str]
"""An ask for people, its question as JSON."""

MayDecide = Callable[[Asked[T], str], bool | Awaitable[bool]]
OnDecision = Callable[[DecisionAttempt[T]], Awaitable[None]]


class Approval(Generic[T]):
    """A named kind of question to a person; made by `flows.approval(name, type, may_decide=…)`.

    Attributes:
        name: part of every record, for ever.
        may_decide, on_decision, on_escalation: see `WorkflowRouter.approval`.
    """

    def __init__(
        self,
        name: str,
        kind: type[T],
        binding: Binding[WorkflowEngine],
        *,
        may_decide: MayDecide[T],
        on_decision: OnDecision[T] | None,
        on_escalation: Step[[T], Any] | None,
    ) -> None:
        self.name = name
        self.may_decide = may_decide
        self.on_decision = on_decision
        self.on_escalation = on_escalation
        self._kept: Kept[T] = Kept(kind, f"approval {name}: its question")
        self._binding = binding
        self._filled: dict[Callable[..., Any], Callable[..., Any]] = {}

    def __repr__(self) -> str:
        return f"<approval {self.name}>"

    def check(self) -> None:
        """Refuse a type whose values would not come back equal.

        Raises:
            TypeError: the message names the field, and the remedy.
        """
        self._kept.check()

    def functions(self) -> list[Callable[..., Any]]:
        """Who may decide, and what is told about decisions."""
        return [function for function in (self.may_decide, self.on_decision) if function is not None]

    @contextmanager
    def filled_by(self, app: App) -> Generator[None, None, None]:
        """Give these functions the services of `app` within the block."""
        self._filled = {function: app.fill(function) for function in self.functions()}
        try:
            yield
        finally:
            self._filled = {}

    async def ask(
        self, question: T, *, timeout_seconds: float | None = None, escalate_after_seconds: float | None = None
    ) -> Decision:
        """In a workflow function: ask, and wait for the decision, durably and without memory.

        Args:
            question: what is to be decided.
            timeout_seconds: how long the run waits; None for as long as it takes.
            escalate_after_seconds: after this time without a decision the ask is marked as escalated, and
                `on_escalation` is executed, once, like any step. Should it fail, the run goes on waiting.

        Raises:
            NotInRun: this is no workflow function.
            StepFailed: there was no decision within `timeout_seconds`; its `error_type` is `DeadlineExceeded`.
            ValueError: a time is negative, or the escalation would come after the deadline.
        """
        limits = _checked(Limits(timeout_seconds, escalate_after_seconds))
        branch = current_branch.get()
        if branch is None:
            msg = f"approval {self.name} was asked for outside a run: only workflow functions ask"
            raise NotInRun(msg)
        primitives, limited = branch.primitives, timeout_seconds is not None
        key, decision = await primitives.ask(branch, self.name, self._kept, question, limits)
        if decision is not None:
            return Decision.from_text(decision)
        try:
            await self._escalate(question)
        except StepCancelled:  # the function has no more time: it goes on with what there is, and the ask ends
            try:
                text = await primitives.go_on_asking(branch, self.name, key, limited=limited, withdrawn=True)
            except StepFailed:
                text = None
            if text is None:
                raise
            return Decision.from_text(text)
        return Decision.from_text(await primitives.go_on_asking(branch, self.name, key, limited=limited))

    async def _escalate(self, question: T) -> None:
        if self.on_escalation is None:
            return
        try:
            await self.on_escalation(question)
        except StepCancelled:
            raise
        except StepFailed:
            pass  # it is in the run's record; people can decide all the same

    async def decide(self, run_id: str, *, approved: bool, reason: str = "", place: str | None = None) -> None:
        """Decide what a run asks, as the actor of the context. Joins the unit of work around it.

        The first decision stands. Sent again by the same person, the same one changes nothing. Inside a workflow
        function it is a recorded step.

        Args:
            run_id: the run that asks.
            approved: or rejected.
            reason: in the person's words.
            place: which ask, as `engine.approvals` lists it; needed where the run has asked more than once.

        Raises:
            DecisionDenied: the context has no actor, or `may_decide` says no. Nothing is stored.
            RunNotFound: there is no such run.
            ApprovalNotFound: the run has not asked, or not at this place.
            ApprovalConflict: it is decided otherwise, or not asked any more, or the place is missing.
            NotBoundError: the router is not part of a running App.
        """
        engine, run_id = self._binding.get(), _names.run_id(run_id)

        async def decide(_key: str | None) -> None:
            await engine.approvals.decide(run_id, self.name, approved=approved, reason=reason, place=place)

        arguments = (run_id, approved, reason, place)
        await once(f"decide:{self.name}", decide, transactional=False, arguments=lambda: arguments)

    def asked(self, view: ApprovalView) -> Asked[T]:
        """An ask with its question as today's type reads it.

        Raises:
            ValueError: it does not fit the type any more.
        """
        question = self._kept.read(view.question)
        return Asked(view.run_id, view.name, view.place, question, view.at, view.due_at, view.escalated)

    async def allows(self, asked: Asked[T], actor: str) -> bool:
        """What `may_decide` says."""
        answer = self._filled.get(self.may_decide, self.may_decide)(asked, actor)
        return bool(await answer) if inspect.isawaitable(answer) else bool(answer)

    async def tell(self, attempt: DecisionAttempt[T]) -> None:
        """Call `on_decision`, where there is one."""
        if self.on_decision is not None:
            await self._filled.get(self.on_decision, self.on_decision)(attempt)


def _checked(limits: Limits) -> Limits:
    timeout, escalate = limits.timeout_seconds, limits.escalate_after_seconds
    for name, seconds in (("timeout_seconds", timeout), ("escalate_after_seconds", escalate)):
        if seconds is not None:
            checked_seconds(f"ask: {name}", seconds)
    if timeout is not None and escalate is not None and escalate >= timeout:
        msg = f"ask(escalate_after_seconds={escalate!r}): that is not before the deadline, timeout_seconds={timeout!r}"
        raise ValueError(msg)
    return limits


AnyApproval = Approval[Any]
