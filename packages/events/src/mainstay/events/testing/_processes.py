"""A simulated process: an App of its own on a loop of its own, and what may happen to it at each moment."""

from __future__ import annotations

import asyncio
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator, Sequence
from contextvars import Context, ContextVar
from functools import cache
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

from mainstay.core import App, ConfigurationError, MainstayError, Module
from mainstay.core.module import Feature
from mainstay.database import CommitUnknown, DatabaseUnavailable
from mainstay.database.testing import SimulatedDatabase
from mainstay.events.event import Event
from mainstay.events.metadata import ID, Metadata, Outgoing
from mainstay.events.module import EventsModule
from mainstay.events.router import EventRouter, Subscription
from mainstay.events.settings import EventsSettings
from mainstay.events.testing._broker import Sender, SimulatedBroker, SimulatedTopics
from mainstay.events.testing._world import ProcessLoop, World

T = TypeVar("T")

LEASE_SECONDS = 2.0
_MANY_ATTEMPTS = 50  # a person's limits count what goes wrong by itself, not what a simulation does
_LONGEST_FREEZE_SECONDS = 3 * LEASE_SECONDS
_LONGEST_WAIT_SECONDS = 15.0
_LONGEST_DOWN_SECONDS = 4.0
_DRAIN_SECONDS = 1.0

# What may strike, the likelier the more often it is named.
AT_AWAIT = (*("crash",) * 4, *("cancel",) * 3, *("slow",) * 3, "freeze", "freeze", "leave", "join")
AT_COMMIT = ("crash before", "crash after", "crash after", "refused", "refused", "lost", "arrived", "freeze", "slow")
AT_END = ("crash", "again", "again")
AT_SEND = (
    *("crash before", "crash after", "crash after", "freeze before", "freeze after"),
    *("lost", "lost", "refused", "slow"),
)

_about: ContextVar[str] = ContextVar("mainstay_events_simulated")


@cache
def settings() -> EventsSettings:
    """What the processes of a simulation are told."""
    return EventsSettings(
        transport="sql",
        source="simulation",
        partitions=4,
        lease_seconds=LEASE_SECONDS,
        drain_seconds=_DRAIN_SECONDS,
        retry_attempts=_MANY_ATTEMPTS,
        crash_attempts=_MANY_ATTEMPTS,
    )


def broker_of(topics: SimulatedTopics | None, sender: Sender | None) -> SimulatedBroker | None:
    """What a process relays to; None in a run in which it publishes to the log itself."""
    return None if topics is None else SimulatedBroker(topics, sender, settings().partitions)


class RepeatedError(MainstayError):
    """An event was handled, and the answer got lost: it is handled again."""

    code = "SYS_SIMULATED"
    status = 503
    title = "Answer lost in the simulation"
    retryable = True
    no_effect = True


class Course(Protocol):
    """The run that a process is part of."""

    world: World
    file: Path

    def moment(self, suits: Sequence[str]) -> tuple[str, float]:
        """Count a moment; what strikes at it, empty for nothing, and how much of it."""
        ...

    def some(self, seconds: float) -> float:
        """A time up to so long."""
        ...

    def note(self, process: Process, what: str) -> None:
        """Write a line of the story."""
        ...

    topics: SimulatedTopics | None  # where events are relayed

    def name_of(self, meta: Metadata) -> str:
        """An event's name in the story."""
        ...

    def name_by(self, id: str) -> str:
        """The same, by its id."""
        ...

    def called(self, subscription: Subscription, metas: Sequence[Metadata]) -> None:
        """A handler is about to be called, with one event or a batch."""
        ...

    def returned(self, subscription: Subscription, metas: Sequence[Metadata]) -> None:
        """It has done its work."""
        ...

    def down(self, _process: Process, seconds: float, error: BaseException | None) -> None:
        """A process has ended, and is replaced after a while."""
        ...

    def joins(self) -> None:
        """Start one more."""
        ...


