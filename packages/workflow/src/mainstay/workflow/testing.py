"""For tests of code that uses workflows: an App in one line, and a worker that dies at every possible moment."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import SecretStr

from mainstay.core import SYSTEM_CLOCK, App, Clock, Drain, Feature, Module, spawn
from mainstay.database import Database, DatabaseModule, DatabaseSettings, Schema, upgrade
from mainstay.database.schema import SCHEMA as DATABASE
from mainstay.workflow._payloads import Payloads
from mainstay.workflow._worker import Worker
from mainstay.workflow.codec import PayloadCodec
from mainstay.workflow.engine import WorkflowEngine
from mainstay.workflow.module import WorkflowModule
from mainstay.workflow.router import WorkflowRouter
from mainstay.workflow.settings import WorkflowSettings
from mainstay.workflow.tables import SCHEMA
from mainstay.workflow.workflow import Handle

__all__ = ["DyingDatabase", "Killed", "explore", "workflows"]

T = TypeVar("T")

_MEMORY = "sqlite+aiosqlite:///:memory:"
_QUICK: dict[str, Any] = {"lease_seconds": 0.5, "poll_seconds": 0.05}


@asynccontextmanager
async def workflows(
    *parts: WorkflowRouter | PayloadCodec,
    url: str = _MEMORY,
    serve: bool = True,
    clock: Clock = SYSTEM_CLOCK,
    modules: Sequence[Module[Any, Any] | Feature] = (),
    schemas: Sequence[Schema] = (),
    **settings: Any,
) -> AsyncGenerator[App, None]:
    """A running App with a database, its tables, and these parts.

    Args:
        parts: what to execute, and the codec of its payloads, if any.
        modules: what else the App has, for sagas that publish, audit or use the service's own module. A
            `DatabaseModule` or a `WorkflowModule` among them takes the place of the one that this would make.
        schemas: the tables of those modules, made at `url` where that is no SQLite, which makes its own.
        url: where; by default in memory.
        serve: whether it executes runs, or only starts them.
        clock: what retries and waits are measured with.
        settings: of `WorkflowSettings`; leases and polling are short unless they say otherwise.
    """
    if not url.startswith("sqlite"):
        await upgrade(url, [DATABASE, SCHEMA, *schemas])
    given = {type(module) for module in modules}
    mine: list[Module[Any, Any]] = [
        DatabaseModule.for_root(DatabaseSettings(url=SecretStr(url))),
        WorkflowModule.for_root(WorkflowSettings(**{**_QUICK, **settings})),
    ]
    app = App(
        *(module for module in mine if type(module) not in given),
        *modules,
        *([WorkflowModule.for_feature(*parts)] if parts else []),
        clock=clock,
    )
    async with app.running(serve=serve):
        while serve and not app.get(WorkflowEngine).worker.held:  # noqa: ASYNC110  the database gives it
            await asyncio.sleep(0.001)
        yield app


class Killed(BaseException):
    """The worker is dead; nothing may catch this."""


class DyingDatabase:
    """A database whose user dies at one moment: before or after its `at`-th write becomes durable.

    Everything that the dead do later raises `Killed`, so nothing more is recorded.
    """

    def __init__(self, database: Database, at: int | None, *, after: bool) -> None:
        self._database = database
        self._at = at
        self._after = after
        self.moments = 0
        self.dead = asyncio.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._database, name)

    async def write(self, *args: Any, **kwargs: Any) -> None:
        """`Database.write`; a moment of its own, unless it joins a unit of work."""
        if self._database.in_unit_of_work():
            self._check()
            await self._database.write(*args, **kwargs)
        else:
            await self._moment(lambda: self._database.write(*args, **kwargs))

    async def read(self, *args: Any, **kwargs: Any) -> Any:
        """`Database.read`."""
        self._check()
        return await self._database.read(*args, **kwargs)

    def batch(self, **kwargs: Any) -> AbstractAsyncContextManager[None]:
        """`Database.batch`."""
        return self._around(lambda: self._database.batch(**kwargs))

    def transaction(self, session: Any = None) -> AbstractAsyncContextManager[Any]:
        """`Database.transaction`."""
        return self._around(lambda: self._database.transaction(session))

    @asynccontextmanager
    async def _around(self, open_it: Callable[[], AbstractAsyncContextManager[T]]) -> AsyncGenerator[T, None]:
        if self._database.in_unit_of_work():
            async with open_it() as inner:
                yield inner
            return
        self._check()
        here = self._count()
        async with open_it() as unit:
            yield unit
            self._check()
            if here and not self._after:
                self._die()
        if here and self._after:
            self._die()
        self._check()

    async def _moment(self, work: Callable[[], Awaitable[None]]) -> None:
        self._check()
        here = self._count()
        if here and not self._after:
            self._die()
        await work()
        if here and self._after:
            self._die()
        self._check()

    def _count(self) -> bool:
        self.moments += 1
        return self.moments == self._at

    def _check(self) -> None:
        if self.dead.is_set():
            raise Killed

    def _die(self) -> None:
        self.dead.set()
        raise Killed


async def explore(
    *parts: WorkflowRouter | PayloadCodec,
    start: Callable[[App], Awaitable[Handle[Any]]],
    check: Callable[[Handle[Any], App], Awaitable[None]],
    url: Callable[[], str] = lambda: _MEMORY,
    modules: Callable[[], Sequence[Module[Any, Any] | Feature]] = tuple,
    timeout_seconds: float = 20.0,
) -> int:
    """Let a worker die at every moment of a run, and another one take the run over.

    A moment is the time just before, or just after, something becomes durable: what a crash can tell apart. For each of
    them a fresh database is made, the run is started, its worker dies, a second worker takes over; when the run has
    ended or is parked, `check` is called.

    Args:
        parts: what the run is made of, and the codec of its payloads, if any. What its steps do outside must be reset
            by `start`.
        start: starts the run.
        check: asserts what must hold, whenever the worker died.
        url: makes the address of a fresh database for each moment; by default in memory.
        modules: makes what else the App has, as in `workflows`, for each moment.
        timeout_seconds: how long one run may take.

    Returns:
        How many moments there were.

    Raises:
        TypeError: `modules` is no function.
        TimeoutError: a run took longer than `timeout_seconds`, such as one that sleeps for days: time is real here.
        Exception: what `start` or `check` raised; a note says at which moment the worker died.
    """
    made_by: object = modules
    if not callable(made_by):
        msg = "explore: modules is a function that makes them, one set for each moment: modules=lambda: [...]"
        raise TypeError(msg)
    at, explored = 1, 0
    while True:
        reached = False
        for after in (False, True):
            moment = _Moment(at=at, after=after, url=url(), modules=modules(), seconds=timeout_seconds)
            try:
                reached = await _die_at(parts, start, check, moment)
            except BaseException as error:
                error.add_note(f"the worker died just {'after' if after else 'before'} write {at} became durable")
                raise
            explored += reached
        if not reached:
            return explored
        at += 1


_GRACE_SECONDS = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Moment:
    at: int
    after: bool
    url: str
    modules: Sequence[Module[Any, Any] | Feature]
    seconds: float


async def _die_at(
    parts: tuple[WorkflowRouter | PayloadCodec, ...],
    start: Callable[[App], Awaitable[Handle[Any]]],
    check: Callable[[Handle[Any], App], Awaitable[None]],
    moment: _Moment,
) -> bool:
    app_of = workflows(*parts, url=moment.url, serve=False, modules=moment.modules)
    # `start` and `check` have as much again; the limit that says what is wrong comes first on a busy machine, too.
    async with app_of as app, asyncio.timeout(2 * moment.seconds + _GRACE_SECONDS):
        handle = await start(app)
        database = app.get(Database)
        dying = DyingDatabase(database, moment.at, after=moment.after)
        drain = Drain()
        first = spawn(_worker(parts, dying, app.clock).work(drain), name="the worker that dies")  # type: ignore[arg-type]  # it stands in for a Database
        dead = spawn(dying.dead.wait(), name="its death")
        ended = spawn(_settled(handle, moment.seconds), name="the end")
        second: asyncio.Task[None] | None = None
        try:
            await asyncio.wait([dead, ended], return_when=asyncio.FIRST_COMPLETED)
            if dying.dead.is_set():
                first.cancel()
                await asyncio.gather(first, return_exceptions=True)
                second = spawn(_worker(parts, database, app.clock).work(drain), name="the one that takes over")
            await ended
            await check(handle, app)
        finally:
            drain.begin()
            for task in (dead, ended):
                task.cancel()
            await asyncio.gather(dead, ended, *([first] if second is None else [second]), return_exceptions=True)
        return second is not None


def _worker(parts: tuple[WorkflowRouter | PayloadCodec, ...], database: Database, clock: Clock) -> Worker:
    routers = [part for part in parts if isinstance(part, WorkflowRouter)]
    codec = next((part for part in parts if isinstance(part, PayloadCodec)), None)
    return Worker(
        database=database,
        clock=clock,
        settings=WorkflowSettings(**_QUICK),
        workflows={key: workflow for router in routers for key, workflow in router.workflows.items()},
        steps={name: step for router in routers for name, step in router.steps.items()},
        payloads=Payloads(codec),
        ended=_nobody_waits,
    )


def _nobody_waits(_id: str, _status: object, _output: object, _failure: object) -> None: ...


async def _settled(handle: Handle[Any], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not ((status := await handle.status()).terminal or status.waits_for_a_person):
        if time.monotonic() > until:
            msg = (
                f"run {handle.id!r} is {status} after {seconds:g} seconds: let `start` send the signals that it waits "
                "for, give its waits a length that a test can choose, or explore with a longer timeout_seconds"
            )
            raise TimeoutError(msg)
        await asyncio.sleep(0.005)
