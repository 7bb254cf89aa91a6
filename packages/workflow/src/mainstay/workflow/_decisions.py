"""What a person decides about a run, each in one transaction that holds the run's row."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn

from sqlalchemy.ext.asyncio import AsyncSession

from mainstay.core import current
from mainstay.workflow._branch import shared_commit
from mainstay.workflow._history import COMPENSATION, History, Kind, recall, step_of
from mainstay.workflow._verdict import TERMINATED, UNDONE
from mainstay.workflow.errors import RunNotFound, RunStateError
from mainstay.workflow.tables import (
    APPEND_ONCE,
    CANCEL,
    CANCEL_PARKED,
    CHILDREN_GOING_ON,
    CLOSE_ASKS,
    ENTRIES,
    HOLD,
    NEXT_SEQ,
    RESUME,
    ROUSE,
    STATES,
    TERMINATE,
    UNDO_ENDED,
)
from mainstay.workflow.workflow import RunStatus

_SHARES = "this would be rolled back with it, as it shares its commit: decide it in a step that is not transactional"


async def hold(session: AsyncSession, id: str) -> Any:
    """The row of a run, held until the end of the transaction.

    Raises:
        RunNotFound: there is none.
    """
    found = (await session.execute(HOLD, {"run": id})).one_or_none()
    if found is None:
        msg = f"there is no run {id!r}"
        raise RunNotFound(msg)
    return found


async def cancel(session: AsyncSession, id: str) -> None:
    """Ask for a cancellation; a parked run goes back at once.

    Raises:
        RunStateError: it has ended, is stuck on its way back, or a pivot of it is done or may be.
        RunNotFound: it does not exist.
    """
    row = await hold(session, id)
    past = await _history(session, id)
    pivot = past.pivot_in_question
    if past.pivoted:
        refuse(id, "cancelled", "it is past its pivot")
    elif row.status in {"queued", "running"}:
        shared = shared_commit()
        if shared is not None and shared.run_id == id and shared.unless_cancelled:
            refuse(id, "cancelled", f"its pivot is being executed, and {_SHARES}")
        await session.execute(CANCEL, {"run": id})
    elif pivot is not None:
        why = f"its pivot {pivot.key} may have taken effect: resume it, and its pivot is attempted again"
        refuse(id, "cancelled", why)
    elif row.status == "parked":
        await session.execute(CANCEL_PARKED, {"run": id})
    else:
        refuse(id, "cancelled", f"it is {row.status}")


async def compensate(session: AsyncSession, id: str) -> None:
    """Undo a run, also one that is completed. Raises what `cancel` does."""
    row = await hold(session, id)
    if row.status != "completed":
        await cancel(session, id)
        return
    past = await _history(session, id)
    if past.pivoted:
        refuse(id, "compensated", "it is past its pivot")
    forks = (await session.execute(STATES, {"ids": sorted(past.forks)})).all() if past.forks else ()
    standing = [fork.id for fork in forks if fork.status not in {"failed", "cancelled"}]
    if standing:
        refuse(id, "compensated", f"{', '.join(standing)} was forked from it and uses its steps: compensate that first")
    await session.execute(UNDO_ENDED, {"run": id, "failure": json.dumps(UNDONE)})


async def resume(session: AsyncSession, id: str) -> None:
    """Let a parked run go on where it stopped.

    Raises:
        RunStateError: it is not parked.
        RunNotFound: it does not exist.
    """
    row = await hold(session, id)
    if not RunStatus(row.status).waits_for_a_person:
        refuse(id, "resumed", f"it is {row.status}")
    await session.execute(RESUME, {"run": id})
    await add(session, id, Kind.RESUMED, "")


async def retry_from(session: AsyncSession, id: str, step: str) -> None:
    """Let a parked run go on from a step.

    Raises:
        RunStateError: it is not parked on its way forward, or the step cannot be attempted again.
        RunNotFound: it does not exist.
    """
    what = f"retried from {step}"
    row = await hold(session, id)
    if row.status != RunStatus.PARKED:
        refuse(id, what, f"it is {row.status}, and not parked")
    if row.failure is not None:
        refuse(id, what, "it is on its way back")
    past = await _history(session, id)
    record = past.records.get(step)
    if record is None or record.position is None or step_of(step).startswith("@"):
        refuse(id, what, "it has no such step: `show` lists the keys of its steps, such as charge:1")
    if record.inherited:
        refuse(id, what, f"it has that step from the run that it was forked from, as {record.inherited}")
    if record.exactly_once:
        refuse(id, what, "that step is transactional, and done exactly once: name a later one")
    for each in past.from_step(step):
        if each.pivot and each.may_have_happened:
            refuse(id, what, f"its pivot {each.key} took effect or may have, and is never attempted twice")
        if each.key + COMPENSATION in past.records:
            refuse(id, what, f"{each.key} is undone already, or in part")
    await session.execute(RESUME, {"run": id})
    await add(session, id, Kind.RETRIED, step)


async def terminate(session: AsyncSession, id: str, reason: str) -> Mapping[str, str]:
    """End a run and the children that it waits for, without undoing anything.

    Returns:
        The workflow of each run that this ended, by id.

    Raises:
        RunStateError: it has ended.
        RunNotFound: it does not exist.
        ValueError: there is no reason.
    """
    if not reason.strip():
        msg = f"run {id!r} is terminated for a reason: reason={reason!r} is none"
        raise ValueError(msg)
    row = await hold(session, id)
    if RunStatus(row.status).terminal:
        refuse(id, "terminated", f"it is {row.status}")
    by = current().actor
    told = f"{by}: {reason}" if by else reason
    ended: dict[str, str] = {}
    left: list[tuple[str, Any, str]] = [(id, row, told)]
    while left:
        run_id, held, detail = left.pop(0)
        shared = shared_commit()
        if shared is not None and shared.run_id == run_id:
            refuse(id, "terminated", f"a transactional step of {run_id} is being executed, and {_SHARES}")
        failure = _terminated(held.failure, by, reason, detail)
        await session.execute(TERMINATE, {"run": run_id, "failure": json.dumps(failure)})
        await session.execute(CLOSE_ASKS, {"run": run_id})
        ended[run_id] = held.workflow
        # Asked after its row is held: a worker that is starting a child has done so by now, or does not any more.
        children = (await session.execute(CHILDREN_GOING_ON, {"run": run_id})).all()
        left += [(child.id, child, f"with its parent {run_id}, {told}") for child in children]
    if row.parent is not None:
        await session.execute(ROUSE, {"run": row.parent})
    return ended


async def _history(session: AsyncSession, id: str) -> History:
    entries = (await session.execute(ENTRIES, {"ids": [id]})).mappings()
    return recall(entries)  # type: ignore[arg-type]  # a mapping of columns by name


async def add(session: AsyncSession, id: str, kind: Kind, step: str, *, info: Mapping[str, Any] | None = None) -> None:
    """Add what a person decided to the history of a run that is held, and that no worker executes."""
    seq = (await session.execute(NEXT_SEQ, {"run": id})).scalar_one()
    entry = {"run_id": id, "seq": seq, "kind": kind, "step": step, "position": None, "body": None}
    entry["info"] = None if info is None else json.dumps(info)
    await session.execute(APPEND_ONCE, entry)


def refuse(id: str, what: str, why: str) -> NoReturn:
    """Refuse a decision, with its reason."""
    msg = f"run {id!r} cannot be {what}: {why}"
    raise RunStateError(msg)


def _terminated(before: str | None, by: str | None, reason: str, detail: str) -> Mapping[str, Any]:
    """What is kept: who and why, and the failure that the run was on its way back from."""
    kept: dict[str, Any] = {"type": TERMINATED, "detail": detail, "reason": reason}
    if by is not None:
        kept["by"] = by
    if before is not None:
        kept["before"] = json.loads(before)
    return kept
