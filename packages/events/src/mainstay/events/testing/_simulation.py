"""Handlers under faults: many runs in virtual time, each decided by its seed, and the smallest one that fails."""

from __future__ import annotations

import asyncio
import gc
import logging
import shutil
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from contextvars import Context
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import sqlalchemy as sa

from mainstay.core import App, Module, spawn
from mainstay.core.module import Feature
from mainstay.core.testing import repeatable
from mainstay.database import Database, DatabaseBusy, upgrade
from mainstay.database.schema import SCHEMA as DATABASE
from mainstay.database.testing import SimulatedDatabase
from mainstay.events._snapshot import START, Place
from mainstay.events._sql import SqlTransport
from mainstay.events.dead_letters import DeadLetters
from mainstay.events.event import Event, definition_of
from mainstay.events.metadata import ID, TYPE, Metadata
from mainstay.events.module import EventsModule
from mainstay.events.parked import ParkedKeys
from mainstay.events.publisher import EventPublisher
from mainstay.events.router import EventRouter, Subscription
from mainstay.events.strategies import RetryLater
from mainstay.events.tables import LOG, OUTBOX, READ_PLACES, SCHEMA, unpack_headers
from mainstay.events.testing._broker import SimulatedTopics
from mainstay.events.testing._plan import Plan, Seed, calm, plan_of, shrunk
from mainstay.events.testing._processes import AT_COMMIT, Process, broker_of, is_of_the_start, settings
from mainstay.events.testing._world import ProcessLoop, World

_LOOK_SECONDS = 0.25
_STARTS = 20
_SHRINK_TRIES = 30
_LINES = 60
_OUTBOX = sa.select(OUTBOX.c.topic)
_EVENTS = sa.select(LOG.c.position, LOG.c.topic, LOG.c.partition, LOG.c.key, LOG.c.headers).order_by(LOG.c.position)


class Simulation:
    """What is simulated: subclass it. An object is made for each run, and outlives the processes of the run.

    What is kept in `self` is therefore the world outside: a bank, a printer, a mailbox.

    Attributes:
        tables: of the handlers, made before each run; None for none.
        timeout_seconds: of virtual time after the last event was published, within which all is handled.
    """

    tables: ClassVar[sa.MetaData | None] = None
    timeout_seconds: ClassVar[float] = 300.0

    def feature(self) -> EventRouter | Sequence[EventRouter]:
        """Make the routers of one process, with all that it has in memory: called at each start of a process."""
        raise NotImplementedError

    def events(self) -> Sequence[Event]:
        """What is published, in this order."""
        raise NotImplementedError

    def modules(self) -> Sequence[Module[Any, Any] | Feature]:
        """What else the App of a process has, beside the Database and events: called at each start of a process."""
        return ()

    async def start(self, db: Database) -> None:
        """Write what is there before the first event."""

    async def check(self, db: Database, events: Sequence[Event]) -> None:
        """Assert what must hold when everything has been handled, after all that went wrong meanwhile.

        Args:
            db: reads what handlers have written.
            events: what was published. When a run that failed is made smaller, that is less than `events` returns.
        """
        raise NotImplementedError


class SimulationFailedError(AssertionError):
    """A run failed; the message tells its story, and how to have it told again.

    Attributes:
        seed: of the smallest run that was found to fail: `simulate(…, seeds=[seed])` repeats it.
        story: what happened in it, a line each.
    """

    def __init__(self, name: str, found: Seed, failed: Failed) -> None:
        self.seed = failed.plan.seed
        self.story = failed.story
        told = (
            self.story if len(self.story) <= _LINES else [f"… {len(self.story) - _LINES} lines", *self.story[-_LINES:]]
        )
        lines = "".join(f"\n    {line}" for line in told)
        error = f"{type(failed.error).__name__}: {failed.error}"
        if failed.plan.number is None:
            super().__init__(f"{name} fails where nothing goes wrong: {error}{lines}")
        else:
            super().__init__(f"{name} fails with seed {found}: {error}{lines}\nthe same again: seeds=[{self.seed!r}]")


