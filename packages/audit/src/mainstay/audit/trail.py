"""`AuditTrail`: what application code uses, and the intake behind it in a running App.

An entry of something that succeeded belongs into the transaction of what succeeded: it commits or rolls back with it.
An entry of something that failed or was denied must survive exactly that rollback, so it has a transaction of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, ParamSpec, TypeVar, overload
from uuid import UUID

from mainstay.audit import _metrics
from mainstay.audit._producer import STATEMENT, Producer
from mainstay.audit.entry import Outcome, encode
from mainstay.audit.errors import AuditError, InvalidEntry
from mainstay.audit.merkle import leaf_hash
from mainstay.audit.note import SigningKey
from mainstay.audit.tables import INSERT_PENDING
from mainstay.core import App, Binding, Context, Drain, MainstayError, bind, current, derived_id, once, spawn, uuid7
from mainstay.database import Conflict, Database, DatabaseError, UnitOfWorkError

__all__ = ["AuditTrail"]

P = ParamSpec("P")
T = TypeVar("T")

_log = logging.getLogger("mainstay.audit")

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_NOTHING: Mapping[str, Any] = {}
_PAUSES = (0.1, 0.5, 2.0, 5.0, 15.0, 30.0)  # seconds between attempts for which nobody waits

_Find1 = Callable[[Any], str]
_Find2 = Callable[[Any, Any], str]
_Find3 = Callable[[Any, Any, Any], str]


class AuditTrail:
    """Writes audit entries, once an App with `AuditModule.for_feature(trail)` runs."""

    def __init__(self) -> None:
        self.binding: Binding[Intake] = Binding("AuditTrail", remedy="AuditModule.for_feature(trail)")
        self.functions: list[Callable[..., Any]] = []

    async def write(
        self,
        action: str,
        *,
        resource: str | None = None,
        outcome: Outcome = "succeeded",
        detail: Mapping[str, Any] | None = None,
    ) -> None:
        """Write one entry. Who, for whom and as part of what come from the context.

        With `succeeded` it joins the unit of work around it, and is durable with its commit; without one it is durable
        when this returns. Any other outcome is durable by itself, whatever becomes of the unit of work around it; on
        SQLite, whose one writer that unit may be, it then follows as soon as the unit has ended.

        Inside a workflow function it is a recorded step: a replay does not write it again.

        Args:
            action: what was done, such as `order.cancelled`.
            resource: what it was done to, such as `order/7`.
            outcome: how it ended.
            detail: strings, integers, booleans, None, and lists and mappings of those; UUID, Decimal, date, datetime
                and enumerations are written as their strings. No floats; nothing secret.

        Raises:
            NotBoundError: no running App has bound this trail.
            InvalidEntry: something in it cannot be stored exactly.
            DatabaseError: it could not be written; what it belongs to must not be done either.
        """
        intake = self.binding.get()
        if action == STATEMENT:
            msg = f"the action {STATEMENT} is the audit trail's own"
            raise InvalidEntry(msg)
        joins = outcome == "succeeded"

        async def effect(key: str | None) -> None:
            entry_id = uuid7() if key is None else derived_id(f"{key}:audit")
            draft = intake.draft(entry_id, action, resource, outcome, detail or _NOTHING)
            if joins:
                await intake.join(draft)
            else:
                await intake.apart(draft, repeated=key is not None)

        arguments = (resource, outcome, detail)
        await once(f"audit:{action}", effect, transactional=joins, arguments=lambda: arguments)

    # A lambda of a few parameters by itself: pyright knows none of a `Callable[...]`.
    @overload
    def record(
        self, action: str, *, resource: str | _Find1 | _Find2 | _Find3 | None = None
    ) -> Callable[[Callable[P, Awaitable[T]]], Callable[P, Coroutine[Any, Any, T]]]: ...
    @overload
    def record(  # type: ignore[overload-cannot-match]  # for mypy a `Callable[...]` is one of the above, too
        self, action: str, *, resource: Callable[..., str]
    ) -> Callable[[Callable[P, Awaitable[T]]], Callable[P, Coroutine[Any, Any, T]]]: ...
    def record(
        self, action: str, *, resource: str | Callable[..., str] | None = None
    ) -> Callable[[Callable[P, Awaitable[T]]], Callable[P, Coroutine[Any, Any, T]]]:
        """Decorate an async function: its success is recorded in the transaction of what it writes, its failure apart.

        The function runs inside `db.transaction()`, or joins the one that is open. When it raises, everything it wrote
        is rolled back and an entry says that it failed: `denied` for a PermissionError or a code of the family AUTH_,
        `unknown` where the connection broke or the caller was cancelled while committing, `failed` otherwise, with the
        error's code but not its message. Whoever chooses the resource cannot prevent that: one that no entry can hold
        is cut and spelled in ASCII, and one that cannot be told is left out.

        In a workflow, decorate the step with it (`@flows.step` outermost): a workflow function itself runs again on
        replay.

        Args:
            action: what the function does, such as `order.cancelled`.
            resource: what it is done to: a text, or a function of some of the parameters, found by their names.

        Raises:
            TypeError: the function is not an async function, or `resource` has a parameter that it has not.
        """

        def decorate(function: Callable[P, Awaitable[T]]) -> Callable[P, Coroutine[Any, Any, T]]:
            find = _finder(function, resource)
            self.functions.append(function)

            @functools.wraps(function)
            async def recorded(*args: P.args, **kwargs: P.kwargs) -> T:
                intake = self.binding.get()
                found = None
                reached: list[str] = []
                try:
                    found = find(*args, **kwargs)
                    async with intake.database.transaction():
                        result = await intake.app.fill(function)(*args, **kwargs)
                        await self.write(action, resource=found)
                        intake.database.after_commit(functools.partial(reached.append, "committed"))
                        reached.append("committing")
                except asyncio.CancelledError:
                    # A commit that is under way is not interrupted, and its entry is there if it succeeded. Whoever was
                    # cancelled must not be kept waiting for the database.
                    if "committed" not in reached:
                        intake.later(action, found, "unknown" if reached else "failed", {"error": "cancelled"})
                    raise
                except Exception as error:
                    await self._failed(action, found, error)
                    raise
                return result

            recorded.binding = self.binding  # type: ignore[attr-defined]  # by which an App finds what uses the trail
            return recorded

        return decorate

    async def _failed(self, action: str, resource: str | None, error: Exception) -> None:
        code = error.code if isinstance(error, MainstayError) else type(error).__name__
        detail, outcome = {"error": code}, _outcome(error)
        # The caller gets the error that happened; that it could not be recorded is for the people on call.
        try:
            try:
                await self.write(action, resource=resource, outcome=outcome, detail=detail)
            except InvalidEntry:
                await self.write(action, resource=_cut(resource), outcome=outcome, detail={**detail, **_CUT})
        except DatabaseError:
            pass  # counted and logged where it was tried
        except Exception as unrecorded:  # noqa: BLE001  whatever it is
            _lost(action, unrecorded)


# In the detail of an entry whose resource is not what it was told.
_CUT = {"resource": "cut"}


def _cut(resource: object) -> str:
    """What is left of a resource that no entry can hold."""
    return ascii(resource)[:256]


def _lost(action: str, error: Exception) -> None:
    _metrics.LOST.inc()
    _log.error("an audit entry of %s could not be written", action, exc_info=error)


def _outcome(error: Exception) -> Outcome:
    if isinstance(error, PermissionError) or (isinstance(error, MainstayError) and error.code.startswith("AUTH_")):
        return "denied"
    if isinstance(error, DatabaseError) and not error.no_effect:
        return "unknown"
    return "failed"


def _finder(function: Callable[..., object], resource: str | Callable[..., str] | None) -> Callable[..., str | None]:
    """A function of the decorated function's arguments that tells the resource."""
    name = getattr(function, "__qualname__", repr(function))
    if not inspect.iscoroutinefunction(function):
        msg = f"@audit.record takes an async function, which {name} is not"
        raise TypeError(msg)
    if not callable(resource):
        return lambda *_args, **_kwargs: resource
    signature = inspect.signature(function)
    wanted = list(inspect.signature(resource).parameters)
    unknown = [parameter for parameter in wanted if parameter not in signature.parameters]
    if unknown:
        msg = f"the resource of @audit.record takes {', '.join(unknown)}, which {name}{signature} has no parameter for"
        raise TypeError(msg)

    def find(*args: Any, **kwargs: Any) -> str:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return resource(**{parameter: bound.arguments[parameter] for parameter in wanted})

    return find


