"""What a run asks people: the wait for a decision, its escalation and its deadline.

An ask is a wait like that for a signal, and the decision is a message like one. What is more: exactly one thing settles
an ask, a decision or its end without one. So each is a message of the same id, the ask's, which the table of signals
takes once. A decision that was accepted is therefore received, also where it comes at the last moment.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mainstay.core import derived_id
from mainstay.workflow._history import Keys, Kind, StepRecord, StepState
from mainstay.workflow._recording import Recording
from mainstay.workflow._verdict import EXPIRED, GIVEN_UP, step_failed
from mainstay.workflow._waits import Waits
from mainstay.workflow.tables import ASK, ASK_LEFT, CLOSE_ASK, ESCALATE, SETTLE

NO_DECISION = "null"
"""The body of the message that ends an ask without a decision."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How long an ask waits, in seconds from its beginning; None for as long as it takes."""

    timeout_seconds: float | None
    escalate_after_seconds: float | None


class Asks:
    """The asks of one execution of a run."""

    def __init__(self, keys: Keys, *, waits: Waits, recording: Recording) -> None:
        self._keys = keys
        self._waits = waits
        self._recording = recording

    def id_of(self, key: str) -> str:
        """The id of the ask that a place of the function makes; no signal that is sent can have it."""
        return f"!{derived_id(self._keys.of(key))}"

    async def ask(self, record: StepRecord, name: str, question: str, limits: Limits) -> None:
        """Ask, and wait for the decision or the escalation: the output is the decision as JSON, or null.

        Raises:
            StepFailed: there was no decision in time.
        """
        ask_id = self.id_of(record.key)
        self._close_with(record, ask_id)
        row = {
            "run_id": self._keys.run_id,
            "id": ask_id,
            "name": name,
            "place": record.key.replace("@approval ", "", 1),
            "question": self._recording.sealed(question),
            "left_seconds": limits.timeout_seconds,
        }
        escalates = limits.escalate_after_seconds is not None
        seconds = limits.escalate_after_seconds if escalates else limits.timeout_seconds
        await self._waits.begin(record, seconds, (ASK, row))
        if await self._waits.until(lambda: self._waits.take(record, ask_id), record, limited=seconds is not None):
            return
        if not escalates:
            await self._too_late(record, ask_id, name)
            return
        entry = self._recording.row(Kind.DONE, record.key, position=record.position, body=NO_DECISION)
        await self._recording.end((ESCALATE, {"run": self._keys.run_id, "ask": ask_id}), row=entry)
        record.state, record.seq, record.output = StepState.DONE, entry["seq"], NO_DECISION

    async def go_on(self, record: StepRecord, name: str, asked_by: str, *, limited: bool, withdrawn: bool) -> None:
        """Wait for the decision of an ask that was escalated; where it is withdrawn, only if it is there already.

        Raises:
            StepFailed: there was no decision in time.
        """
        ask_id = self.id_of(asked_by)
        self._close_with(record, ask_id)
        if record.seq == 0:
            (found,) = await self._recording.read(ASK_LEFT, {"run": self._keys.run_id, "ask": ask_id})
            seconds = 0.0 if withdrawn else found.seconds
            await self._waits.begin(record, None if seconds is None else max(0.0, seconds))
        limited = limited or withdrawn
        if not await self._waits.until(lambda: self._waits.take(record, ask_id), record, limited=limited):
            await self._too_late(record, ask_id, name)

    async def given_up(self, label: str, record: StepRecord) -> Exception | None:
        """The function does not wait for the decision any longer, so none is accepted; None where one is there."""
        if await self._close(record, GIVEN_UP):
            return step_failed(label, record.key, StepState.FAILED, GIVEN_UP)
        taken = record.in_doubt
        if taken is not None and (found := await self._recording.find(taken["seq"])) is not None:
            record.state, record.seq, record.output = StepState.DONE, taken["seq"], found[1]
        return None

    async def _too_late(self, record: StepRecord, ask_id: str, name: str) -> None:
        error = EXPIRED | {"detail": f"no decision on {name} in time"}
        if await self._close(record, error):
            label = record.key.rpartition("/")[2].rpartition(":")[0]
            raise step_failed(label, record.key, StepState.FAILED, error)
        await self._waits.take(record, ask_id)  # the decision was faster

    async def _close(self, record: StepRecord, error: dict[str, Any]) -> bool:
        """Record that the wait failed, unless the ask is decided; whether it did."""
        info = {"error": error, **({"input": record.input} if record.seq == 0 else {})}
        row = self._recording.row(Kind.FAILED, record.key, position=record.position, info=info)
        if not await self._recording.claim(row, *record.closing):
            return False
        record.state, record.seq, record.error = StepState.FAILED, row["seq"], error
        return True

    def _close_with(self, record: StepRecord, ask_id: str) -> None:
        run = self._keys.run_id
        message = {"run_id": run, "id": ask_id, "name": ask_id, "body": NO_DECISION, "received_by": record.key}
        record.closing = ((SETTLE, message), (CLOSE_ASK, {"run": run, "ask": ask_id}))