class Process:
    """One process that serves.

    Args:
        course: the run.
        name: in the story.
        feature: makes what it handles.
        modules: makes what else its App has.
    """

    def __init__(
        self,
        course: Course,
        name: str,
        feature: Callable[[], Sequence[EventRouter]],
        modules: Callable[[], Sequence[Module[Any, Any] | Feature]],
    ) -> None:
        self.name = name
        self._course = course
        self._feature = feature
        self._modules = modules
        self.database = SimulatedDatabase(course.file, self)
        self.loop = ProcessLoop(course.world, lambda: self.crash("ends itself"))
        self._leaving = asyncio.Event()
        self._asked = False
        self._calls = 0
        self._handled = False  # something, and how far may not be stored yet
        self._task = self.loop.create_task(self._live(), context=Context())
        self._task.add_done_callback(self._ended)

    async def _live(self) -> None:
        module = EventsModule.for_root(settings())
        module._watch = self._watch
        module._relay_to = broker_of(self._course.topics, self)
        app = App(
            self.database.module,
            module,
            EventsModule.for_feature(*self._feature()),
            *self._modules(),
            clock=self._course.world.clock,
            drain_seconds=2 * _DRAIN_SECONDS,
        )
        async with app.running(serve=True, until=self._leaving):
            await self._leaving.wait()
            if not self._asked:
                stopped = [
                    f"{name} {part.detail}" for name, part in (await app.health()).items() if part.status == "down"
                ]
                msg = f"a part of {self.name} crashed: {'; '.join(stopped)}"
                raise AssertionError(msg)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if self.loop.silent:
            return
        error = task.exception()
        self._course.note(self, "has left" if error is None else f"fails: {type(error).__name__}: {error}")
        self.database.crash()
        self.loop.dead = True
        self._course.down(self, _LONGEST_DOWN_SECONDS, error)

    # What happens to it

    def crash(self, when: str) -> None:
        """End as SIGKILL ends a process: nothing of it runs any more, and what was not committed is gone."""
        self._course.note(self, f"crashes {when}")
        self.database.crash()
        self.loop.dead = True
        self._course.down(self, _LONGEST_DOWN_SECONDS, None)

    def _strike(self, kind: str, amount: float) -> None:
        if kind == "freeze":
            seconds = 0.1 + amount * _LONGEST_FREEZE_SECONDS
            self._course.note(self, f"freezes for {seconds:.1f} s")
            self.loop.freeze(seconds)
        elif kind == "leave":
            self._course.note(self, "is asked to leave")
            self._asked = True
            self._leaving.set()
        elif kind == "join":
            self._course.joins()

    # What it asks at its moments

    async def statement(self) -> None:
        """See `Moments`."""
        await asyncio.sleep(0.0002 + self._course.some(0.004))

    async def commit(self, work: Callable[[], None]) -> None:
        """See `Moments`."""
        await asyncio.sleep(0.0002 + self._course.some(0.01))
        about = _about.get("")
        if not (about or self._calls or self._handled):
            work()  # nothing but a note that the process is there
            return
        self._handled = self._calls > 0
        kind, amount = self._course.moment(AT_COMMIT)
        of = f" of {about}" if about else ""
        if kind == "crash before":
            await self._end(f"before a commit{of}")
        elif kind == "crash after":
            work()
            await self._end(f"after a commit{of}")
        elif kind == "refused":
            self._course.note(self, f"is refused a commit{of}")
            msg = "simulated: the commit was refused"
            raise DatabaseUnavailable(msg)
        elif kind in {"lost", "arrived"}:
            self._course.note(
                self, f"does not know of a commit{of}, which {(kind == 'lost' and 'was lost') or 'arrived'}"
            )
            if kind == "arrived":
                work()
            msg = "simulated: the connection was lost while committing"
            raise CommitUnknown(msg)
        else:
            if kind == "slow":
                await asyncio.sleep(self._slow(amount, f"with a commit{of}"))
            elif kind:
                self._strike(kind, amount)
                await asyncio.sleep(0)
            work()

    async def sending(self, events: Sequence[Outgoing], hand_over: Callable[[], asyncio.Future[None]]) -> None:
        """See `Sender`."""
        course = self._course
        await asyncio.sleep(0.0002 + course.some(0.01))
        kind, amount = course.moment(AT_SEND)
        name = ", ".join(course.name_by((dict(event.headers).get(ID) or b"").decode()) for event in events)
        if kind == "crash before":
            await self._end(f"before it sends {name}")
        elif kind == "refused":
            course.note(self, f"is refused by the broker: {name}")
            msg = "simulated: the broker does not take it now"
            raise ConnectionError(msg)
        elif kind == "slow":
            await asyncio.sleep(self._slow(amount, f"before it sends {name}"))
        elif kind == "freeze before":
            course.note(self, f"is about to send {name}")
            self._strike("freeze", amount)
            await asyncio.sleep(0)
        answer = hand_over()
        course.note(self, f"sends {name}")
        if kind == "crash after":
            await self._end(f"after it sent {name}")
        elif kind == "lost":
            course.note(self, f"never hears that the broker has {name}")
            await asyncio.get_running_loop().create_future()
        elif kind == "freeze after":
            self._strike("freeze", amount)
            await asyncio.sleep(0)
        await answer

    async def _end(self, when: str) -> None:
        self.crash(when)
        await asyncio.get_running_loop().create_future()  # for ever

    def _slow(self, amount: float, where: str) -> float:
        seconds = amount * _LONGEST_WAIT_SECONDS
        self._course.note(self, f"waits for {seconds:.1f} s {where}")
        return seconds

    def awaiting(self, waits: object) -> float:
        """A handler is about to wait for something; for how much longer than that takes."""
        kind, amount = self._course.moment(AT_AWAIT)
        where = f"in {_about.get('')}"
        if kind == "crash":
            self.crash(where)
        elif kind == "slow":
            return self._slow(amount, where)
        elif kind == "cancel" and isinstance(waits, asyncio.Future) and waits.cancel():
            self._course.note(self, f"has an await cancelled {where}")
        else:
            self._strike(kind, amount)
        return 0.0

    def _watch(
        self, subscription: Subscription, call: Callable[..., Awaitable[None]]
    ) -> Callable[..., Awaitable[None]]:
        async def watched(given: Event | list[Event], meta: Metadata | list[Metadata]) -> None:
            course = self._course
            metas = list(meta) if isinstance(meta, list) else [meta]
            name = ", ".join(map(course.name_of, metas))
            token = _about.set(name)
            try:
                await asyncio.sleep(course.some(0.5))
                course.note(self, f"handles {name} for {subscription.group}")
                course.called(subscription, metas)
                self._calls += 1
                self._handled = True
                try:
                    await _stepwise(self, cast("Coroutine[Any, Any, None]", call(given, meta)))
                except Exception as error:
                    course.note(self, f"fails in {name}: {type(error).__name__}: {error}")
                    raise
                finally:
                    self._calls -= 1
                course.returned(subscription, metas)
                course.note(self, f"has handled {name} for {subscription.group}")
                kind, _ = course.moment(AT_END)
                if kind == "crash":
                    await self._end(f"after {name}")
                elif kind == "again":
                    course.note(self, f"loses the answer: {name} is handled again")
                    msg = "simulated: the answer was lost"
                    raise RepeatedError(msg)
            finally:
                _about.reset(token)

        return watched


@types.coroutine
def _stepwise(process: Process, coroutine: Coroutine[Any, Any, T]) -> Generator[Any, None, T]:
    """Run a coroutine, with a moment at each of its awaits."""
    error: BaseException | None = None
    while True:
        try:
            waits = coroutine.send(None) if error is None else coroutine.throw(error)
        except StopIteration as end:
            return cast("T", end.value)
        slow = process.awaiting(waits)
        try:
            yield waits
            if slow:
                yield from asyncio.sleep(slow).__await__()
            error = None
        except BaseException as raised:  # noqa: BLE001  it belongs to the coroutine
            error = raised


def is_of_the_start(error: BaseException) -> bool:
    """Whether a process may be started again after this error: what it needs was not there at the moment."""
    return isinstance(error, MainstayError) and not isinstance(error, ConfigurationError)