class NotHandledError(AssertionError):
    """An event was lost, or is blocked."""


class OrderError(AssertionError):
    """An event was handled before another of its key that came first."""


class Failed:
    def __init__(self, plan: Plan, error: BaseException, story: list[str]) -> None:
        self.plan = plan
        self.error = error
        self.story = story


def simulate(kind: Callable[[], Simulation], *, seeds: Iterable[Seed], seconds: float = float("inf")) -> int:
    """Run handlers in a simulated world once for each seed, in which what can go wrong does.

    Processes crash, freeze, leave and join; commits are refused, late, or in doubt; an await is slow, or is cancelled;
    an event is handled once more. Dispatcher, inbox, log and leases are those of production, on SQLite; time is
    virtual. The same seed is the same run, on each machine. First comes one in which nothing goes wrong.

    A run is right if each event has been handled, equal keys in turn, and `check` holds. An event that becomes a dead
    letter, or is parked, in the first run may do so in the others.

    Args:
        kind: the class, or what makes an object of it.
        seeds: numbers, or the text that a failure has printed.
        seconds: of real time, after which no further run begins.

    Returns:
        How many runs there were.

    Raises:
        SimulationFailedError: the first run that is not right, made as small as possible.
        RuntimeError: an event loop is running: call it from a plain function.
        ValueError: a seed that is none.
    """
    if asyncio._get_running_loop() is not None:
        msg = "simulate() has event loops of its own: call it from a plain `def test_…`, not from an async one"
        raise RuntimeError(msg)
    until = time.monotonic() + seconds
    name = getattr(kind, "__name__", type(kind).__name__)
    with tempfile.TemporaryDirectory(prefix="mainstay-simulated-") as directory, _quiet():
        trials = Trials(kind, Path(directory))
        first = trials.run(calm(trials.events))
        if first.error is not None:
            raise SimulationFailedError(name, 0, Failed(first.plan, first.error, first.story)) from first.error
        trials.given_up = frozenset(first.given_up)
        runs = 1
        for seed in seeds:
            if time.monotonic() > until:
                break
            runs += 1
            run = trials.run(plan_of(seed, first.moments, trials.events))
            if run.error is not None:
                failed = Failed(run.plan, run.error, run.story)
                smallest = trials.shrunk(failed) if isinstance(seed, int) else failed
                raise SimulationFailedError(name, seed, smallest) from smallest.error
        return runs


@contextmanager
def _collected() -> Generator[None, None, None]:
    """Collect the garbage of a run after it: what is done about it meanwhile would be done at another moment each time.

    What dead processes have left is no loss, though its owners would say so.
    """
    was_on = gc.isenabled()
    gc.disable()
    pools = logging.getLogger("sqlalchemy.pool")
    level = pools.level
    try:
        yield
    finally:
        pools.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            gc.collect(0)
        pools.setLevel(level)
        if was_on:
            gc.enable()


@contextmanager
def _quiet() -> Generator[None, None, None]:
    log = logging.getLogger("mainstay")
    before = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        log.setLevel(before)


