"""The Database: units of work, the one way to write, reads."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Hashable, Iterable, Mapping, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
    nullcontext,
)
from contextvars import ContextVar
from typing import Any, Literal, TypeVar, cast

import sqlalchemy as sa
from sqlalchemy import event, exc
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession
from sqlalchemy.orm import Session, SessionTransaction

from mainstay.core import Health
from mainstay.database import _metrics
from mainstay.database._engine import REFUSED, Address, Home
from mainstay.database._hints import CHANNEL_RULE, MOST_BYTES, Heard, Hints
from mainstay.database._recorder import Recorder, Turn
from mainstay.database._statements import Operation, Prepared, Statements
from mainstay.database._translation import DRIVER_ERRORS, translate
from mainstay.database.errors import DatabaseError, FenceLost, UnitOfWorkError
from mainstay.database.fence import Fence
from mainstay.database.lease import NAME_LENGTH, Keeper, Lease
from mainstay.database.schema import Schema, migrate, require

__all__ = ["Database"]

T = TypeVar("T")
Row = sa.Row[*tuple[Any, ...]]  # any number of columns: `Row[Any]` has exactly one
Rows = Sequence[Mapping[str, Any]] | Mapping[str, Any]

_log = logging.getLogger("mainstay.database")

_ONE_EMPTY_ROW: tuple[Mapping[str, Any], ...] = ({},)
# Statements raise our errors by themselves; a pool without a free connection and failures to connect or begin do not.
_REFUSED = (exc.SQLAlchemyError, sqlite3.Error, *DRIVER_ERRORS)
_WRITE = {"mainstay_begin": "BEGIN IMMEDIATE"}
_CANCEL_GRACE_SECONDS = 5.0  # how long a commit under way may keep a cancelled caller


class Unit:
    """What one task is in the middle of: a unit of work with a session, or a batch that only collects."""

    __slots__ = ("broken", "callbacks", "database", "fenced", "open", "operations", "outer", "session", "task", "token")

    def __init__(self, database: Database, session: AsyncSession | None) -> None:
        self.database = database
        self.session = session
        self.outer = _ambient.get()
        self.task = asyncio.current_task()
        self.open = False
        self.broken: BaseException | None = None
        self.operations: list[Operation] = []
        self.callbacks: list[tuple[Callable[[], None], SessionTransaction | None]] = []
        self.fenced: set[Fence] = set()

    def __enter__(self) -> None:
        self.open = True
        self.token = _ambient.set(self)

    def __exit__(self, *details: object) -> None:
        self.open = False  # tasks that were started inside have a copy of the context, and see this
        try:
            _ambient.reset(self.token)  # not a value of nothing: a caller could tell that its context was changed
        except ValueError:  # entered in another context: a fixture's, for example
            _ambient.set(self.outer)

    def call_back(self, callback: Callable[[], None]) -> None:
        """Keep the callback for the commit, together with the savepoint, or transaction, whose fate it shares."""
        if self.session is None:
            self.callbacks.append((callback, None))
            return
        session = self.session.sync_session
        if not self.callbacks:  # to listen again is the same as once
            event.listen(session, "after_soft_rollback", self.rolled_back)
        self.callbacks.append((callback, session.get_nested_transaction() or session.get_transaction()))

    def rolled_back(self, _session: object, ended: SessionTransaction) -> None:
        """Drop the callbacks of what is gone: of a savepoint and those in it, or of the whole transaction."""
        while not ended.nested and ended.parent is not None:  # a flush that failed took what is around it along
            ended = ended.parent
        self.callbacks = [each for each in self.callbacks if not _inside(each[1], ended)]

    @contextmanager
    def inner(self) -> Generator[None, None, None]:
        """A block that joins this unit: if it fails, and not inside a savepoint, the unit must not be committed."""
        nested = self.session is not None and self.session.sync_session.in_nested_transaction()
        try:
            yield
        except BaseException as error:
            if not nested and self.broken is None:
                self.broken = error
            raise


_ambient: ContextVar[Unit | None] = ContextVar("mainstay_unit_of_work", default=None)


class Database:
    """One way to the database, for the application and for every Mainstay package.

    Made by `DatabaseModule`; `app.get(Database)` finds it.

    Attributes:
        dialect: `sqlite` or `postgresql`.
        engine: the SQLAlchemy engine, for reading and for sessions of your own; write through `transaction`.
    """

    def __init__(
        self,
        address: Address,
        engine: AsyncEngine,
        recorder: Recorder,
        keeper: Keeper,
        statements: Statements,
        *,
        turn: Turn | None,
        pooled: bool,
        migrates: bool,
    ) -> None:
        self._address = address
        self._home = Home()
        self._hints = Hints()
        self._migrates = migrates
        self.dialect = cast("Literal['sqlite', 'postgresql']", engine.dialect.name)
        self.engine = engine
        self._recorder = recorder
        self._keeper = keeper
        self._statements = statements
        self._turn = turn
        self._writing = self._reading = engine
        self._reads_only = (
            sa.select(sa.func.current_setting("transaction_read_only"))
            if turn is None and address.must_write
            else sa.select(sa.literal("off"))
        )
        self._to_write = None if turn is None else _WRITE
        if turn is not None:
            self._writing = engine.execution_options(**_WRITE)
            self._reading = engine.execution_options(mainstay_begin="")
        elif not pooled:  # behind a pooler a statement needs a transaction to stay on one server
            self._reading = engine.execution_options(isolation_level="AUTOCOMMIT")

    # Units of work

    def transaction(self, session: AsyncSession | None = None) -> AbstractAsyncContextManager[AsyncSession]:
        """The unit of work of this task: everything in the block is committed together at its end, or not at all.

        It is ambient: `write`, and with it outbox, inbox, audit and transactional steps, join it by themselves. A
        `transaction()` inside it is the same one; when an inner block ends with an exception, the whole unit can only
        be rolled back (`session.begin_nested()` around it makes a savepoint to go back to). So it is after a statement
        that the database refused, also where its exception was caught.

        Args:
            session: a session of your own that is to be the unit. One that is not in a transaction is committed at
                the end of the block. Otherwise its owner commits it, and until then nothing of it is durable.

        Raises:
            DatabaseBusy: no connection, or on SQLite no writer's turn, in time.
            DatabaseUnavailable: the database is away.
            CommitUnknown: the connection was lost while committing.
            Conflict: a deferred constraint refused the commit.
            UnitOfWorkError: inside a batch; inside another task's unit of work; an inner block or a statement failed
                before.
        """
        unit = self._joined()
        if unit is None:
            return self._begin() if session is None else self._adopt(session)
        if unit.session is None:
            msg = "transaction() inside batch(): a batch only collects writes; open the transaction around the batch"
            raise UnitOfWorkError(msg)
        if session is not None and session is not unit.session:
            msg = "transaction(session=…) inside a unit of work of another session: one commit cannot cover both"
            raise UnitOfWorkError(msg)
        return _join(unit, unit.session)

    @asynccontextmanager
    async def _begin(self) -> AsyncGenerator[AsyncSession, None]:
        session = AsyncSession(self._writing, expire_on_commit=False)
        async with _writers(self._turn), self._own(session, end=session.close):
            yield session

    @asynccontextmanager
    async def _own(
        self, session: AsyncSession, *, end: Callable[[], Coroutine[Any, Any, None]]
    ) -> AsyncGenerator[None, None]:
        """Begin a transaction, and commit it at the end of the block; `end` leaves the session without one."""
        unit = Unit(self, session)
        try:
            try:
                # Now, not with the first statement: who must wait or cannot begin learns it before doing anything.
                connection = await session.connection(execution_options=self._to_write)
            except _REFUSED as error:
                raise translate(error) from error
            connection.info.pop(REFUSED, None)  # of the unit before
            with unit:
                yield
            _raise_if_doomed(unit, connection)
        except BaseException:
            _, cancelled = await uninterrupted(end())
            if cancelled is not None:
                raise cancelled from None
            raise
        failure, cancelled = await uninterrupted(_commit(session, end))
        if failure is None:
            _metrics.COMMITS_BY_TRANSACTION.inc()
            _run(callback for callback, _ in unit.callbacks)
        if cancelled is not None:
            raise cancelled
        if isinstance(failure, DatabaseError):
            raise failure
        if isinstance(failure, _REFUSED):
            raise translate(failure, committing=True) from failure
        if failure is not None:
            raise failure

    @asynccontextmanager
    async def _adopt(self, session: AsyncSession) -> AsyncGenerator[AsyncSession, None]:
        if not session.in_transaction():
            async with _writers(self._turn), self._own(session, end=session.rollback):
                yield session
            return
        # Its owner commits it. It may hold SQLite's lock already: to queue for the turn with it could be for ever.
        unit = Unit(self, session)
        savepoint = session.in_nested_transaction()
        connection = await session.connection()
        connection.info.pop(REFUSED, None)  # of the unit before
        try:
            with unit:
                yield session
            _raise_if_doomed(unit, connection)
        except BaseException:
            if not savepoint:  # or its owner goes back to the savepoint
                _ = await uninterrupted(session.rollback())
            raise
        if unit.callbacks:
            _when_committed(session.sync_session, unit)

    def in_unit_of_work(self) -> bool:
        """Whether a write would join a unit of work or a batch of this task.

        Raises:
            UnitOfWorkError: the task was started inside another task's unit of work that is still open.
        """
        return self._current() is not None

    def after_commit(self, callback: Callable[[], None]) -> None:
        """Call back once the current unit of work or batch is committed, never if it is not; at once without one.

        A callback inside a savepoint (`session.begin_nested()`) is dropped when that is rolled back. What a callback
        raises is logged and goes no further: the commit has happened.
        """
        unit = self._current()
        if unit is None:
            _run([callback])
        else:
            unit.call_back(callback)

    def batch(self, *, fence: Fence | None = None, route: Hashable = None) -> AbstractAsyncContextManager[None]:
        """Collect the block's writes and hand them over as one: all or nothing, and durable at the end of the block.

        Ambient like `transaction`, but without a connection: several thousand may be open at once. Inside a unit of
        work or another batch the writes simply join that. Reads in the block do not see the writes.

        Args:
            fence: the writes happen only while it holds.
            route: as for `write`.

        Raises:
            DatabaseError: as of `write`.
        """
        unit = self._joined()
        return self._collect(fence, route) if unit is None else self._join_with(unit, fence)

    @asynccontextmanager
    async def _collect(self, fence: Fence | None, route: Hashable) -> AsyncGenerator[None, None]:
        unit = Unit(self, None)
        if fence is not None:
            unit.fenced.add(fence)
        with unit:
            yield
        if unit.broken is not None:
            raise _broken(unit.broken) from unit.broken
        if unit.operations:
            await self._recorder.record(unit.operations, _only(unit.fenced), route)
        _run(callback for callback, _ in unit.callbacks)

    @asynccontextmanager
    async def _join_with(self, unit: Unit, fence: Fence | None) -> AsyncGenerator[None, None]:
        with unit.inner():
            if fence is not None:
                await self._check(unit, fence)
            yield

    # Writing and reading

    async def write(
        self,
        statement: sa.UpdateBase,
        rows: Rows = _ONE_EMPTY_ROW,
        *,
        fence: Fence | None = None,
        route: Hashable = None,
    ) -> None:
        """Write rows: in the unit of work or batch of this task, else on its own, returning when they are durable.

        Args:
            statement: a Core insert, update or delete with `bindparam`s, best a constant of the module: it is compiled
                once, and grouped with others of the same statement. An update that says
                `.execution_options(mainstay_by_column=True)` is carried out for all rows of a group at once, on
                PostgreSQL, so that several which change the same row count as one of them.
            rows: the parameters, a mapping or several with the same keys.
            fence: the write happens only while it holds.
            route: writes of the same route take effect in the order of the calls. Writes of different routes, or
                without one, may overtake each other until they have returned.

        Raises:
            Conflict: a constraint refused a row.
            FenceLost: the fence no longer holds.
            DatabaseBusy: no lock or writer's turn in time.
            DatabaseUnavailable: the database is away.
            CommitUnknown: the connection was lost while committing.
            DatabaseError: the database refused the statement.
            UnitOfWorkError: the task was started inside another task's open unit of work.

        After any error nothing of this call is there, except after `CommitUnknown`.
        """
        several = [rows] if isinstance(rows, Mapping) else rows
        if not several:
            return
        unit = self._joined()
        if unit is None:
            await self._recorder.record(self._operations(statement, several), fence, route)
            return
        if fence is not None:
            await self._check(unit, fence)
        if unit.session is None:
            unit.operations += self._operations(statement, several)
            return
        connection = await self._connection(unit)
        self._form(statement, several)
        try:
            await connection.execute(statement, several)
        except exc.SQLAlchemyError as error:  # of values that do not fit; what the database refuses is translated
            raise translate(error) from error

    async def read(self, statement: sa.Executable, parameters: Mapping[str, Any] | None = None) -> Sequence[Row]:
        """The rows of a query; in the unit of work of this task if there is one, else on a connection of its own.

        It never waits for the writer's turn; a statement that changes anything belongs into `transaction`.

        Raises:
            DatabaseBusy: no connection in time.
            DatabaseUnavailable: the database is away.
            DatabaseError: the database refused the statement.
            UnitOfWorkError: the task was started inside another task's open unit of work.
        """
        unit = self._joined()
        if isinstance(statement, sa.UpdateBase) and (unit is None or unit.session is None):
            msg = "read() of a statement that writes: put it into `async with db.transaction()`, or use db.write"
            raise UnitOfWorkError(msg)
        try:
            if unit is not None and unit.session is not None:
                connection = await self._connection(unit)
                return (await connection.execute(statement, parameters or {})).all()
            async with self._reading.connect() as connection:
                return (await connection.execute(statement, parameters or {})).all()
        except _REFUSED as error:
            raise translate(error) from error

    async def lease(self, name: str, *, seconds: float = 10.0, holder: str | None = None) -> Lease | None:
        """Take the lease of this name and keep renewing it; None while it is held, also in this process.

        Args:
            name: what it is for, up to 255 characters.
            seconds: how long others wait for a holder that died.
            holder: shown in the table; by default host, process and a random part.

        Raises:
            ValueError: the name is empty or too long, or the time is.
            DatabaseBusy: SQLite's writer was not free in time.
            DatabaseUnavailable: the database is away.
        """
        if not seconds > 0 or not 0 < len(name) <= NAME_LENGTH:
            msg = f"lease({name!r}, seconds={seconds!r}): 1 to {NAME_LENGTH} characters, and more than 0 seconds"
            raise ValueError(msg)
        self._home.check()
        if self.in_unit_of_work():
            msg = f"lease({name!r}) inside a unit of work: on SQLite it would wait for that; take it before"
            raise UnitOfWorkError(msg)
        return await self._keeper.acquire(name, seconds, holder)

    # Hints

    def notify(self, channel: str, payload: str = "") -> None:
        """Hint to those who listen that there is something new: once the current unit of work or batch is committed.

        Those of this process are called at once then, those of other processes on PostgreSQL within some milliseconds.
        A hint may be lost and may come twice; it is never the only way to notice something. Equal ones are sent once.

        Args:
            channel: 1 to 63 lower-case letters, digits and underscores, the first no digit; with the package's name.
            payload: what is new, such as an id: up to 1,000 bytes. Empty for "look at everything".

        Raises:
            ValueError: the channel breaks the rule, or the payload is longer.
        """
        _check_channel(channel)
        if len(payload.encode()) > MOST_BYTES:
            msg = f"notify({channel!r}): the payload has {len(payload.encode())} bytes, and {MOST_BYTES} are allowed"
            raise ValueError(msg)
        self._home.check()
        self.after_commit(lambda: self._hints.tell(channel, payload))

    def listen(self, channel: str, heard: Heard) -> AbstractContextManager[None]:
        """Call `heard` with the payload of every hint on the channel while the block runs, on this event loop.

        On PostgreSQL also those of other processes, by a connection that the Database owns, makes when it is first
        needed, and makes again when it is lost. Each time it is there `heard` is called with an empty payload, since
        hints may have been missed. On SQLite, and behind a pooler without `direct_url`, others are not heard: so look
        now and then all the same, more seldom while `hears_others`.

        Raises:
            ValueError: the channel breaks the rule of `notify`.
        """
        _check_channel(channel)
        self._home.check()
        return self._hints.listening(channel, heard)

    @property
    def hears_others(self) -> bool:
        """Whether hints of other processes arrive at the moment."""
        return self._hints.heard

    async def ensure_schema(self, schema: Schema) -> None:
        """Bring SQLite to the newest revision of a package's tables; make sure that PostgreSQL is there.

        With the setting `migrate` turned off, SQLite is only looked at too.

        Raises:
            ConfigurationError: the tables are at another revision and are not migrated here; names the command.
        """
        self._home.check()
        async with self.engine.connect() as connection:
            if self._turn is None or not self._migrates:
                await require(connection, schema)
                return
            if await connection.run_sync(schema.is_current):
                return
        async with self._turn.mine():
            await migrate(self._address, [schema])

    async def missing_rights(
        self, tables: Iterable[sa.Table], rights: Sequence[str] = ("SELECT", "INSERT", "UPDATE", "DELETE")
    ) -> list[str]:
        """Say for each table which of `rights` this service's user of PostgreSQL lacks; nothing on SQLite.

        Args:
            tables: that exist.
            rights: as GRANT names them.

        Returns:
            A sentence for each table where one is missing, with the statement that grants it.
        """
        if self.dialect != "postgresql":
            return []
        found: list[str] = []
        for table in tables:
            asked = [sa.func.has_table_privilege(table.fullname, right) for right in rights]
            row: Row = (await self.read(sa.select(sa.func.current_user(), *asked)))[0]
            user = row[0]
            lacks = ", ".join(right for place, right in enumerate(rights, 1) if not row[place])
            if lacks:
                found.append(f"{user} lacks {lacks} on {table.fullname}: GRANT {lacks} ON {table.fullname} TO {user}")
        return found

    async def health(self) -> Health:
        """`degraded` when every connection is in use, `down` when the database does not answer, or cannot write."""
        self._home.check()
        pool = cast("sa.QueuePool", self.engine.sync_engine.pool)
        if pool.checkedout() >= pool.size():
            return Health("degraded", f"all {pool.size()} connections are in use")
        try:
            async with self._reading.connect() as connection:
                reads_only = (await connection.execute(self._reads_only)).scalar_one()
                if reads_only == "on":
                    self._address.leave()
                    return Health("down", "the server only reads: it is a standby, or was demoted")
        except (*_REFUSED, DatabaseError) as error:
            return Health("down", f"no answer ({type(error.__cause__ or error).__name__})")
        unwritable = self._address.unwritable
        return Health("ok") if unwritable is None else Health("down", unwritable)

    # Internal

    def _form(self, statement: sa.UpdateBase, rows: Sequence[Mapping[str, Any]]) -> Prepared:
        try:
            return self._statements.prepared(statement, tuple(rows[0]))
        except (ValueError, exc.SQLAlchemyError) as error:
            raise _unfit(statement, error) from error

    def _operations(self, statement: sa.UpdateBase, rows: Sequence[Mapping[str, Any]]) -> list[Operation]:
        form = self._form(statement, rows)
        try:
            return self._statements.operations(form, rows)
        except Exception as error:  # a converter may raise anything
            raise _unfit(statement, error) from error

    def _current(self) -> Unit | None:
        unit = _ambient.get()
        while unit is not None and (not unit.open or unit.database is not self):
            unit = unit.outer
        if unit is not None and unit.task is not _task():
            msg = (
                "this task was started inside another task's unit of work, which is still open: what it writes would "
                "belong to neither. Do the work in the same task (`asyncio.timeout` instead of `wait_for`), start the "
                "task after the block, or start it with mainstay.core.spawn"
            )
            raise UnitOfWorkError(msg)
        return unit

    def _joined(self) -> Unit | None:
        unit = self._current()
        self._home.check()
        return unit

    async def _connection(self, unit: Unit) -> AsyncConnection:
        if unit.broken is not None:
            raise _broken(unit.broken) from unit.broken
        return await cast("AsyncSession", unit.session).connection()

    async def _check(self, unit: Unit, fence: Fence) -> None:
        if fence in unit.fenced:
            return
        if unit.session is None:
            if unit.fenced:
                msg = "a batch has one fence: give it to batch(fence=…), or make two batches"
                raise UnitOfWorkError(msg)
        else:
            connection = await self._connection(unit)
            try:
                found = (await connection.execute(fence.on.one, {"id": fence.id})).one_or_none()
            except _REFUSED as error:
                raise translate(error) from error
            if not fence.holds(found):
                raise FenceLost(fence.lost())
            if unit.session.in_nested_transaction():
                return  # going back to the savepoint gives up the lock that the check took: the next write asks again
        unit.fenced.add(fence)


def _task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:  # a thread, which has a copy of the context but no loop
        return None


def _writers(turn: Turn | None) -> AbstractAsyncContextManager[None]:
    return nullcontext() if turn is None else turn.mine()


@asynccontextmanager
async def _join(unit: Unit, session: AsyncSession) -> AsyncGenerator[AsyncSession, None]:
    with unit.inner():
        yield session


def _check_channel(channel: str) -> None:
    if CHANNEL_RULE.fullmatch(channel) is None:
        msg = (
            f"{channel!r} is no channel: it has 1 to 63 lower-case letters, digits and underscores, the first no digit"
        )
        raise ValueError(msg)


def _unfit(statement: sa.UpdateBase, error: Exception) -> DatabaseError:
    return DatabaseError(f"these rows do not fit the statement {statement}: {type(error).__name__}: {error}")


def _only(fences: set[Fence]) -> Fence | None:
    return next(iter(fences), None)


def _broken(error: BaseException) -> UnitOfWorkError:
    msg = (
        f"an inner block of this unit of work failed with {type(error).__name__} and was caught: its half must not be "
        "committed. Let the exception pass, or put `async with session.begin_nested():` around the inner block"
    )
    return UnitOfWorkError(msg)


def _raise_if_doomed(unit: Unit, connection: AsyncConnection) -> None:
    if unit.broken is not None:
        raise _broken(unit.broken) from unit.broken
    if not connection.closed and (refused := connection.info.pop(REFUSED, None)):
        # PostgreSQL has given up the transaction, and answers its COMMIT with a rollback that no error reports.
        msg = (
            f"the database refused a statement of this unit of work with {refused}, which was caught: the rest is not "
            "committed. Let the exception pass, or put `async with session.begin_nested():` around the statement"
        )
        raise UnitOfWorkError(msg)


def _inside(transaction: SessionTransaction | None, outer: SessionTransaction) -> bool:
    while transaction is not None and transaction is not outer:
        transaction = transaction.parent
    return transaction is outer


def _run(callbacks: Iterable[Callable[[], None]]) -> None:
    for callback in callbacks:
        try:
            callback()
        except Exception:  # noqa: BLE001  the commit has happened, also where a callback fails
            _log.exception("a callback after the commit failed")


async def _commit(session: AsyncSession, end: Callable[[], Coroutine[Any, Any, None]]) -> None:
    try:
        await session.commit()
    finally:
        await end()


def _when_committed(session: Session, unit: Unit) -> None:
    """Call back once the owner of an adopted session has committed it."""

    def committed(_session: object) -> None:
        if not session.in_nested_transaction():
            _run(callback for callback, _ in unit.callbacks)

    def ended(_session: object, transaction: SessionTransaction) -> None:
        if transaction.parent is None:  # committed, rolled back, or closed by an owner who did neither
            unit.callbacks = []

    event.listen(session, "after_commit", committed)
    event.listen(session, "after_transaction_end", ended)


async def uninterrupted(
    work: Coroutine[Any, Any, None],
) -> tuple[BaseException | None, asyncio.CancelledError | None]:
    """Do what must not be left half done, also when the caller is cancelled meanwhile.

    Returns what the work raised, and the cancellation, which the caller has to raise. Work that goes on for longer than
    the grace after a cancellation is cancelled too.
    """
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    loop, ends_at = asyncio.get_running_loop(), float("inf")
    while not task.done():
        try:
            await asyncio.wait([task], timeout=None if cancelled is None else max(0.0, ends_at - loop.time()))
        except asyncio.CancelledError as error:  # a scope of anyio's cancels again at each turn of the task
            if cancelled is None:
                cancelled, ends_at = error, loop.time() + _CANCEL_GRACE_SECONDS
        if loop.time() >= ends_at:
            task.cancel()
            ends_at = loop.time() + _CANCEL_GRACE_SECONDS
    failure = asyncio.CancelledError() if task.cancelled() else task.exception()
    return failure, cancelled
