"""The open asks of all runs, and how a person decides one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mainstay.core import current
from mainstay.database import Database
from mainstay.workflow import _names
from mainstay.workflow._asks import NO_DECISION
from mainstay.workflow._payloads import Payloads
from mainstay.workflow.approval import AnyApproval, ApprovalView, Asked, Decision, DecisionAttempt
from mainstay.workflow.errors import ApprovalConflict, ApprovalNotFound, DecisionDenied, RunNotFound
from mainstay.workflow.tables import ASKED, CLOSE_ASK, DECIDABLE, HOLD_RUN, OPEN_ASKS, ROUSE, SETTLE, moment

__all__ = ["Approvals"]


class Approvals:
    """What waits for a decision; `engine.approvals`.

    Args:
        known: the approvals of the App, by name.
        payloads: how questions and decisions are stored.
        told: called after the commit with the run that a decision is for.
    """

    def __init__(
        self,
        database: Database,
        known: Mapping[str, AnyApproval],
        *,
        payloads: Payloads,
        told: Callable[[str], None],
    ) -> None:
        self._database = database
        self._payloads = payloads
        self._known = known
        self._told = told

    async def waiting(self, *, limit: int = 100) -> list[ApprovalView]:
        """The asks that wait for a decision, the oldest first."""
        shown = self._payloads.shown
        found = await self._database.read(OPEN_ASKS, {"most": limit})
        return [_view(row, shown(row.question, row.run_id)) for row in found]

    async def decide(
        self, run_id: str, name: str, *, approved: bool, reason: str = "", place: str | None = None
    ) -> None:
        """Decide what a run asks, by the name of the approval. See `Approval.decide`."""
        run_id = _names.run_id(run_id)
        approval = self._known.get(name)
        if approval is None:
            msg = (
                f"no router of this App has an approval {name!r}: there are {', '.join(sorted(self._known)) or 'none'}"
            )
            raise ApprovalNotFound(msg)
        actor = current().actor
        if actor is None:
            msg = f"{name} of run {run_id!r} is decided by the actor of the context, which has none: bind(actor=…)"
            raise DecisionDenied(msg)
        while True:
            row = await self._asked(run_id, name, place)
            asked = approval.asked(_view(row, self._payloads.open(row.question, run_id)))
            allowed = await approval.allows(asked, actor)
            attempt = DecisionAttempt(asked, approved, actor, reason, allowed)
            if not allowed:
                await approval.tell(attempt)
                msg = f"{actor} may not decide {asked.place} of run {run_id!r}"
                raise DecisionDenied(msg)
            if await self._settle(approval, attempt, row.id):
                return

    async def _asked(self, run_id: str, name: str, place: str | None) -> Any:
        """The ask that is meant."""
        found = await self._database.read(ASKED, {"run": run_id, "name": name})
        if not found:
            msg = f"there is no run {run_id!r}"
            raise RunNotFound(msg)
        asks = [row for row in found if row.id is not None]
        if place is not None:
            asks = [row for row in asks if row.place == place][-1:]  # an earlier one is of an earlier generation
        if not asks:
            msg = f"run {run_id!r} does not ask for {place or name}"
            raise ApprovalNotFound(msg)
        if len(asks) > 1:
            places = ", ".join(row.place for row in asks)
            msg = f"run {run_id!r} has asked for {name} more than once: say which with place=, one of {places}"
            raise ApprovalConflict(msg)
        return asks[0]

    async def _settle(self, approval: AnyApproval, attempt: DecisionAttempt[Any], ask_id: str) -> bool:
        """Decide in one commit; False where the ask was escalated meanwhile, so that others may decide."""
        asked = attempt.asked
        which = f"{asked.place} of run {asked.run_id!r}"
        ask = {"run": asked.run_id, "ask": ask_id}
        async with self._database.transaction() as session:
            # This excludes the worker of the run, whose writes are fenced by the row.
            await session.execute(HOLD_RUN, {"run": asked.run_id})
            now = (await session.execute(DECIDABLE, ask)).one()
            if now.body is not None:
                _again(self._payloads.open(now.body, asked.run_id), attempt, which)
                return True
            if not now.waits or (now.due_at is not None and now.due_at <= now.now):
                msg = f"{which} is not asked any more"
                raise ApprovalConflict(msg)
            if (now.escalated_at is not None) != asked.escalated:
                return False
            at = moment(now.now)
            decision = Decision(attempt.approved, attempt.by, attempt.reason, at, asked.escalated)
            body = self._payloads.seal(decision.to_text(), asked.run_id)
            message = {"run_id": asked.run_id, "id": ask_id, "name": ask_id, "body": body}
            await session.execute(SETTLE, {**message, "received_by": None})
            await session.execute(CLOSE_ASK, ask)
            await session.execute(ROUSE, {"run": asked.run_id})
            await approval.tell(attempt)
            self._database.after_commit(lambda: self._told(asked.run_id))
        return True


def _again(body: str, attempt: DecisionAttempt[Any], which: str) -> None:
    """Accept the same decision of the same person again.

    Raises:
        ApprovalConflict: it is another one, or the ask ended without one.
    """
    if body == NO_DECISION:
        msg = f"{which} is not asked any more"
        raise ApprovalConflict(msg)
    first = Decision.from_text(body)
    if (first.by, first.approved) != (attempt.by, attempt.approved):
        word = "approved" if first.approved else "rejected"
        msg = f"{which} was {word} by {first.by} at {first.at:%Y-%m-%d %H:%M:%S} UTC"
        raise ApprovalConflict(msg)


def _view(row: Any, question: str) -> ApprovalView:
    due_at = None if row.due_at is None else moment(row.due_at)
    at, escalated = moment(row.asked_at), row.escalated_at is not None
    return Asked(row.run_id, row.name, row.place, question, at, due_at, escalated)