class Trials:
    """Runs of one simulation."""

    def __init__(self, kind: Callable[[], Simulation], directory: Path) -> None:
        self._kind = kind
        self._directory = directory
        self._count = 0
        self.events = len(kind().events())
        self.given_up: frozenset[tuple[str, str]] = frozenset()

        empty = self._empty = directory / "empty.db"
        asyncio.run(upgrade(f"sqlite+aiosqlite:///{empty}", [DATABASE, SCHEMA]))
        engine = sa.create_engine(f"sqlite:///{empty}")
        with engine.begin() as connection:
            if (tables := kind().tables) is not None:
                tables.create_all(connection)
        engine.dispose()

    def run(self, plan: Plan) -> Run:
        self._count += 1
        file = self._directory / f"{self._count}.db"
        shutil.copyfile(self._empty, file)
        run = Run(self._kind(), plan, file, self.given_up)
        with _collected(), repeatable(f"mainstay {plan.number}", run.world.clock):
            run.go()
        for leftover in self._directory.glob(f"{self._count}.db*"):
            leftover.unlink()
        return run

    def shrunk(self, failed: Failed) -> Failed:
        found: dict[Seed, Failed] = {failed.plan.seed: failed}

        def fails(plan: Plan) -> bool:
            if len(plan.events) < self.events and self.run(calm(self.events, plan.events)).error is not None:
                return False  # what is checked does not hold for fewer events at all
            run = self.run(plan)
            if run.error is not None:
                found[plan.seed] = Failed(plan, run.error, run.story)
            return run.error is not None

        return found[shrunk(failed.plan, fails, _SHRINK_TRIES).seed]


class _Outside:
    """Who publishes and looks: nothing ever happens to it."""

    async def statement(self) -> None:
        """See `Moments`."""

    async def commit(self, work: Callable[[], None]) -> None:
        """See `Moments`."""
        work()