@dataclass(frozen=True, slots=True)
class Draft:
    """An entry that is about to be written.

    Attributes:
        row: of the pending ones, with its exact bytes.
        number: of its producer's entries.
        leaf: its hash.
        action, outcome: what it says.
    """

    row: Mapping[str, Any]
    number: int
    leaf: bytes
    action: str
    outcome: Outcome


class Intake:
    """Where the trails of a running App put their entries."""

    def __init__(self, database: Database, app: App, key: SigningKey, statement_seconds: float) -> None:
        self.database = database
        self.app = app
        self._clock = app.clock
        self._key = key
        self._statement_seconds = statement_seconds
        self._producer = Producer()
        self._news = asyncio.Event()
        self._alone: set[asyncio.Task[Exception | None]] = set()
        self._stopping = asyncio.Event()
        self._final = False

    def draft(
        self, entry_id: UUID, action: str, resource: str | None, outcome: Outcome, detail: Mapping[str, Any]
    ) -> Draft:
        """The entry, with the next number of this process.

        Raises:
            InvalidEntry: something in it cannot be stored exactly; no number was used.
            AuditError: this process has said that it writes no more.
        """
        if self._final:
            msg = f"{action} cannot be audited any more: the App that the trail belonged to has stopped"
            raise AuditError(msg)
        number = self._producer.next
        row = self._row(entry_id, action, resource, outcome, detail, number=number)
        leaf = leaf_hash(row["data"])
        self._producer.issue(leaf)
        return Draft(row, number, leaf, action, outcome)

    def _row(
        self,
        entry_id: UUID,
        action: str,
        resource: str | None,
        outcome: Outcome,
        detail: Mapping[str, Any],
        *,
        number: int,
    ) -> dict[str, Any]:
        context = current()
        now = self._clock.now().astimezone(UTC)
        data = encode(
            {
                "id": str(entry_id),
                "action": action,
                "outcome": outcome,
                "time": now.isoformat(timespec="microseconds")[:-6] + "Z",
                "producer": self._producer.name,
                "number": number,
                "resource": resource,
                "actor": context.actor,
                "tenant": context.tenant,
                "correlation_id": context.correlation_id,
                "causation_id": context.causation_id,
                "detail": detail,
            }
        )
        # Integer arithmetic: a float of today's seconds has no room for microseconds.
        since = now - _EPOCH
        recorded_at = (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds
        return {"entry_id": entry_id, "recorded_at": recorded_at, "data": data}

    async def join(self, draft: Draft) -> None:
        """Write in the unit of work that is open, or durably where there is none."""
        await self.database.write(INSERT_PENDING, draft.row)
        self.database.after_commit(functools.partial(self._committed, draft))

    async def apart(self, draft: Draft, *, repeated: bool) -> None:
        """Write in a transaction of its own, whatever is open; `repeated` if an earlier attempt may have done so."""
        # On SQLite the one writer's turn is ours until our unit ends: waiting for another transaction would never end.
        waits = self.database.dialect != "sqlite" or not self._in_unit()
        task = self._start(self._write_alone(draft, repeated=repeated, patient=not waits))
        if not waits:
            return
        error = await asyncio.shield(task)
        if error is not None:
            raise error

    def later(self, action: str, resource: str | None, outcome: Outcome, detail: Mapping[str, Any]) -> None:
        """Write in a transaction of its own, and let nobody wait for it; raises nothing."""
        try:
            try:
                draft = self.draft(uuid7(), action, resource, outcome, detail)
            except InvalidEntry:
                draft = self.draft(uuid7(), action, _cut(resource), outcome, {**detail, **_CUT})
        except Exception as error:  # noqa: BLE001  whoever calls this has an exception of his own to raise
            _lost(action, error)
        else:
            _ = self._start(self._write_alone(draft, repeated=False, patient=True))

    def _start(self, work: Coroutine[Any, Any, Exception | None]) -> asyncio.Task[Exception | None]:
        task = spawn(work, name="audit.apart")
        self._alone.add(task)
        task.add_done_callback(self._alone.discard)
        return task

    def _in_unit(self) -> bool:
        try:
            return self.database.in_unit_of_work()
        except UnitOfWorkError:
            return True

    async def _write_alone(self, draft: Draft, *, repeated: bool, patient: bool) -> Exception | None:
        pauses = iter(_PAUSES if patient else ())
        while True:
            try:
                await self.database.write(INSERT_PENDING, draft.row)
            except Exception as error:  # noqa: BLE001  told to whoever waits
                if repeated and isinstance(error, Conflict):
                    return None
                pause = next(pauses, None)
                if pause is None or self._stopping.is_set() or not getattr(error, "retryable", False):
                    _lost(draft.action, error)
                    return error
                # The unit of work around it may hold the writer for longer than anybody is willing to wait in a queue.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await self._stopping.wait()
            else:
                self._committed(draft)
                return None

    def _committed(self, draft: Draft) -> None:
        _metrics.entries(draft.outcome).inc()
        self._producer.committed(draft.number, draft.leaf)
        self._news.set()

    # Statements

    async def state(self, drain: Drain) -> None:
        """State, at most once in `statement_seconds`, the entries that have been committed, until the drain begins."""
        while not drain.begun:
            await drain.pause(self._statement_seconds)
            if self._news.is_set() and not drain.begun:  # the last word is `settle`'s
                await self._say()

    async def _say(self) -> None:
        """State what has been committed since the last time; where that fails, the next time says it."""
        self._news.clear()
        while (statement := self._producer.statement(final=self._final)) is not None:
            detail = {"note": self._key.sign(statement.to_text())}
            with bind(Context()):  # nobody's word but this process's
                row = self._row(statement.entry_id, STATEMENT, None, "succeeded", detail, number=0)
            try:
                await self.database.write(INSERT_PENDING, row)
            except Conflict:
                pass  # an attempt that was cut off had arrived
            except DatabaseError as error:
                self._news.set()
                _log.warning("a statement of this process's audit entries is put off: %s", error)
                return
            self._producer.said()

    async def settle(self) -> None:
        """Finish what is being written apart, without trying again, and say the last word: no entry comes after it."""
        self._stopping.set()
        while self._alone:
            await asyncio.wait(self._alone)
        self._final = True
        await self._say()
