"""One run, executed by one worker: what its function may call, and how its end is decided.

The end of an execution is decided in one place, `_decide`, and against the record: first what the run was told from
outside, then what its record has and the function did not read, and only then what the function returned or raised.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from mainstay.core import Clock, ConfigurationError, bind_journal, cancelled_from_outside
from mainstay.workflow._attempts import Attempts
from mainstay.workflow._branch import Branch, current_branch
from mainstay.workflow._children import Children
from mainstay.workflow._effects import Effects, or_parked
from mainstay.workflow._execution import Execution
from mainstay.workflow._history import History, Keys, StepState
from mainstay.workflow._last_words import LastWords
from mainstay.workflow._primitives import Primitives
from mainstay.workflow._recording import Recording
from mainstay.workflow._replay import Replay
from mainstay.workflow._surroundings import Surroundings
from mainstay.workflow._verdict import (
    CANCELLED,
    EXPIRED,
    describe,
    error_text,
    misconfigured,
)
from mainstay.workflow._waits import Waits
from mainstay.workflow._way_back import WayBack
from mainstay.workflow.errors import (
    CancelRequested,
    CompensationExhausted,
    Continued,
    ControlFlow,
    Lost,
    Parked,
    Released,
    Suspended,
)
from mainstay.workflow.workflow import AnyWorkflow, RunStatus

_log = logging.getLogger("mainstay.workflow")

T = TypeVar("T")

End = tuple[RunStatus, str | None, dict[str, Any] | None]


class Run:
    """One claim of one run.

    Args:
        row: of the table.
        held: whether the worker's lease is good, by this machine's monotonic clock.
    """

    def __init__(
        self,
        row: Mapping[str, Any],
        *,
        workflow: AnyWorkflow,
        history: History,
        recording: Recording,
        held: Callable[[], bool],
        surroundings: Surroundings,
    ) -> None:
        self.id: str = row["id"]
        self.epoch: int = row["epoch"]
        self.workflow = workflow
        self.status = RunStatus.RUNNING
        self._input: str = row["input"]
        self._failure: dict[str, Any] | None = json.loads(row["failure"]) if row.get("failure") else None
        self._cancel = bool(row["cancel_requested"])
        self._why = CANCELLED
        self._deadline = _deadline(surroundings.clock, row.get("left_seconds"))
        self._limit_seconds = _limit_seconds(row)
        self._history = history
        self._keys = Keys(self.id, row.get("generation", 1))
        self._next: Continued | None = None
        self._recording = recording
        self._last = LastWords(self.id, self.epoch, row.get("parent"), recording=recording, around=surroundings)
        self._around = surroundings
        self._going_back = self._failure is not None
        self._held = held
        self._news: int = row.get("news", 0)
        self.told: ControlFlow | None = None
        self._replay = Replay(history)
        self._begin()

    def _begin(self) -> None:
        """Begin an execution: of the function, or of the way back. What is left of the one before has ended."""
        around = self._around
        self._execution = Execution(
            around.clock,
            held=self._held,
            may_cancel=self._may_cancel,
            suspend_after_seconds=around.suspend_after_seconds,
        )
        if self.told is not None:
            self._execution.stop(self.told)
        effects = Effects(
            self._keys, execution=self._execution, recording=self._recording, history=self._history, around=around
        )
        self._attempts = Attempts(
            self.id,
            execution=self._execution,
            recording=self._recording,
            history=self._history,
            clock=around.clock,
            effects=effects,
        )
        self._waits = Waits(
            self.id, execution=self._execution, recording=self._recording, clock=around.clock, news=self._news
        )
        self._children = Children(
            self._keys,
            execution=self._execution,
            recording=self._recording,
            attempts=self._attempts,
            waits=self._waits,
            around=around,
        )

    # What the worker does to it

    def stop(self, signal: ControlFlow) -> None:
        """End the execution at its next boundary between attempts; waits end at once."""
        if self.told is None or isinstance(signal, Lost):
            self.told = signal
        self._execution.stop(signal)

    def cancel(self) -> None:
        """Cancel the run at its next boundary, unless it is on its way back or past a pivot."""
        self._cancel = True
        if self._may_cancel():
            self._execution.wake()

    def _expire(self) -> None:
        """The run has had its time: it fails at the next boundary where it could be cancelled."""
        self._why = EXPIRED | {"detail": f"the run did not end within {self._limit_seconds:g} s"}
        self.cancel()

    def make_room(self) -> None:
        """Others want this run's place: it leaves the memory where all of it waits for what may take long."""
        self._execution.make_room()

    def look(self) -> None:
        """There is something new for the run."""
        self._execution.look()

    async def execute(self) -> End | None:
        """Take the run as far as it goes: status, result as JSON and failure of its end, or None if it has none yet."""
        timer = None
        if self._deadline is not None:
            left = self._deadline - self._around.clock.monotonic()
            if left > 0:
                timer = self._around.clock.call_later(left, self._expire)
            else:
                self._expire()
        try:
            return await self._to_its_end()
        except ControlFlow as signal:
            await self._leave(signal)
            return None
        except asyncio.CancelledError:
            await self._leave(Released())
            raise
        finally:
            if timer is not None:
                timer.cancel()
            self._execution.end()
            await self._recording.close()

    async def _to_its_end(self) -> End | None:
        output: str | None = None
        if self._failure is None:
            output = await self._forward()
        if self._failure is None:
            # An unknown step is not left behind, even where the function found another way.
            await self._back(only_unknown=True)
            try:
                if self._next is not None:
                    await self._last.go_on(self._next, unless_cancelled=self._history.has_way_back)
                    return None
                return await self._end(RunStatus.COMPLETED, output, unless_cancelled=self._history.has_way_back)
            except CancelRequested:  # accepted elsewhere, after this worker's last look
                await self._fail(self._why)
        assert self._failure is not None  # noqa: S101  without one it has ended above
        self.status = RunStatus.COMPENSATING
        await self._back(only_unknown=False)
        return await self._end(RunStatus.CANCELLED if self._failure.get("cancelled") else RunStatus.FAILED, None)

    async def _forward(self) -> str | None:
        """Execute the function; its result as JSON, or None and a failure that is durable."""
        if self.told is not None or self._may_cancel():
            return await self._decide(None, None, self.told)
        signature = self.workflow.signature
        try:
            arguments = signature.fit_arguments(self._recording.opened(self._input) or "{}")
        except ValueError as error:
            msg = f"the input does not fit {self.workflow!r} any more: {error}"
            raise Parked(msg) from error
        execution = self._execution
        result: Any = None
        cause: BaseException | None = None
        try:
            result = await execution.drive(self._call(arguments))
        except BaseException as error:  # noqa: BLE001  the record decides what it means
            cause = error
        stopped = execution.stopped
        execution.end()
        if isinstance(cause, asyncio.CancelledError) and cancelled_from_outside():
            raise cause
        await execution.quiet()  # a step in a task that outlives the function is a part of the run all the same
        return await self._decide(result, cause, stopped)

    async def _call(self, arguments: Mapping[str, Any]) -> Any:
        primitives = Primitives(
            self._keys,
            replay=self._replay,
            execution=self._execution,
            recording=self._recording,
            attempts=self._attempts,
            waits=self._waits,
            children=self._children,
            around=self._around,
        )
        token = current_branch.set(Branch(primitives, ""))
        try:
            with bind_journal(primitives):
                return await self.workflow.signature.call(arguments)
        finally:
            current_branch.reset(token)

    async def _decide(self, result: Any, cause: BaseException | None, stopped: ControlFlow | None) -> str | None:
        """What the end of the function means.

        Raises:
            ControlFlow: nothing: the execution was told to stop, or the record has more than the function read.
        """
        if (stopped is None or isinstance(stopped, Continued)) and self._may_cancel():
            stopped = CancelRequested()
        if isinstance(stopped, CancelRequested):
            self._cancel = True  # accepted elsewhere, it may be known by the refusal of a pivot only
            if not self._may_cancel():  # a pivot beside the branch that was told was done meanwhile: only forward
                raise Released
            await self._fail(self._why)
            return None
        if isinstance(stopped, Continued):
            self._replay.ended("the function went on with new input")
            if stopped.workflow != self.workflow.name:
                msg = (
                    f"the function went on as workflow {stopped.workflow!r}: a run stays one of {self.workflow.name!r}"
                )
                raise Parked(msg)
            self._next = stopped
            return None
        if stopped is not None:
            raise stopped
        if cause is None:
            self._replay.complete("the function ended")
            return or_parked(self.workflow.signature.keep_result, result)[0]
        failure = describe(cause)
        if isinstance(cause, ConfigurationError):
            raise misconfigured(self.workflow.signature.name, failure) from cause
        if not isinstance(cause, Exception | asyncio.CancelledError):
            _log.warning("run %s: its function raised what is no Exception", self.id, exc_info=cause)
        self._replay.complete(f"the function ended by {error_text(failure)}")
        if self._history.pivoted:
            self._attempts.reopen(cause)
            msg = f"failed after its pivot, so there is no way back: {error_text(failure)}"
            raise Parked(msg) from cause
        await self._fail(failure)
        return None

    async def _fail(self, failure: dict[str, Any]) -> None:
        """From here on the run only goes back, in whichever process."""
        _log.info("run %s fails with %s and is compensated", self.id, error_text(failure))
        self._failure = failure
        await self._last.fail(failure)

    async def _back(self, *, only_unknown: bool) -> None:
        records = self._history.records.values()
        if only_unknown and not any(record.state is StepState.UNKNOWN for record in records):
            return
        self._going_back = True
        self._begin()
        way_back = WayBack(
            self._keys,
            history=self._history,
            attempts=self._attempts,
            steps=self._around.steps,
            undo_child=self._children.undo,
        )
        await way_back.undo(only_unknown=only_unknown)

    # How it leaves the worker

    async def _end(self, status: RunStatus, output: str | None, *, unless_cancelled: bool = False) -> End:
        await self._last.end(status, output, self._failure, unless_cancelled=unless_cancelled)
        self.status = status
        return status, output, self._failure

    async def _leave(self, signal: ControlFlow) -> None:
        """Give the run back in the state that what ended its execution asks for."""
        if isinstance(signal, Lost):
            _log.info("run %s: another worker owns it by now", self.id)
        elif isinstance(signal, Parked):
            await self._park(RunStatus.PARKED, str(signal))
        elif isinstance(signal, CompensationExhausted):
            await self._park(RunStatus.COMPENSATION_FAILED, str(signal))
        elif isinstance(signal, Suspended):
            await self._release(max(0.0, signal.until - self._around.clock.monotonic()))
        else:
            await self._release(0.0)

    async def _park(self, status: RunStatus, note: str) -> None:
        _log.error("run %s of %s is %s: %s", self.id, self.workflow.name, status, note)
        await self._last.park(status, note, cancellable=self._has_way_back())
        self.status = status

    async def _release(self, delay: float) -> None:
        if self._deadline is not None:
            delay = min(delay, max(0.0, self._deadline - self._around.clock.monotonic()))
        await self._last.release(delay, seen=self._waits.seen, knows=self._cancel)

    def _may_cancel(self) -> bool:
        return self._cancel and self._has_way_back()

    def _has_way_back(self) -> bool:
        return not self._going_back and self._history.has_way_back


def _limit_seconds(row: Mapping[str, Any]) -> float:
    """How long the run may take, where it has a deadline."""
    if row.get("deadline") is None:  # started here, so what is left is all of it
        return float(row.get("left_seconds") or 0.0)
    return round(float(row["deadline"] - row["created_at"]), 3)


def _deadline(clock: Clock, left_seconds: float | None) -> float | None:
    return None if left_seconds is None else clock.monotonic() + left_seconds
