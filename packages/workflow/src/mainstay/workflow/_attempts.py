"""Getting work done durably: a step, a compensation, or another package's effect, attempt by attempt.

An attempt is done, failed or unknown. What came of it is decided by `_verdict`; here it is recorded, and
then repeated, asked about, or given up.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard, TypeVar, cast

from mainstay.core import (
    Clock,
    ConfigurationError,
    FullJitter,
    MainstayError,
    Outcome,
    Retry,
    RetryState,
    retry_if_retryable,
)
from mainstay.database import CommitUnknown, DatabaseError
from mainstay.workflow._effects import Attempt, Effects, Work, or_parked
from mainstay.workflow._execution import Execution
from mainstay.workflow._history import History, Kind, StepRecord, StepState
from mainstay.workflow._insistence import worth_repeating
from mainstay.workflow._metrics import count_step
from mainstay.workflow._reach import Interrupted
from mainstay.workflow._recording import Recording
from mainstay.workflow._verdict import (
    GIVEN_UP,
    SHORTEST_WAIT,
    delay_or_parked,
    describe,
    error_text,
    failed_for_good,
    misconfigured,
    nothing_happened,
    rejection_seconds,
    step_failed,
)
from mainstay.workflow.errors import Parked, PayloadNotStored, StepFailed
from mainstay.workflow.outcome import Done, Failed, Unknown
from mainstay.workflow.step import StepPolicy, any_error

_log = logging.getLogger("mainstay.workflow")

T = TypeVar("T")


def _if_retryable_ours(retry_state: RetryState, /) -> bool:
    error = retry_state.outcome.exception()
    return isinstance(error, MainstayError) and error.retryable


# An effect of another package, such as a publish: its errors are typed, so a bug is not tried ten times.
EFFECT = StepPolicy(retry=Retry(attempts=10, wait=FullJitter(0.1, 10.0), retry=_if_retryable_ours), one_call=True)
_PROBE = Retry(attempts=5, wait=FullJitter(0.2, 5.0))
_NEVER_AGAIN = (retry_if_retryable, any_error, _if_retryable_ours)  # no result is worth another attempt to these
_BROKEN_OFF = "a worker died, or was stopped, during an attempt"
_ASKED_AGAIN: dict[str, Any] = {"type": "Result", "detail": "asks for another attempt"}


class Exhausted(Exception):
    """Work ended without a result; whether it may have happened, and its last error."""

    def __init__(self, cause: BaseException | None, error: dict[str, Any], *, maybe: bool) -> None:
        super().__init__(error)
        self.cause = cause
        self.error = error
        self.maybe = maybe


@dataclass(slots=True)
class _Pace:
    """How long the attempts of one execution have taken.

    Attributes:
        began: when the first one began, on the clock's monotonic time.
        waited: seconds between them.
        repeated: how often the database was asked again, which is no attempt.
    """

    began: float
    waited: float = 0.0
    repeated: int = 0


class Attempts:
    """The attempts of one execution of a run."""

    def __init__(
        self,
        run_id: str,
        *,
        execution: Execution,
        recording: Recording,
        history: History,
        clock: Clock,
        effects: Effects,
    ) -> None:
        self._run_id = run_id
        self._execution = execution
        self._recording = recording
        self._history = history
        self._clock = clock
        self._effects = effects

    async def settle(self, work: Work, record: StepRecord) -> Any:
        """Do the work of a step and record its outcome.

        Raises:
            StepFailed: it ended without a result.
            ControlFlow: the execution ends here.
        """
        try:
            if work.entry:
                return await self._as_entry(work, record)
            return await self.until_done(work, record)
        except Exhausted as end:
            state = StepState.UNKNOWN if end.maybe else StepState.FAILED
            self.give_up(record, state, end.error, input=work.input)
            count_step(work.name, state)
            raise step_failed(work.name, record.key, state, end.error) from end.cause

    def give_up(self, record: StepRecord, state: StepState, error: dict[str, Any], *, input: str | None = None) -> None:
        """Record that a step ended without a result."""
        info = {"error": error, **({"input": input} if record.seq == 0 and input else {})}
        row = self._recording.row(Kind(state), record.key, position=record.position, info=info)
        record.state, record.seq, record.error, record.dangling = state, row["seq"], error, False
        self._recording.settle(row, executed=False)

    def reopen(self, cause: BaseException | None) -> None:
        """Let the step whose failure the function could not deal with be attempted again after a resume."""
        record = self._history.records.get(_failed_step(cause))
        if record is not None:
            row = self._recording.row(Kind.REOPENED, record.key, position=record.position)
            self._recording.settle(row, executed=False)

    async def given_up(self, label: str, record: StepRecord) -> Exception | None:
        """The function does not wait for this any longer; on replay it will see the same. None where it is done.

        Raises:
            Parked: it is a pivot of which it is unknown whether it took effect.
        """
        if record.pivot and record.in_question:
            msg = (
                f"the function gave up waiting for {record.key}, a pivot, and it is unknown whether it took effect. "
                "Resume the run to go on with it"
            )
            raise Parked(msg)
        error = GIVEN_UP
        if (row := record.in_doubt) is not None:  # a write of ours may be on its way, so one of the two is refused
            refusal = self._recording.filled(row | {"kind": Kind.FAILED}, None, {"error": error})
            if not await self._recording.claim(refusal):
                found = await self._recording.find(row["seq"])
                record.state, record.seq = StepState.DONE, row["seq"]
                record.output = None if found is None else found[1]
                return None
            record.state, record.seq, record.error = StepState.FAILED, row["seq"], error
        else:
            goes_on = record.seq > 0 and label.startswith("@child ")
            state = StepState.UNKNOWN if record.in_question or goes_on else StepState.FAILED
            self.give_up(record, state, error, input=record.input)
        return step_failed(label, record.key, record.state, error)

    async def until_done(self, work: Work, record: StepRecord) -> Any:
        """Attempt the work until it is done, or until its policy says that it is enough.

        Raises:
            Exhausted: it is enough.
        """
        pace = _Pace(self._clock.monotonic())
        if record.dangling or (record.maybe and work.policy.on_unknown == "probe"):
            found = await self._resolve(work, record, _BROKEN_OFF)
            if found is not None:
                return self._done(work, record, found.result, executed=False)
        while True:
            if record.rest_seconds > 0:
                await self._execution.wait(record.rest_seconds)
                record.rest_seconds = 0.0
            await self._execution.boundary()
            try:
                if work.policy.transactional:
                    with self._execution.at_work():
                        return await self._effects.in_the_database(work, record)
                result = await self._effects.outside(work, record)
            except Interrupted as error:
                await self._execution.boundary()  # passes where a pivot beside it was done meanwhile: only forward
                found = await self._resolve(work, record, str(error)) if record.maybe else None
            except (Exception, asyncio.CancelledError) as error:
                if _not_ours(error):
                    raise
                found = await self._failed(work, record, error, pace)
            else:
                delay = self._asks_again(work, record, result, pace)
                if delay is None:
                    return self._done(work, record, result, executed=True)
                record.attempts += 1
                record.maybe = True
                await self._note(work, record, _ASKED_AGAIN, delay, pace)
                found = None
            if found is not None:
                return self._done(work, record, found.result, executed=False)

    async def _failed(self, work: Work, record: StepRecord, error: BaseException, pace: _Pace) -> Done[Any] | None:
        """Face the error of an attempt: the result, where the other side knows one, or None for another attempt.

        Raises:
            Exhausted: there is none any more.
            Parked: a person has to look at it.
        """
        policy, kept = work.policy, describe(error)
        if isinstance(error, ConfigurationError | PayloadNotStored):
            raise misconfigured(record.key, kept) from error
        if _to_be_repeated(error, policy):
            pace.repeated += 1
            await self._repeat(record, error, pace.repeated)
            return None
        delay = rejection_seconds(policy, error, work.own)
        if delay is not None:
            await self._note(work, record, kept, delay, pace, rejected=True)
            return None
        record.attempts += 1
        if not nothing_happened(policy, error, work.own):
            found = await self._resolve(work, record, error_text(kept))
            if found is not None:
                return found
        delay = self._delay(work, record, Outcome.of_error(error), pace)
        if delay is None:
            raise await self._used_up(work, record, error, kept, pace) from error
        await self._note(work, record, kept, delay, pace)
        return None

    async def _used_up(
        self, work: Work, record: StepRecord, error: BaseException, kept: dict[str, Any], pace: _Pace
    ) -> Exhausted | Parked:
        """What ends the attempts."""
        if work.policy.exhausted == "park" and not failed_for_good(work.policy, error):
            await self._note(work, record, kept, 0.0, pace)
            return Parked(
                f"{record.key} used up its {record.attempts} attempts: {error_text(kept)}. Resume the run to give it "
                "all of them again"
            )
        record.dangling = False
        return Exhausted(error, kept, maybe=record.maybe)

    async def _repeat(self, record: StepRecord, error: Exception, times: int) -> None:
        """Wait before the database is asked again: its being away is no outcome of the work."""
        _log.warning("run %s: %s could not be written and will be again: %s", self._run_id, record.key, error)
        state = RetryState(times, Outcome.of_error(error), 0.0)
        await self._execution.wait(max(SHORTEST_WAIT, EFFECT.retry.wait(state)))

    def _delay(self, work: Work, record: StepRecord, outcome: Outcome, pace: _Pace, *, more: int = 0) -> float | None:
        elapsed = self._clock.monotonic() - pace.began
        state = RetryState(record.attempts + more, outcome, elapsed, pace.waited)
        return delay_or_parked(record.key, work.policy, state)

    def _asks_again(self, work: Work, record: StepRecord, result: Any, pace: _Pace) -> float | None:
        """How long to wait before another attempt where a result asks for one, by the policy's `retry`."""
        never = work.policy.retry.retry in _NEVER_AGAIN
        return None if never else self._delay(work, record, Outcome.of_result(result), pace, more=1)

    async def _note(
        self,
        work: Work,
        record: StepRecord,
        error: dict[str, Any],
        delay: float,
        pace: _Pace,
        *,
        rejected: bool = False,
    ) -> None:
        """Make it durable that an attempt ended, so that a crash during the wait neither shortens nor forgets it."""
        pace.waited += delay
        info: dict[str, Any] = {
            "attempts": record.attempts,
            "maybe": record.maybe,
            "error": error,
            "rest_seconds": delay,
        }
        if (record.seq == 0 or rejected) and work.input:
            info["input"] = work.input
        if rejected:
            info |= {"rejected": True, "happened": False}
            record.began -= record.dangling
        _log.info("run %s: %s ended with %s; again in %.3g s", self._run_id, record.key, error_text(error), delay)
        record.error, record.dangling, record.rest_seconds = error, False, delay
        row = self._recording.row(Kind.ATTEMPT, record.key, position=record.position, info=info)
        self._effects.outdate(record)
        record.rejected = (record.seq, row["seq"]) if rejected else ()
        await self._recording.append(row)

    # What became of it

    async def _resolve(self, work: Work, record: StepRecord, why: str) -> Done[Any] | None:
        """Face an attempt that may have taken effect: what it came to, if that can be known, or None to attempt again.

        Raises:
            Parked: the step must not be attempted again without a person.
        """
        record.dangling, record.maybe = False, True
        if work.policy.on_unknown == "compensate":
            return None
        if work.ask is None:
            way = (
                "resume the run to attempt it again with the same key"
                if work.policy.pivot
                else "resume the run to attempt it again with the same key, or cancel it to compensate"
            )
            msg = (
                f'it is unknown whether {record.key} took effect ({why}), and it says on_unknown="park". Find out; '
                f"then {way}"
            )
            raise Parked(msg)
        answer = await self._ask(work, record, work.ask)
        if isinstance(answer, Done):
            return answer
        if isinstance(answer, Unknown):
            msg = (
                f"it is unknown whether {record.key} took effect ({why}), and its probe does not know either: "
                f"{answer.detail}"
            )
            raise Parked(msg)
        record.maybe = False
        return None

    async def _ask(self, work: Work, record: StepRecord, ask: Callable[[], Attempt]) -> Done[Any] | Failed | Unknown:
        attempt = 0
        while True:
            await self._execution.boundary()
            attempt += 1
            answer: Done[Any] | Failed | Unknown
            try:
                with self._execution.at_work():
                    answer = await self._effects.attempt(work, record, attempt, ask)
                outcome = Outcome.of_result(answer)
                detail = answer.detail if isinstance(answer, Unknown) else ""
            except Exception as error:  # noqa: BLE001  a probe that raises does not know
                outcome = Outcome.of_error(error)
                detail = error_text(describe(error))
                answer = Unknown(detail)
            if not isinstance(answer, Unknown):
                return answer
            if attempt >= _PROBE.attempts:
                return Unknown(detail)
            await self._execution.wait(_PROBE.wait(RetryState(attempt, outcome, 0.0)))

    async def _as_entry(self, work: Work, record: StepRecord) -> None:
        """An effect that only writes to the database: its rows and its record are one entry, tried until it is there.

        Raises:
            Exhausted: the effect itself cannot be carried out.
        """
        while True:
            await self._execution.boundary()
            info = {"input": work.input} if work.input else None
            row = record.in_doubt or self._recording.row(Kind.DONE, record.key, position=record.position, info=info)
            record.in_doubt = row
            try:
                with self._execution.at_work():
                    await self._recording.with_effect(
                        row, lambda: self._effects.attempt(work, record, record.attempts + 1, work.call)
                    )
                break
            except Exception as error:
                if not isinstance(error, CommitUnknown):
                    record.in_doubt = None
                if not worth_repeating(error):
                    raise Exhausted(error, describe(error), maybe=False) from error
                record.attempts += 1
                await self._repeat(record, error, record.attempts)
        record.state, record.seq, record.in_doubt = StepState.DONE, row["seq"], None
        count_step(work.name, StepState.DONE)

    def _done(self, work: Work, record: StepRecord, result: Any, *, executed: bool) -> Any:
        body, kept = or_parked(work.keep, result)
        info = {"pivot": True} if work.policy.pivot else None
        row = self._recording.row(Kind.DONE, record.key, position=record.position, body=body, info=info)
        record.state, record.seq, record.output, record.dangling = StepState.DONE, row["seq"], body, False
        self._recording.settle(row, executed=executed)
        count_step(work.name, StepState.DONE)
        self._history.pivoted = self._history.pivoted or work.policy.pivot
        return kept


def nothing(_result: object) -> tuple[str, Any]:
    """The result of work that has none, as JSON."""
    return "null", None


def _to_be_repeated(error: BaseException, policy: StepPolicy) -> TypeGuard[DatabaseError]:
    """Whether the database was away, and doing it again does it once: what is written has the same ids each time."""
    once = policy.transactional or policy is EFFECT
    return once and isinstance(error, DatabaseError) and worth_repeating(error)


def _failed_step(cause: BaseException | None) -> str:
    """The key of the step whose failure is behind an error; empty where there is none."""
    left, seen = [cause], set[int]()
    while left:
        error = left.pop()
        if isinstance(error, StepFailed):
            return error.key
        if error is None or id(error) in seen:  # `raise error from error` makes a circle
            continue
        seen.add(id(error))
        if isinstance(error, BaseExceptionGroup):
            left.extend(reversed(cast("BaseExceptionGroup[BaseException]", error).exceptions))
        left.append(error.__cause__ or error.__context__)
    return ""


def _not_ours(error: BaseException) -> bool:
    """Whether a cancellation is of the task, and not the end of the attempt: made up by the step's code."""
    task = asyncio.current_task()
    return isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling() > 0
