"""Branches side by side: each is a task of its own, and numbers what happens in it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any

from mainstay.workflow._branch import Branch, current_branch
from mainstay.workflow._execution import Execution
from mainstay.workflow._history import Kind, StepState
from mainstay.workflow._recording import Recording
from mainstay.workflow._replay import Replay
from mainstay.workflow._verdict import NoException, describe, error_text
from mainstay.workflow.errors import Parked


async def side_by_side(
    branches: Sequence[Branch],
    awaitables: Sequence[Awaitable[Any]],
    *,
    execution: Execution,
    replay: Replay,
    recording: Recording,
) -> tuple[Any, ...]:
    """Await each in its branch; all of them end before the error of the first one is raised."""
    loop = asyncio.get_running_loop()
    execution.active += len(branches) - 1
    tasks = [
        loop.create_task(_ends(inner, awaitable, execution, replay, recording), name=f"branch {inner.prefix}")
        for inner, awaitable in zip(branches, awaitables, strict=True)
    ]
    cancelled: asyncio.CancelledError | None = None
    try:
        while pending := [task for task in tasks if not task.done()]:
            try:
                await asyncio.wait(pending)
            except asyncio.CancelledError as error:
                cancelled = error
                for task in pending:
                    task.cancel()
    finally:
        for task in tasks:
            task.cancel()
        execution.active += 1
    if execution.stopped is not None:
        if cancelled is not None and execution.ended_from_outside():
            raise cancelled
        raise await execution.told()
    ends = [task.result() for task in tasks if not task.cancelled()]
    errors = [error for error, _ in ends if error is not None]
    if errors:
        raise errors[0]
    if len(ends) < len(tasks):
        raise cancelled or asyncio.CancelledError
    return tuple(result for _, result in ends)


async def _ends(
    branch: Branch, awaitable: Awaitable[Any], execution: Execution, replay: Replay, recording: Recording
) -> tuple[BaseException | None, Any]:
    """The error or the result of one branch. Nothing but a cancellation is raised: it would end the loop."""
    current_branch.set(branch)

    async def run() -> Any:
        return await awaitable

    error: BaseException | None = None
    result: Any = None
    try:
        try:
            result = await execution.closable(run())
        except asyncio.CancelledError:
            raise
        except Exception as raised:  # noqa: BLE001  the gather raises it
            error = raised
        except BaseException as raised:  # noqa: BLE001  the same; what ends the execution is told by that
            error = NoException(raised)
        _end_of(branch, error, execution, replay, recording)
    finally:
        execution.active -= 1
        execution.consider_leaving()
    return error, result


def _end_of(
    branch: Branch, error: BaseException | None, execution: Execution, replay: Replay, recording: Recording
) -> None:
    """Record that a branch ended, or stop where it ended otherwise than on record: no other may go on beside it."""
    if execution.stopped is not None:
        return
    try:
        record = replay.branch_ended(branch, by="" if error is None else error_text(describe(error)))
    except Parked as signal:
        execution.stop(signal)
        return
    if record is not None:
        row = recording.row(Kind.DONE, record.key, position=record.position)
        record.state, record.seq = StepState.DONE, row["seq"]
        recording.settle(row, executed=False)
