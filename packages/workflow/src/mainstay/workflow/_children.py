"""Children of a run: workflows that its function awaits, each a run of its own."""

from __future__ import annotations

import json
from typing import Any

from mainstay.core import current
from mainstay.workflow._attempts import Attempts
from mainstay.workflow._execution import Execution
from mainstay.workflow._history import Keys, Kind, StepRecord, StepState, recall
from mainstay.workflow._recording import Recording
from mainstay.workflow._surroundings import Surroundings
from mainstay.workflow._verdict import (
    CANCELLED,
    UNDONE,
    step_failed,
)
from mainstay.workflow._waits import Waits
from mainstay.workflow.errors import (
    CompensationExhausted,
)
from mainstay.workflow.tables import (
    CANCEL,
    CANCEL_LATER,
    CANCEL_PARKED,
    CHILD,
    ENTRIES,
    START_QUIETLY,
    UNDO_ENDED,
    new_run,
)
from mainstay.workflow.workflow import AnyWorkflow, RunStatus

# What a terminated child did is left to the person who ended it so.
_NOTHING_LEFT = frozenset({RunStatus.FAILED, RunStatus.CANCELLED, RunStatus.TERMINATED})


class Children:
    """Starts children, waits for them, and undoes them."""

    def __init__(
        self,
        keys: Keys,
        *,
        execution: Execution,
        recording: Recording,
        attempts: Attempts,
        waits: Waits,
        around: Surroundings,
    ) -> None:
        self._keys = keys
        self._execution = execution
        self._recording = recording
        self._attempts = attempts
        self._waits = waits
        self._around = around

    async def result(self, workflow: AnyWorkflow, record: StepRecord) -> None:
        """Start a child, wait for its end and record that.

        Raises:
            WorkflowFailed: it failed, was cancelled or was terminated.
        """
        child_id = self._child_of(record)
        if record.seq == 0:
            row = self._recording.row(Kind.WAIT, record.key, position=record.position, body=record.input)
            child = new_run(
                id=child_id,
                workflow=workflow.name,
                version=workflow.version,
                input=self._recording.sealed(record.input or "{}", child_id) or "{}",
                context=json.dumps(current().to_dict()),
                parent=(self._keys.run_id, self._keys.generation),
                left_seconds=workflow.timeout_seconds,
            )
            record.seq, record.waits = row["seq"], True
            await self._recording.end((START_QUIETLY[self._around.database.dialect], child), row=row)
            self._around.wake(child_id)
        ended = await self._waits.child(child_id, record.key)
        if ended.status == RunStatus.COMPLETED:
            output = self._recording.opened(ended.output, child_id)
            row = self._recording.row(Kind.DONE, record.key, position=record.position, body=output)
            record.state, record.seq, record.output = StepState.DONE, row["seq"], output
            self._recording.settle(row, executed=False)
            return
        error = {"run": child_id, **(json.loads(ended.failure) if ended.failure else CANCELLED)}
        state = StepState.UNKNOWN if ended.status == RunStatus.TERMINATED else StepState.FAILED
        self._attempts.give_up(record, state, error)
        raise step_failed(workflow.name, record.key, state, error)

    async def undo(self, record: StepRecord) -> None:
        """Cancel a child that goes on, compensate one that is completed, and wait until that is done."""
        child_id = self._child_of(record)
        while True:
            await self._execution.boundary()
            (found,) = await self._recording.read(CHILD, {"run": self._keys.run_id, "child": child_id})
            if found.status is None and record.state is StepState.DONE:
                msg = f"child {child_id} is kept no longer, so it cannot be undone here: undo by hand what it did"
                raise CompensationExhausted(msg)
            if found.status is None or found.status in _NOTHING_LEFT:
                return
            entries = await self._recording.read(ENTRIES, {"ids": [child_id]})
            past = recall(dict(entry._mapping) for entry in entries)
            if past.pivoted and found.status == RunStatus.COMPLETED:
                msg = f"child {child_id} is past its pivot and cannot be undone"
                raise CompensationExhausted(msg)
            change: tuple[Any, dict[str, Any]]
            if found.status == RunStatus.COMPLETED:
                change = UNDO_ENDED, {"run": child_id, "failure": json.dumps(UNDONE)}
            elif found.status == RunStatus.PARKED:
                change = (CANCEL_PARKED if past.pivot_in_question is None else CANCEL_LATER), {"run": child_id}
            else:
                change = CANCEL, {"run": child_id}
            if not past.pivoted:  # while a pivot is in question the child keeps in mind that it is to be cancelled
                await self._recording.end(change)
                self._around.cancel(child_id)
                self._around.wake(child_id)
            await self._waits.child(child_id, f"{record.key} undone")

    def _child_of(self, record: StepRecord) -> str:
        return self._keys.of_child(record.key)
