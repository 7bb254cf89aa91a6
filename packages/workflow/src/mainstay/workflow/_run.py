"""One run, executed by one worker: its steps, its branches, its end, and its way back."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from types import CodeType
from typing import Any, Literal, TypeVar

from mainstay.core import (
    Clock,
    ConfigurationError,
    Effect,
    FullJitter,
    MainstayError,
    Outcome,
    Retry,
    RetryState,
    bind_journal,
    cancelled_from_outside,
    retry_if_retryable,
    timeout,
)
from mainstay.database import CommitUnknown, Database, DatabaseError, FenceLost
from mainstay.workflow._history import (
    ATTEMPT,
    COMPENSATION,
    DONE,
    FAILED,
    INTENT,
    SIGNAL,
    SLEEP,
    UNKNOWN,
    History,
    StepRecord,
    describe,
    step_of,
)
from mainstay.workflow._metrics import STEP_SECONDS, count_step
from mainstay.workflow._recording import Recording, worth_repeating
from mainstay.workflow._verdict import (
    SHORTEST_WAIT,
    NoException,
    error_text,
    may_have_happened,
    misconfigured,
    nothing_happened,
    plain_text,
    rejection_seconds,
    step_failed,
)
from mainstay.workflow.errors import (
    CancelRequested,
    CompensationExhausted,
    ControlFlow,
    Lost,
    Parked,
    Released,
    Suspended,
)
from mainstay.workflow.outcome import Done, Failed, Unknown
from mainstay.workflow.step import Step, StepInfo, StepPolicy, _scope, _step, any_error
from mainstay.workflow.tables import END, FAIL, NEXT_SIGNAL, PARK, RECEIVE, RELEASE
from mainstay.workflow.workflow import RunStatus, Workflow

_log = logging.getLogger("mainstay.workflow")

T = TypeVar("T")

AnyStep = Step[..., Any]
AnyWorkflow = Workflow[*tuple[Any, ...], Any]


def _if_retryable_ours(retry_state: RetryState, /) -> bool:
    error = retry_state.outcome.exception()
    return isinstance(error, MainstayError) and error.retryable


# An effect of another package, such as a publish: its errors are typed, so a bug is not tried ten times.
_EFFECT = StepPolicy(retry=Retry(attempts=10, wait=FullJitter(0.1, 10.0), retry=_if_retryable_ours), one_call=True)
_PROBE = Retry(attempts=5, wait=FullJitter(0.2, 5.0))
_LEASE_LOOK_SECONDS = 0.05
_SIGNAL_LOOK_SECONDS = 0.5
_DAY_SECONDS = 86_400.0
_NEVER = 2**31 - 1  # more signals than a run can have
_CANCELLED = {"type": "Cancelled", "detail": "the run was cancelled"}


class Scope:
    """A branch of a run: the workflow function itself, or one branch of a gather. It numbers what happens in it."""

    __slots__ = ("busy", "gathers", "occurrences", "position", "prefix", "run")

    def __init__(self, run: Run, prefix: str) -> None:
        self.run = run
        self.prefix = prefix
        self.position = 0
        self.gathers = 0
        self.occurrences: dict[str, int] = {}
        self.busy = False


class Exhausted(Exception):
    """Work ended without a result; whether it may have happened, and its last error."""

    def __init__(self, cause: BaseException | None, error: dict[str, Any], *, maybe: bool) -> None:
        super().__init__(error)
        self.cause = cause
        self.error = error
        self.maybe = maybe


@dataclass(slots=True)
class Work:
    """One thing to get done durably: a step, a compensation, or another package's effect."""

    name: str
    key: str
    policy: StepPolicy
    call: Callable[[], Awaitable[Any]]
    keep: Callable[[Any], tuple[str, Any]]
    load: Callable[[str], Any] | None = None
    input: str | None = None
    undoes: str | None = None
    ask: Callable[[], Awaitable[Done[Any] | Failed | Unknown]] | None = None
    entry: bool = False
    own: CodeType | None = None