class Run:
    """One run."""

    def __init__(self, subject: Simulation, plan: Plan, file: Path, given_up: frozenset[tuple[str, str]]) -> None:
        self.plan = plan
        self.file = file
        self.world = World()
        self.moments = 0
        self.story: list[str] = []
        self.error: BaseException | None = None
        self.given_up: set[tuple[str, str]] = set()
        self._may_give_up = given_up
        self._subject = subject
        self._random = Random(f"mainstay {plan.number} run")  # noqa: S311  the same each time is the point
        self._faults = sorted(plan.faults.values(), key=lambda fault: fault.moment)
        self._processes: list[Process] = []
        self._starts = 0
        self._judged = False
        self._names: dict[str, str] = {}
        self._numbers: dict[str, int] = {}  # the order, by id
        self.topics: SimulatedTopics | None = None
        self._serving: asyncio.Task[None] | None = None
        self._order = 0
        self._first_call: dict[tuple[str, str], tuple[int, frozenset[str]]] = {}  # when, and behind which others
        self._first_return: dict[tuple[str, str], int] = {}
        self._subscriptions = [each for router in self._routers() for each in router.subscriptions]

    def _routers(self) -> Sequence[EventRouter]:
        made = self._subject.feature()
        return [made] if isinstance(made, EventRouter) else made

    def go(self) -> None:
        """Do it; `error` says how it ended."""
        database = SimulatedDatabase(self.file, _Outside())
        loop = ProcessLoop(self.world, lambda: None)
        self.topics = SimulatedTopics(self.world, loop) if self.plan.relayed else None
        task = loop.create_task(self._outside(database), context=Context())
        self.world.run(lambda: task.done() or self.error is not None)
        if self.error is None:
            self.error = task.exception()
        self._judged = True
        databases = [database, *(process.database for process in self._processes)]
        for each in databases:
            each.crash()
        self.world.bury([loop, *(process.loop for process in self._processes)])
        for each in databases:  # tasks that are cancelled may open a connection on their way to the end
            each.crash()

    async def _outside(self, database: SimulatedDatabase) -> None:
        module = EventsModule.for_root(settings())
        module._relay_to = broker_of(self.topics, None)
        async with App(database.module, module, clock=self.world.clock) as app:
            db = app.get(Database)
            await self._subject.start(db)
            if self.topics is not None:
                self._serving = spawn(self.topics.serve(app.get(SqlTransport)), name="simulated broker")
            for _ in range(self.plan.processes):
                self.joins()
            await self._publish(app)
            await self._handled(app, db)
            rows = await db.read(_EVENTS)
            self._check_published(rows)
            self._check_order(rows)
            events = self._subject.events()
            await self._subject.check(db, [events[place] for place in self.plan.events])

    async def _publish(self, app: App) -> None:
        events = self._subject.events()
        for place in self.plan.events:
            id_ = await self._published(app.get(EventPublisher), events[place])
            self._numbers[id_] = len(self._numbers)
            self._names[id_] = f"{definition_of(type(events[place])).type} #{place}"
            pace = self.plan.pace_seconds
            await asyncio.sleep(pace if self.plan.number is None else self._random.random() * pace)

    @staticmethod
    async def _published(publisher: EventPublisher, event: Event) -> str:
        while True:
            try:
                return await publisher.publish(event)
            except DatabaseBusy:  # a slow or frozen process holds SQLite's one lock; nothing was written
                await asyncio.sleep(_LOOK_SECONDS)

    async def _handled(self, app: App, db: Database) -> None:
        end = self.world.now + self._subject.timeout_seconds
        quiet = 0
        while quiet < 4:
            await asyncio.sleep(_LOOK_SECONDS)
            missing = await self._missing(app, db)
            quiet = 0 if missing or any(process.loop.frozen for process in self._processes) else quiet + 1
            if self.world.now > end:
                msg = f"{'; '.join(missing)} within {self._subject.timeout_seconds:g} s"
                raise NotHandledError(msg)

    async def _missing(self, app: App, db: Database) -> list[str]:
        letters = {
            (letter.group, dict(letter.headers)[ID]): letter.error
            for letter in await app.get(DeadLetters).list(limit=10_000)
        }
        parked = {
            (key.group, key.topic, key.key): key.error for key in await app.get(ParkedKeys).list() if key.due is None
        }
        places = {(row.group_name, row.topic, row.partition): Place.of(row) for row in await db.read(READ_PLACES)}
        missing: list[str] = []
        if self.topics is not None and (waiting := await db.read(_OUTBOX)):
            missing.append(f"{len(waiting)} events wait in the outbox")
        for row in await db.read(_EVENTS):
            headers = dict(unpack_headers(row.headers))
            id_ = (headers.get(ID) or b"").decode()
            for handler in self._handlers_of(headers):
                group = handler.group
                if (group, id_) in self._first_return:
                    continue
                name = self._names.get(id_, id_)
                error = letters.get((group, headers.get(ID))) or parked.get((group, row.topic, row.key))
                place = places.get((group, row.topic, row.partition), START)
                if handler.on_failure == "skip" and place.is_past(row.position, row.position):
                    error = "it was skipped"
                if error is None:
                    missing.append(f"group {group} has not handled {name}")
                elif self.plan.number is None:
                    self.given_up.add((group, name))
                elif (group, name) not in self._may_give_up:
                    msg = f"group {group} gave up {name}: {error.splitlines()[-1]}"
                    raise NotHandledError(msg)
        return missing

    def _handlers_of(self, headers: Mapping[str, bytes | None]) -> list[Subscription]:
        type_ = (headers.get(TYPE) or b"").decode()
        return [each for each in self._subscriptions if type_ in {definition_of(event).type for event in each.events}]

    def _check_published(self, rows: Sequence[Any]) -> None:
        """Whether all came to the log, equal keys as they were published.

        What a relay sends again it sends with all that follows, so that the newest event of a key comes last.
        """
        newest: dict[tuple[str, bytes], int] = {}
        last: dict[tuple[str, bytes], int] = {}
        there: set[int] = set()
        for row in rows:
            number = self._numbers.get((dict(unpack_headers(row.headers)).get(ID) or b"").decode())
            if number is None:  # a handler has published it
                continue
            key = row.topic, row.key or b"%d" % number
            if number < newest.get(key, -1) and number not in there:
                msg = f"{self._name(number)} was sent behind {self._name(newest[key])}, which was published later"
                raise OrderError(msg)
            there.add(number)
            last[key] = number
            newest[key] = max(number, newest.get(key, -1))
        late = [key for key, number in last.items() if number < newest[key]]
        if late:
            msg = f"{self._name(last[late[0]])} was sent again behind {self._name(newest[late[0]])}"
            raise OrderError(msg)
        lost = [name for name, number in self._numbers.items() if number not in there]
        if lost:
            msg = f"{', '.join(map(self.name_by, lost))} did not come to the log"
            raise NotHandledError(msg)

    def _name(self, number: int) -> str:
        return self.name_by(list(self._numbers)[number])

    def _check_order(self, rows: Sequence[Any]) -> None:
        handled: defaultdict[tuple[str, str, bytes], list[tuple[int, str, str]]] = defaultdict(list)
        for row in rows:
            headers = dict(unpack_headers(row.headers))
            id_ = (headers.get(ID) or b"").decode()
            name = self._names.get(id_, id_)
            for group in [each.group for each in self._handlers_of(headers) if _keeps_order(each)]:
                called, returned = self._first_call.get((group, id_)), self._first_return.get((group, id_))
                if row.key is None or called is None or returned is None:
                    continue
                when, with_it = called
                before = handled[group, row.topic, row.key]
                if any(each[1] == id_ for each in before):  # it was sent twice
                    continue
                late = [each for each in before if when < each[0] and each[1] not in with_it]
                if late:
                    msg = f"group {group} was called with {name} before {max(late)[2]} had been handled"
                    raise OrderError(msg)
                before.append((returned, id_, name))

    # What its processes ask

    def moment(self, suits: Sequence[str]) -> tuple[str, float]:
        """See `Course`."""
        number = self.moments
        self.moments += 1
        for fault in self._faults:
            if fault.moment <= number and (not fault.commits or suits is AT_COMMIT):
                self._faults.remove(fault)
                return suits[int(fault.kind * len(suits))], fault.amount
        return "", 0.0

    def some(self, seconds: float) -> float:
        """See `Course`."""
        return self._random.random() ** 3 * seconds * self.plan.hurry

    def note(self, process: Process, what: str) -> None:
        """See `Course`."""
        self.story.append(f"{self.world.now:8.3f}  {process.name} {what}")

    def name_of(self, meta: Metadata) -> str:
        """See `Course`."""
        return self._names.setdefault(meta.id, f"{meta.type} {meta.key or ''}".strip())

    def name_by(self, id: str) -> str:
        """See `Course`."""
        return self._names.get(id, id)

    def called(self, subscription: Subscription, metas: Sequence[Metadata]) -> None:
        """See `Course`."""
        self._order += 1
        for place, meta in enumerate(metas):
            before = frozenset(each.id for each in metas[:place])
            self._first_call.setdefault((subscription.group, meta.id), (self._order, before))

    def returned(self, subscription: Subscription, metas: Sequence[Metadata]) -> None:
        """See `Course`."""
        self._order += 1
        for meta in metas:
            self._first_return.setdefault((subscription.group, meta.id), self._order)

    def down(self, _process: Process, seconds: float, error: BaseException | None) -> None:
        """See `Course`."""
        if error is not None and not is_of_the_start(error):
            self.error = error
            return
        alive = [each for each in self._processes if not each.loop.dead]
        if len(alive) < self.plan.processes:
            self.world.at(self.world.now + 0.05 + self._random.random() * seconds, None, self.joins)

    def joins(self) -> None:
        """See `Course`."""
        if self._judged:
            return
        self._starts += 1
        if self._starts > _STARTS:
            self.error = self.error or NotHandledError(f"no process lasted: {_STARTS} were started")
            return
        process = Process(self, f"p{self._starts}", self._routers, self._subject.modules)
        self._processes.append(process)
        self.note(process, "starts")


def _keeps_order(subscription: Subscription) -> bool:
    """Whether its events with equal keys take turns in every case."""
    return subscription.order == "key" and not isinstance(subscription.on_failure, RetryLater)
