"""One attempt at a step: user code runs once, between an intent and what comes of it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from types import CodeType
from typing import Any, TypeVar

from mainstay.core import (
    bind_journal,
    timeout,
)
from mainstay.database import CommitUnknown, FenceLost
from mainstay.workflow._branch import current_branch, sharing_commit
from mainstay.workflow._execution import Execution
from mainstay.workflow._history import History, Keys, Kind, Row, StepRecord, StepState
from mainstay.workflow._metrics import STEP_SECONDS, count_step
from mainstay.workflow._reach import Interrupted
from mainstay.workflow._recording import Recording
from mainstay.workflow._surroundings import Surroundings
from mainstay.workflow._values import Voice, current_voice
from mainstay.workflow._verdict import (
    NoException,
    describe,
)
from mainstay.workflow.errors import CancelRequested, Parked
from mainstay.workflow.step import CompensationInfo, StepInfo, StepPolicy, current_info

_log = logging.getLogger("mainstay.workflow")

T = TypeVar("T")


Attempt = Callable[[], Awaitable[Any]]


@dataclass(slots=True)
class Work:
    """One thing to get done durably.

    Attributes:
        name: for metrics and messages.
        policy: how it is attempted.
        call: makes one attempt ready, by reading what it is given; what it returns is the attempt, the code of others.
        keep: makes JSON of a result, and what reading that JSON gives.
        load: reads a result.
        input: JSON; kept with the first intent.
        undoes: in a compensation, the key of the step that it undoes.
        ask: makes ready to ask the other side what became of an attempt.
        entry: the work only writes to the database, and shares one commit with its record.
        own: the code of the step below policies of ours.
    """

    name: str
    policy: StepPolicy
    call: Callable[[], Attempt]
    keep: Callable[[Any], tuple[str, Any]]
    load: Callable[[str], Any] | None = None
    input: str | None = None
    undoes: str | None = None
    ask: Callable[[], Attempt] | None = None
    entry: bool = False
    own: CodeType | None = None


class Effects:
    """Runs user code, elsewhere or inside the service's own database."""

    def __init__(
        self, keys: Keys, *, execution: Execution, recording: Recording, history: History, around: Surroundings
    ) -> None:
        self._keys = keys
        self._execution = execution
        self._recording = recording
        self._history = history
        self._around = around

    async def outside(self, work: Work, record: StepRecord) -> Any:
        """One attempt at something whose effect is elsewhere."""
        execution = self._execution
        while self._around.executing.full:
            await execution.turn(self._around.executing.waiting)
            await execution.boundary()
        self._around.executing.taken += 1
        try:
            with execution.at_work():
                if work.policy.pivot and self._history.has_way_back:
                    await self._recording.end(row=self._intent(work, record), unless_cancelled=True)
                else:
                    await self._recording.append(self._intent(work, record))
                # From here on the outcome is unknown, until a result or an attempt's end is recorded.
                record.dangling = True
                record.began += 1
                while self._around.unrecorded.full and execution.stopped is None:
                    await execution.turn(self._around.unrecorded.waiting)
                if work.policy.cancellable and execution.cancelled:
                    execution.stop(CancelRequested())
                if execution.stopped is None:
                    return await self.attempt(work, record, record.attempts + 1, work.call)
                # The attempt did not happen, and that is said.
                record.began, record.dangling = record.began - 1, False
                self._stopped(record, happened=False)
            raise await execution.told()
        except Interrupted as error:
            record.dangling, record.maybe, record.error = False, True, describe(error)
            self._stopped(record)
            raise
        finally:
            self._around.executing.give_back()

    def _stopped(self, record: StepRecord, *, happened: bool = True) -> None:
        """The run was told to stop after the intent was written, before the attempt began or while it was executed."""
        info = {
            "attempts": record.attempts,
            "maybe": record.maybe,
            "error": record.error,
            "rest_seconds": 0.0,
            "happened": happened,
        }
        row = self._recording.row(Kind.ATTEMPT, record.key, position=record.position, info=info)
        self._recording.settle(row, executed=False)

    def _intent(self, work: Work, record: StepRecord) -> Row:
        body = work.input if record.seq == 0 or record.rejected else None
        info = {"pivot": True} if work.policy.pivot else None
        row = self._recording.row(Kind.INTENT, record.key, position=record.position, body=body, info=info)
        self.outdate(record)
        record.seq, record.pivot = row["seq"], work.policy.pivot
        return row

    async def attempt(self, work: Work, record: StepRecord, number: int, call: Callable[[], Attempt]) -> Any:
        """Run user code once, outside the run's own branch.

        Raises:
            Parked: what it is to be given cannot be read.
            Interrupted: its run was cancelled.
            NoException: the code raised what is no `Exception`; that decides nothing about the run.
            Exception: the code's own.
        """
        attempt = call()
        if work.policy.cancellable:
            if self._execution.cancelled:
                raise Interrupted
            attempt = partial(self._execution.reach.within, attempt)
        task = asyncio.current_task()
        about = (self._keys.run_id, work.name, self._keys.of(record.key), number)
        info = current_info.set(StepInfo(*about) if work.undoes is None else CompensationInfo(*about, work.undoes))
        branch = current_branch.set(None)
        voice = Voice(self._recording.values, record.key)
        silent = current_voice.set(voice)
        seconds = work.policy.timeout_seconds
        started = time.perf_counter()
        try:
            with bind_journal(None):
                if seconds is None:
                    return await attempt()
                async with timeout(seconds, clock=self._around.clock):
                    return await attempt()
        except (Exception, asyncio.CancelledError):
            raise
        except BaseException as error:
            if isinstance(error, GeneratorExit) and (self._execution.overdue or _current_task() is not task):
                raise  # this coroutine is being closed
            if self._execution.ended_from_outside():
                raise asyncio.CancelledError from error  # the worker's own end, in a group with others
            _log.warning("run %s: %s raised what is no Exception", self._keys.run_id, record.key, exc_info=True)
            raise NoException(error) from error
        finally:
            STEP_SECONDS.observe(time.perf_counter() - started)
            voice.end()
            current_voice.reset(silent)
            current_branch.reset(branch)
            current_info.reset(info)

    async def in_the_database(self, work: Work, record: StepRecord) -> Any:
        """One attempt at a transactional step: its writes and its record share one commit."""
        await self._recording.flush()
        written, kept, body = record.in_doubt is not None, None, None
        executed = False
        unless_cancelled = work.policy.pivot and self._history.has_way_back
        row = record.in_doubt or self._recording.row(Kind.DONE, record.key, position=record.position)
        record.in_doubt = row  # a cancellation may come while the commit is on its way
        try:
            async with self._around.database.transaction():
                with sharing_commit(self._keys.run_id, unless_cancelled=unless_cancelled):
                    result = await self.attempt(work, record, record.attempts + 1, work.call)
                executed = True
                body, kept = or_parked(work.keep, result)
                info = {"input": work.input, **({"pivot": True} if work.policy.pivot else {})}
                self._recording.filled(row, body, info)
                written = True
                await self._recording.within_transaction(row, unless_cancelled=unless_cancelled)
        except Exception as error:
            if isinstance(error, FenceLost) and executed:  # before that it is of a fence of the step's own
                record.in_doubt = None
                raise await self._recording.refused(unless_cancelled=unless_cancelled) from None
            # A commit whose end was not seen: only the history knows.
            found = await self._recording.find(row["seq"]) if written else None
            if found is None:
                if not isinstance(error, CommitUnknown):
                    record.in_doubt = None
                raise
            body = found[1]
            kept = None if work.load is None or body is None else work.load(body)
        record.state, record.seq, record.output, record.in_doubt = StepState.DONE, row["seq"], body, None
        self._history.pivoted = self._history.pivoted or work.policy.pivot
        count_step(work.name, StepState.DONE)
        return kept

    def outdate(self, record: StepRecord) -> None:
        """Leave the entries of a rejection out of the history: the next one says all that they say."""
        if record.rejected:
            self._recording.outdate(record.rejected)
            record.rejected = ()


def _current_task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:  # no loop is running any more
        return None


def or_parked(keep: Callable[..., T], *args: Any) -> T:
    """What cannot be kept as its annotation says is a bug: repaired, the run goes on."""
    try:
        return keep(*args)
    except TypeError as error:
        raise Parked(str(error)) from error