class Run:
    """One claim of one run.

    Args:
        failure: set when the run is on its way back.
        held: whether the worker's lease is good, by this machine's monotonic clock.
        steps: every step of the App, by name: compensations are found through it.
    """

    def __init__(
        self,
        *,
        id: str,
        epoch: int,
        workflow: AnyWorkflow,
        input: str,
        history: History,
        failure: dict[str, Any] | None,
        cancel_requested: bool,
        database: Database,
        clock: Clock,
        recording: Recording,
        held: Callable[[], bool],
        suspend_after_seconds: float,
        steps: Mapping[str, AnyStep],
    ) -> None:
        self.id = id
        self.epoch = epoch
        self.workflow = workflow
        self.status = RunStatus.RUNNING
        self._input = input
        self._history = history
        self._failure = failure
        self._database = database
        self._clock = clock
        self._recording = recording
        self._held = held
        self._suspend_after_seconds = suspend_after_seconds
        self._steps = steps
        self._cancel = cancel_requested
        self._going_back = failure is not None
        self._stop: ControlFlow | None = None
        self._pauses: set[asyncio.Future[None]] = set()
        self._lookouts: set[asyncio.Future[None]] = set()
        self._receiving = asyncio.Lock()
        self._seen: dict[str, int] = {}
        self._unread = {key for key, record in history.records.items() if record.position is not None}

    # What the engine does to it

    def stop(self, signal: ControlFlow) -> None:
        """End the execution at the next boundary between attempts; waits end at once."""
        if self._stop is None or isinstance(signal, Lost):
            self._stop = signal
        self._wake()

    def cancel(self) -> None:
        """Cancel the run at the next boundary between steps, unless it is already on its way back or past a pivot."""
        self._cancel = True
        if self._may_cancel():
            self._wake()

    def look(self) -> None:
        """A signal for the run is there; no other wait is cut short by it."""
        for lookout in self._lookouts:
            _finish(lookout)

    def _wake(self) -> None:
        for pause in self._pauses:
            _finish(pause)

    async def execute(self) -> tuple[RunStatus, str | None, dict[str, Any] | None] | None:
        """Take the run as far as it goes: status, result as JSON and failure of its end, or None if it has none yet."""
        try:
            return await self._to_its_end()
        except Lost:
            _log.info("run %s: somebody else owns it by now", self.id)
        except Parked as parked:
            await self._park(RunStatus.PARKED, str(parked))
        except CompensationExhausted as exhausted:
            await self._park(RunStatus.COMPENSATION_FAILED, str(exhausted))
        except Released:
            await self._release()
        except Suspended as suspended:
            await self._release(max(0.0, suspended.until - self._clock.monotonic()))
        except asyncio.CancelledError:
            await self._release()
            raise
        finally:
            await self._recording.close()
        return None

    async def _to_its_end(self) -> tuple[RunStatus, str | None, dict[str, Any] | None]:
        output: str | None = None
        if self._stop is not None:
            raise self._stop
        if self._may_cancel():
            await self._fail(_CANCELLED)
        if self._failure is None:
            output = await self._forward()
        if self._failure is None:
            # A step whose outcome nobody knows is not left behind, even where the function found another way.
            await self._back(only_unknown=True)
            return await self._end(RunStatus.COMPLETED, output)
        self.status = RunStatus.COMPENSATING
        await self._back(only_unknown=False)
        cancelled = self._failure["type"] == _CANCELLED["type"]
        return await self._end(RunStatus.CANCELLED if cancelled else RunStatus.FAILED, None)

    async def _forward(self) -> str | None:
        """Execute the function; its result as JSON, or None and a failure that is durable."""
        try:
            arguments = self.workflow.signature.load_arguments(self._input)
        except ValueError as error:
            msg = f"the input does not fit {self.workflow!r} any more: {error}"
            raise Parked(msg) from error
        scope = Scope(self, "")
        cause: BaseException | None = None
        token = _scope.set(scope)
        try:
            with bind_journal(self):
                result = await self.workflow.signature.call(arguments)
        except CancelRequested:
            failure = _CANCELLED
        except asyncio.CancelledError as error:
            if cancelled_from_outside():
                raise
            failure = describe(error)
            cause = error
        except ConfigurationError as error:
            raise misconfigured(self.workflow.signature.name, describe(error)) from error
        except Exception as error:  # noqa: BLE001  whatever a workflow function raises is its failure
            failure = describe(error)
            cause = error
        else:
            self._all_recalled("the function ended")
            try:
                return self.workflow.signature.keep_result(result)[0]
            except TypeError as error:
                raise Parked(str(error)) from error
        finally:
            _scope.reset(token)
        if self._stop is not None:
            raise self._stop  # the function swallowed it
        if failure is not _CANCELLED:
            self._all_recalled(f"the function ended by {error_text(failure)}")
        if self._history.pivoted:
            msg = f"failed after its pivot, so there is no way back: {failure['type']}: {failure['detail']}"
            raise Parked(msg) from cause
        await self._fail(failure)
        return None

    async def _fail(self, failure: dict[str, Any]) -> None:
        """From here on the run only goes back, in whichever process."""
        _log.info("run %s fails with %s and is compensated", self.id, error_text(failure))
        self._failure = failure
        await self._recording.end(FAIL, {"run": self.id, "at_epoch": self.epoch, "failure": json.dumps(failure)})

    async def _end(self, status: RunStatus, output: str | None) -> tuple[RunStatus, str | None, dict[str, Any] | None]:
        failure = None if self._failure is None else json.dumps(self._failure)
        values = {"run": self.id, "at_epoch": self.epoch, "status": status, "output": output, "failure": failure}
        await self._recording.end(END, values)
        self.status = status
        return status, output, self._failure

    async def _park(self, status: RunStatus, note: str) -> None:
        _log.error("run %s of %r is %s: %s", self.id, self.workflow, status, note)
        values = {"run": self.id, "at_epoch": self.epoch, "status": status, "note": plain_text(note)}
        await self._last_word(PARK, values)
        self.status = status

    async def _release(self, delay: float = 0.0) -> None:
        seen = min(self._seen.values(), default=_NEVER)
        values = {"run": self.id, "at_epoch": self.epoch, "delay": 0.0 if self._may_cancel() else delay, "seen": seen}
        await self._last_word(RELEASE, values | {"knows": self._cancel})

    async def _last_word(self, statement: Any, values: Mapping[str, Any]) -> None:
        try:
            await self._recording.end(statement, values)
        except (Lost, Parked) as signal:
            _log.warning("run %s could not be given back (%s): another worker will take it over", self.id, signal)

    # Boundaries

    def _may_cancel(self) -> bool:
        return self._cancel and not self._history.pivoted and not self._going_back

    async def _boundary(self) -> None:
        """Raise what ends this execution, before anything new begins.

        While the worker's lease may have ended, nobody knows whose the run is: nothing new begins until that is
        settled.
        """
        while not self._held() and self._stop is None:
            await self._nap(_LEASE_LOOK_SECONDS)
        if self._stop is not None:
            raise self._stop
        if self._may_cancel():
            raise CancelRequested

    async def _pause(self, seconds: float) -> None:
        """Wait between attempts; a stop or a cancellation ends it, and a long wait is not waited for here."""
        await self._boundary()
        if seconds > self._suspend_after_seconds:
            raise Suspended(self._clock.monotonic() + seconds)
        await self._nap(seconds)
        await self._boundary()

    async def _nap(self, seconds: float, *more: set[asyncio.Future[None]]) -> None:
        """Let time pass, or less where somebody stops or cancels the run."""
        pause: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        timer = self._clock.call_later(seconds, lambda: _finish(pause))
        sets = (self._pauses, *more)
        for pauses in sets:
            pauses.add(pause)
        try:
            await pause
        finally:
            timer.cancel()
            for pauses in sets:
                pauses.discard(pause)

    # What workflow functions call, by way of the scope they run in

    async def step(self, scope: Scope, step: AnyStep, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Execute a step, or recall what came of it."""
        if self._steps.get(step.name) is not step:
            msg = f"the router of step {step.name} is not part of this App: add it with WorkflowModule.for_feature"
            raise Parked(msg)
        key, record = self._enter(scope, step.name)
        try:
            self._same_arguments(step, record, args, kwargs)
            if record.state == DONE:
                return self._load(step.signature.load_result, record)
            if record.input is None:
                arguments = _or_parked(step.signature.bind, args, kwargs)
                record.input = _or_parked(step.signature.dump_arguments, arguments)
            else:  # what was begun is carried on with the input it began with
                arguments = self._arguments(step, record)
            work = Work(
                name=step.name,
                key=key,
                policy=step.policy,
                call=lambda: step.call(arguments),
                keep=step.signature.keep_result,
                load=step.signature.load_result,
                input=record.input,
                ask=None if step.ask is None else lambda: step.call_probe(arguments),
                own=step.own_code,
            )
            return await self._settle(work, record)
        finally:
            scope.busy = False

    async def once(self, name: str, effect: Effect, *, transactional: bool) -> str:
        """`Journal.once`: another package's effect as a step that leaves nothing to undo."""
        scope = _scope.get()
        if scope is None:
            msg = f"{name}: the history of run {self.id} was used outside the run's own code"
            raise Parked(msg)
        label = "@" + name.replace("/", "_")
        key, record = self._enter(scope, label)
        try:
            full = f"{self.id}:{key}"
            if record.state == DONE:
                return full
            work = Work(
                name=label,
                key=key,
                policy=_EFFECT,
                call=lambda: effect(full),
                keep=_nothing,
                entry=transactional,
            )
            await self._settle(work, record)
            return full
        finally:
            scope.busy = False

    async def sleep(self, scope: Scope, seconds: float) -> None:
        """Let time pass, by the database's clock from the moment that is recorded."""
        key, record = self._enter(scope, SLEEP)
        try:
            if record.state == DONE:
                return
            if record.seq == 0:
                info = json.dumps({"rest_seconds": seconds})
                row = self._recording.row(INTENT, key, position=record.position, info=info)
                record.seq, record.rest_seconds = row["seq"], seconds
                await self._recording.append(row)
            await self._pause(record.rest_seconds)
            row = self._recording.row(DONE, key, position=record.position)
            record.state, record.seq = "done", row["seq"]
            self._recording.settle(row, slot=False)
        finally:
            scope.busy = False

    async def receive(self, scope: Scope, name: str, load: Callable[[str], Any], timeout_seconds: float | None) -> Any:
        """Wait for a message and take it: that it is taken, and by whom, is one commit."""
        key, record = self._enter(scope, SIGNAL + name.replace("/", "_"))
        try:
            if record.state != DONE:
                if record.seq == 0:
                    rest = _DAY_SECONDS if timeout_seconds is None else timeout_seconds
                    info = json.dumps({"rest_seconds": rest})
                    row = self._recording.row(INTENT, key, position=record.position, info=info)
                    record.seq, record.rest_seconds = row["seq"], rest
                    await self._recording.append(row)
                began = self._clock.monotonic()
                while not await self._take(key, record, name):
                    waited = self._clock.monotonic() - began
                    if timeout_seconds is not None and waited >= record.rest_seconds:
                        self._nothing_came(key, record, name, timeout_seconds)
                    await self._wait_for_signal(record, waited, limited=timeout_seconds is not None)
            return self._load(load, record)
        finally:
            scope.busy = False

    async def _take(self, key: str, record: StepRecord, name: str) -> bool:
        await self._boundary()
        async with self._receiving:  # or two branches could take the same one
            (found,) = await self._recording.read(NEXT_SIGNAL, {"run": self.id, "name": name})
            if found.id is None:
                self._seen[key] = found.signalled
                return False
            row = self._recording.row(DONE, key, position=record.position, body=found.body)
            await self._recording.end(RECEIVE, {"run": self.id, "signal": found.id, "by": key}, row)
            self._seen.pop(key, None)
            record.state, record.seq, record.output = "done", row["seq"], found.body
            return True

    def _nothing_came(self, key: str, record: StepRecord, name: str, seconds: float) -> None:
        error = {"type": "DeadlineExceeded", "detail": f"no signal {name} within {seconds:g} s", "code": "EXT_DEADLINE"}
        row = self._recording.row(FAILED, key, position=record.position, info=json.dumps({"error": error}))
        record.state, record.seq, record.error = "failed", row["seq"], error
        self._recording.settle(row, slot=False)
        self._seen.pop(key, None)
        raise step_failed(SIGNAL + name, "failed", error)

    async def _wait_for_signal(self, record: StepRecord, waited: float, *, limited: bool) -> None:
        left = record.rest_seconds - waited if limited else _DAY_SECONDS
        if waited >= self._suspend_after_seconds and left > self._suspend_after_seconds:
            raise Suspended(self._clock.monotonic() + left)
        await self._nap(max(0.0, min(left, _SIGNAL_LOOK_SECONDS)), self._lookouts)

    async def gather(self, scope: Scope, branches: tuple[Awaitable[Any], ...]) -> tuple[Any, ...]:
        """Execute branches side by side, each with numbers of its own; all of them end before this does."""
        self._claim_scope(scope, "gather")
        number, scope.gathers = scope.gathers, scope.gathers + 1
        scopes = [Scope(self, f"{scope.prefix}{number}.{place}/") for place in range(len(branches))]
        tasks = [
            asyncio.get_running_loop().create_task(self._branch(inner, branch), name=f"{self.id} {inner.prefix}")
            for inner, branch in zip(scopes, branches, strict=True)
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
            scope.busy = False
        errors = [found for task in tasks if (found := _error_of(task)) is not None]
        if cancelled is not None:
            raise cancelled
        signals = [error for error in errors if isinstance(error, ControlFlow)]
        if signals:
            raise min(signals, key=_urgency)
        if errors:
            raise errors[0]
        return tuple(task.result() for task in tasks)

    async def _branch(self, scope: Scope, branch: Awaitable[Any]) -> Any:
        _scope.set(scope)
        return await branch

    # The records

    def _claim_scope(self, scope: Scope, what: str) -> None:
        if self._stop is not None:
            raise self._stop
        if scope.busy:
            msg = (
                f"{what} was called while another step of the same branch is running: their numbers would depend on "
                "who comes first; use flows.gather"
            )
            raise Parked(msg)
        scope.busy = True

    def _enter(self, scope: Scope, name: str) -> tuple[str, StepRecord]:
        """The key of what is called now, and its record; settled failures are raised again."""
        if self._database.in_unit_of_work():
            msg = (
                f"{name} was called inside db.transaction(): a workflow function may be executed again, so what it "
                "writes belongs into a transactional step"
            )
            raise Parked(msg)
        self._claim_scope(scope, name)
        occurrence = scope.occurrences[name] = scope.occurrences.get(name, 0) + 1
        position, scope.position = scope.position, scope.position + 1
        key = f"{scope.prefix}{name}:{occurrence}"
        expected = self._history.places.get((scope.prefix, position))
        record = self._history.records.get(key)
        if (expected is not None and expected != key) or (record is not None and record.position != position):
            scope.busy = False
            msg = (
                f"the function asked for {key} where its record has {expected or 'nothing'}: it does not do the same "
                "on replay. Give the changed function a new version, or put what differs into a step"
            )
            raise Parked(msg)
        self._unread.discard(key)
        if record is None:
            record = self._history.records[key] = StepRecord(key, position)
            self._history.places[scope.prefix, position] = key
        elif record.state in {FAILED, UNKNOWN}:
            scope.busy = False
            raise step_failed(name, record.state, record.error)  # type: ignore[arg-type]  # narrowed by the set
        return key, record

    def _all_recalled(self, how: str) -> None:
        """Refuse an end before the record's end: a run's end counts only where its function read all of its record."""
        if self._unread:
            left = min(self._unread, key=lambda key: self._history.records[key].seq)
            msg = (
                f"{how} before {left}, which is in its record: it does not do the same on replay. Give the changed "
                "function a new version, or mend it, and resume the run"
            )
            raise Parked(msg)

    def _same_arguments(self, step: AnyStep, record: StepRecord, args: tuple[Any, ...], kwargs: Any) -> None:
        """Refuse other arguments than those on record: the result that is there belongs to those."""
        if record.input is None:
            return
        now = _or_parked(step.signature.dump_arguments, _or_parked(step.signature.bind, args, kwargs))
        if now != record.input and not _equal_by_value(step, now, self._arguments(step, record)):
            msg = (
                f"the function called {record.key} with other arguments than its record has: it does not do the same "
                "on replay. Give the changed function a new version, or put what differs into a step"
            )
            raise Parked(msg)

    def _load(self, load: Callable[[str], Any], record: StepRecord) -> Any:
        try:
            return load(record.output or "null")
        except ValueError as error:
            msg = f"the recorded result of {record.key} does not fit its step any more: {error}"
            raise Parked(msg) from error

    def _arguments(self, step: AnyStep, record: StepRecord) -> dict[str, Any]:
        try:
            return step.signature.load_arguments(record.input or "{}")
        except ValueError as error:
            msg = f"the recorded input of {record.key} does not fit its step any more: {error}"
            raise Parked(msg) from error

    # Getting work done

    async def _settle(self, work: Work, record: StepRecord) -> Any:
        """Do the work of a step and record its outcome."""
        try:
            return await (self._as_entry(work, record) if work.entry else self._attempts(work, record))
        except Exhausted as end:
            if self._history.pivoted:
                msg = f"{work.key} failed after the pivot, so there is no way back: {error_text(end.error)}"
                raise Parked(msg) from end.cause
            state: Literal["failed", "unknown"] = "unknown" if end.maybe else "failed"
            self._give_up(work, record, state, end.error)
            raise step_failed(work.name, state, end.error) from end.cause
        except asyncio.CancelledError as error:
            # Not this worker's stop, so the function itself gave up waiting, by a timeout of its own for example.
            if self._stop is None and record.dangling and not self._history.pivoted:
                self._give_up(work, record, "unknown", describe(error))
            raise

    def _give_up(
        self, work: Work, record: StepRecord, state: Literal["failed", "unknown"], error: dict[str, Any]
    ) -> None:
        info = {"error": error, **({"input": work.input} if record.seq == 0 and work.input else {})}
        row = self._recording.row(state, work.key, position=record.position, info=json.dumps(info))
        record.state, record.seq, record.error, record.dangling = state, row["seq"], error, False
        self._recording.settle(row, slot=False)
        count_step(work.name, state)

    async def _attempts(self, work: Work, record: StepRecord) -> Any:
        """Attempt the work until it is done, or until its policy says that it is enough.

        Raises:
            Exhausted: it is enough.
        """
        began, waited, repeated = self._clock.monotonic(), 0.0, 0
        if record.dangling or (record.maybe and work.policy.on_unknown == "probe"):
            found = await self._resolve(work, record, "a worker died, or was stopped, during an attempt")
            if found is not None:
                return await self._done(work, record, found.result, slot=False)
        while True:
            if record.rest_seconds > 0:
                await self._pause(record.rest_seconds)
                record.rest_seconds = 0.0
            await self._boundary()
            try:
                if work.policy.transactional:
                    return await self._in_the_database(work, record)
                result = await self._outside(work, record)
            except (Exception, asyncio.CancelledError) as error:
                if cancelled_from_outside(error):
                    raise
                kept = describe(error.error if isinstance(error, NoException) else error)
                if isinstance(error, ConfigurationError):
                    raise misconfigured(work.key, kept) from error
                if work.policy.transactional and isinstance(error, DatabaseError) and worth_repeating(error):
                    repeated += 1
                    await self._repeat(work, error, repeated)
                    continue
                delay = rejection_seconds(work.policy, error, work.own)
                if delay is None:
                    record.attempts += 1
                    if not nothing_happened(work.policy, error, work.own):
                        found = await self._resolve(work, record, error_text(kept))
                        if found is not None:
                            return await self._done(work, record, found.result, slot=False)
                    delay = self._delay(work, record, Outcome.of_error(error), began, waited)
                    if delay is None:
                        record.dangling = False
                        raise Exhausted(error, kept, maybe=record.maybe) from error
            else:
                again = (
                    None
                    if _default_decision(work)
                    else self._delay(work, record, Outcome.of_result(result), began, waited, more=1)
                )
                if again is None:
                    return await self._done(work, record, result, slot=True)
                self._recording.drop_slot()
                record.attempts += 1
                delay, kept = again, {"type": "Result", "detail": "asks for another attempt"}
            waited += delay
            await self._note_attempt(work, record, kept, delay)

    async def _repeat(self, work: Work, error: Exception, times: int) -> None:
        """Wait before the database is asked again: its being away is no outcome of the work."""
        _log.warning("run %s: %s could not be written and will be again: %s", self.id, work.key, error)
        await self._pause(max(SHORTEST_WAIT, _EFFECT.retry.wait(RetryState(times, Outcome.of_error(error), 0.0))))

    def _delay(
        self, work: Work, record: StepRecord, outcome: Outcome, began: float, waited: float, *, more: int = 0
    ) -> float | None:
        error = outcome.exception()
        if isinstance(error, work.policy.failed_on):
            return None
        elapsed = self._clock.monotonic() - began
        return work.policy.retry.delay_seconds(RetryState(record.attempts + more, outcome, elapsed, waited))

    async def _note_attempt(self, work: Work, record: StepRecord, error: dict[str, Any], delay: float) -> None:
        """Make it durable that an attempt ended, so that a crash during the wait neither shortens nor forgets it."""
        info: dict[str, Any] = {
            "attempts": record.attempts,
            "maybe": record.maybe,
            "error": error,
            "rest_seconds": delay,
        }
        if record.seq == 0 and work.input:
            info["input"] = work.input
        _log.info("run %s: %s ended with %s; again in %.3g s", self.id, work.key, error_text(error), delay)
        record.error, record.dangling, record.rest_seconds = error, False, delay
        row = self._recording.row(ATTEMPT, work.key, position=record.position, info=json.dumps(info))
        await self._recording.append(row)

    async def _resolve(self, work: Work, record: StepRecord, why: str) -> Done[Any] | None:
        """Face an attempt that may have taken effect: what it came to, if that can be known, or None to attempt again.

        Raises:
            Parked: the step must not be attempted again without a person.
        """
        record.dangling, record.maybe = False, True
        if work.policy.on_unknown == "compensate":
            return None
        if work.ask is None:
            msg = (
                f'nobody knows whether {work.key} took effect ({why}), and it says on_unknown="park". Find out; then '
                "resume the run to attempt it again with the same key, or cancel it to compensate"
            )
            raise Parked(msg)
        answer = await self._ask(work, work.ask)
        if isinstance(answer, Done):
            return answer
        if isinstance(answer, Unknown):
            msg = f"nobody knows whether {work.key} took effect ({why}), and its probe does not either: {answer.detail}"
            raise Parked(msg)
        record.maybe = False
        return None

    async def _ask(
        self, work: Work, ask: Callable[[], Awaitable[Done[Any] | Failed | Unknown]]
    ) -> Done[Any] | Failed | Unknown:
        attempt = 0
        while True:
            await self._boundary()
            attempt += 1
            answer: Done[Any] | Failed | Unknown
            try:
                answer = await self._attempt(work, attempt, ask)
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
            await self._pause(_PROBE.wait(RetryState(attempt, outcome, 0.0)))

    async def _outside(self, work: Work, record: StepRecord) -> Any:
        """One attempt at something whose effect is elsewhere; on success the slot is still held."""
        body = work.input if record.seq == 0 else None
        row = self._recording.row(INTENT, work.key, position=record.position, body=body)
        record.seq = row["seq"]
        await self._recording.append(row)
        # From here on nobody knows, until a result or an attempt's end is recorded.
        record.dangling = True
        await self._recording.take_slot()
        try:
            await self._boundary()
            return await self._attempt(work, record.attempts + 1, work.call)
        except BaseException:
            self._recording.drop_slot()
            raise

    async def _attempt(self, work: Work, number: int, call: Callable[[], Awaitable[Any]]) -> Any:
        """Run the user's code once, outside the run's own scope."""
        token = _step.set(StepInfo(self.id, work.name, f"{self.id}:{work.key}", number, work.undoes))
        scope = _scope.set(None)
        seconds = work.policy.timeout_seconds
        started = time.perf_counter()
        try:
            with bind_journal(None):
                if seconds is None:
                    return await call()
                async with timeout(seconds, clock=self._clock):
                    return await call()
        except (Exception, asyncio.CancelledError, ControlFlow, GeneratorExit):
            raise
        except BaseException as error:
            if cancelled_from_outside():
                raise asyncio.CancelledError from error  # the worker's own end, in a group with others
            _log.warning("run %s: %s raised what is no Exception", self.id, work.key, exc_info=True)
            raise NoException(error) from error
        finally:
            STEP_SECONDS.observe(time.perf_counter() - started)
            _scope.reset(scope)
            _step.reset(token)

    async def _in_the_database(self, work: Work, record: StepRecord) -> Any:
        """One attempt at a transactional step: its writes and its record share one commit."""
        await self._recording.flush()
        await self._boundary()
        written, kept = record.in_doubt is not None, None
        row = record.in_doubt or self._recording.row(DONE, work.key, position=record.position)
        try:
            async with self._database.transaction():
                result = await self._attempt(work, record.attempts + 1, work.call)
                body, kept = _or_parked(work.keep, result)
                row |= {"body": body, "info": json.dumps({"input": work.input})}
                written = True
                await self._recording.within_transaction(row)
        except FenceLost:
            raise Lost from None
        except Exception as error:
            # A commit whose end was not seen: only the history knows.
            found = await self._recording.find(row["seq"]) if written else None
            if found is None:
                if isinstance(error, CommitUnknown):
                    record.in_doubt = row
                raise
            row["body"] = found.body
            kept = None if work.load is None else work.load(found.body)
        record.state, record.seq, record.output = "done", row["seq"], row["body"]
        count_step(work.name, DONE)
        return kept

    async def _as_entry(self, work: Work, record: StepRecord) -> None:
        """An effect that only writes to the database: its rows and its record are one entry, tried until it is there.

        Raises:
            Exhausted: the effect itself cannot be carried out.
        """
        while True:
            await self._boundary()
            row = record.in_doubt or self._recording.row(DONE, work.key, position=record.position)
            try:
                await self._recording.with_effect(row, lambda: self._attempt(work, record.attempts + 1, work.call))
                break
            except Exception as error:
                if not worth_repeating(error):
                    raise Exhausted(error, describe(error), maybe=False) from error
                if isinstance(error, CommitUnknown):
                    record.in_doubt = row
                record.attempts += 1
                await self._repeat(work, error, record.attempts)
        record.state, record.seq = "done", row["seq"]
        count_step(work.name, DONE)

    async def _done(self, work: Work, record: StepRecord, result: Any, *, slot: bool) -> Any:
        try:
            body, kept = _or_parked(work.keep, result)
        except Parked:
            if slot:
                self._recording.drop_slot()
            raise
        info = json.dumps({"pivot": True}) if work.policy.pivot else None
        row = self._recording.row(DONE, work.key, position=record.position, body=body, info=info)
        record.state, record.seq, record.output, record.dangling = "done", row["seq"], body, False
        self._recording.settle(row, slot=slot)
        count_step(work.name, DONE)
        self._history.pivoted = self._history.pivoted or work.policy.pivot
        return kept

    # The way back

    async def _back(self, *, only_unknown: bool) -> None:
        """Undo what was done, or may have been, in reverse order of completion.

        Raises:
            CompensationExhausted: one of the compensations used up its attempts.
        """
        self._going_back = True
        taken = [
            record
            for record in self._history.records.values()
            if not record.key.endswith(COMPENSATION)
            and (record.state == UNKNOWN if only_unknown else may_have_happened(record))
        ]
        for record in sorted(taken, key=lambda record: record.seq, reverse=True):
            await self._undo(record)

    async def _undo(self, record: StepRecord) -> None:
        name = step_of(record.key)
        if name.startswith("@"):
            return  # another package's effect: its way back is an effect of a compensation
        step = self._steps.get(name)
        if step is None:
            msg = f"no step {name} is known here, so {record.key} cannot be undone: bring it back under its name"
            raise CompensationExhausted(msg)
        if step.undo is None:
            return
        key = record.key + COMPENSATION
        mine = self._history.records.setdefault(key, StepRecord(key, None))
        if mine.state == DONE:
            return
        outcome: Done[Any] | Unknown
        if record.state == DONE:
            outcome = Done(self._load(step.signature.load_result, record))
        else:
            outcome = Unknown(error_text(record.error) if record.error else "its end was never recorded")
        arguments = self._arguments(step, record)
        work = Work(
            name=f"{name}{COMPENSATION}",
            key=key,
            policy=step.undo_policy,
            call=lambda: step.call_undo(arguments, outcome),
            keep=_nothing,
            undoes=f"{self.id}:{record.key}",
        )
        try:
            await self._attempts(work, mine)
        except Exhausted as end:
            count_step(work.name, FAILED)
            msg = f"{key} used up its {mine.attempts} attempts: {error_text(end.error)}"
            raise CompensationExhausted(msg) from end.cause


def _equal_by_value(step: AnyStep, now: str, recorded: dict[str, Any]) -> bool:
    """Whether arguments are those on record, as today's types see both.

    A set or a mapping may have been written in another order, and a field may have got a default since. A value without
    an equality of its own is compared by what is written of it.
    """
    here, dump = step.signature.load_arguments(now), step.signature.dump_arguments
    return here.keys() == recorded.keys() and all(
        value == recorded[name] or dump(recorded | {name: value}) == dump(recorded) for name, value in here.items()
    )


def _urgency(signal: ControlFlow) -> tuple[bool, float]:
    """A branch that sleeps gives way to one that was stopped or parked, and to one that sleeps less."""
    return (True, signal.until) if isinstance(signal, Suspended) else (False, 0.0)


def _finish(pause: asyncio.Future[None]) -> None:
    if not pause.done():
        pause.set_result(None)


def _error_of(task: asyncio.Task[Any]) -> BaseException | None:
    return asyncio.CancelledError() if task.cancelled() else task.exception()


def _default_decision(work: Work) -> bool:
    """Whether a result is never worth another attempt, as by default."""
    return work.policy.retry.retry in (retry_if_retryable, any_error, _if_retryable_ours)


def _or_parked(keep: Callable[..., T], *args: Any) -> T:
    """What cannot be kept as its annotation says is a bug: repaired, the run goes on."""
    try:
        return keep(*args)
    except TypeError as error:
        raise Parked(str(error)) from error


def _nothing(_result: object) -> tuple[str, Any]:
    return "null", None
