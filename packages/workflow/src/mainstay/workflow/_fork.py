"""A new run with the input of one that has ended, and with what that one did before a step.

What is inherited stays the original's: its outcomes count, and the new run never undoes them. So nothing is inherited
that was undone, and no run is forked that might undo it yet: the original has ended, and it is not compensated while
runs that were forked from it stand.

What the original left open (a step beside the one that is named, a wait, a child) is not inherited: the new run does it
anew, under keys of its own. A pivot of which it is unknown whether it took effect is never begun a second time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from mainstay.workflow._asks import NO_DECISION
from mainstay.workflow._decisions import add, hold, refuse
from mainstay.workflow._history import (
    COMPENSATION,
    History,
    Keys,
    Kind,
    StepRecord,
    StepState,
    is_child,
    recall,
    step_of,
)
from mainstay.workflow._payloads import Payloads
from mainstay.workflow.errors import RunConflict
from mainstay.workflow.tables import APPEND_ONCE, ENTRIES, FIND, SET_VALUE, START_QUIETLY, VALUES, new_run
from mainstay.workflow.workflow import RunStatus

_ENDED_BACK = frozenset({RunStatus.FAILED, RunStatus.CANCELLED})


async def fork(session: AsyncSession, id: str, before: str, new_id: str, *, payloads: Payloads) -> str | None:
    """Write the new run; its workflow, or None where this fork was made before.

    Raises:
        RunStateError: the original goes on, or cannot be forked there.
        RunNotFound: there is none.
        RunConflict: another run has the id.
        PayloadUnreadable: what is to be inherited cannot be read here.
    """
    await hold(session, id)
    row = (await session.execute(FIND, {"run": id})).one()
    entries = [dict(entry._mapping) for entry in (await session.execute(ENTRIES, {"ids": [id]})).all()]
    past = recall(entries, partial(payloads.open, run_id=id))
    if past.forks.get(new_id) == before and (await session.execute(FIND, {"run": new_id})).one_or_none():
        return None
    original = _Original(row, past, entries)
    inherited = original.before(before)
    new = new_run(
        id=new_id,
        workflow=row.workflow,
        version=row.version,
        input=payloads.seal(payloads.open(row.input, id), new_id),
        context=row.context,
        left_seconds=None if row.deadline is None else row.deadline - row.created_at,
    )
    new["epoch"] = 1  # a run whose first claim is its epoch 1 has no history that would be read
    began: Any = await session.execute(START_QUIETLY[session.get_bind().dialect.name], new)
    if began.rowcount == 0:
        msg = f"run {new_id!r} exists, and is not this fork: an id names one run for as long as that is kept"
        raise RunConflict(msg)
    rows = [original.entry(record, seq, new_id, payloads) for seq, record in enumerate(inherited, 1)]
    if rows:
        await session.execute(APPEND_ONCE, rows)
    await _values(session, id, new_id, inherited, payloads)
    await add(session, id, Kind.FORKED, before, info={"run": new_id})
    return str(row.workflow)


async def _values(
    session: AsyncSession, id: str, new_id: str, inherited: Sequence[StepRecord], payloads: Payloads
) -> None:
    """Publish in the new run what the inherited part published, unless the original has replaced it later."""
    keys = {record.key for record in inherited}
    for value in (await session.execute(VALUES, {"run": id})).all():
        if value.set_by in keys:
            body = payloads.seal(payloads.open(value.body, id), new_id)
            copy = {"run_id": new_id, "name": value.name, "body": body, "set_by": value.set_by}
            await session.execute(SET_VALUE, copy)


@dataclass(frozen=True, slots=True)
class _Original:
    row: Any
    past: History
    entries: Sequence[Mapping[str, Any]]

    def before(self, step: str) -> list[StepRecord]:
        """What began before the step and is settled, in the order in which it began.

        Raises:
            RunStateError: there is no such step, or it cannot be forked there.
        """
        run_id, records, status = self.row.id, self.past.records, RunStatus(self.row.status)
        what = f"forked before {step}"
        if not status.terminal:
            refuse(run_id, what, f"it is {status}, and may undo its steps yet: let it end, or terminate it")
        if self.row.parent is not None:
            refuse(run_id, what, f"it is a child, and undone with its parent: fork {self.row.parent}")
        named = records.get(step)
        if named is None or named.position is None:
            refuse(run_id, what, "it has no such step: `show` lists the keys of its steps, such as charge:1")
        earlier = [each for each in records.values() if each.position is not None and each.first < named.first]
        for each in earlier:
            if each.key + COMPENSATION in records or (self._child(each) and status in _ENDED_BACK):
                refuse(run_id, what, f"{each.key}, which it would inherit, is undone, or in part")
            if each.pivot and each.state is not StepState.DONE and each.in_question:
                refuse(run_id, what, f"its pivot {each.key} may have taken effect, and is never attempted twice")
        settled = sorted((each for each in earlier if each.state is not StepState.OPEN), key=lambda each: each.first)
        continued = {each.input for each in settled if step_of(each.key).startswith("@escalated ")}
        for each in settled:
            if (
                step_of(each.key).startswith("@approval ")
                and each.output == NO_DECISION
                and json.dumps(each.key) not in continued
            ):
                refuse(run_id, what, f"{each.key} was escalated, and not decided before that: fork before {each.key}")
        return settled

    def _child(self, record: StepRecord) -> bool:
        return is_child(record.key) and not record.inherited

    def entry(self, record: StepRecord, seq: int, new_id: str, payloads: Payloads) -> dict[str, Any]:
        """The one entry that says of an inherited step all that counts."""
        settled = next(each for each in self.entries if each["seq"] == record.seq)
        said: dict[str, Any] = json.loads(settled["info"]) if settled["info"] else {}
        info: dict[str, Any] = {name: said[name] for name in ("pivot", "error") if name in said}
        info["inherited"] = record.inherited or Keys(self.row.id, self.row.generation).of(record.key)
        if record.input is not None:
            info["input"] = payloads.seal(record.input, new_id)
        return {
            "run_id": new_id,
            "seq": seq,
            "kind": str(record.state),
            "step": record.key,
            "position": record.position,
            "body": None if record.output is None else payloads.seal(record.output, new_id),
            "info": json.dumps(info),
        }
