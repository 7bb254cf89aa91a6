"""Handlers by example: given what has happened, when this happens, then that is published."""

from __future__ import annotations

import asyncio
import difflib
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Self

import sqlalchemy as sa
from pydantic import SecretStr

from mainstay.core import Module, given_kinds
from mainstay.core.module import Feature
from mainstay.core.testing import VirtualClock
from mainstay.database import Database, DatabaseModule, DatabaseSettings
from mainstay.events._codec import codec_of
from mainstay.events._memory import MemoryTransport
from mainstay.events.event import Event, definition_of
from mainstay.events.metadata import ID, TYPE, VERSION, Metadata, Outgoing
from mainstay.events.module import Call, EventConsumers
from mainstay.events.parked import ParkedKeys
from mainstay.events.router import EventRouter, Subscription
from mainstay.events.strategies import RetryLater
from mainstay.events.testing._rehearsal import Rehearsal, rehearsal_of

_PATIENCE_SECONDS = 30.0
_LONGEST_STEP_SECONDS = 3600.0

Check = Callable[[Database], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Scenario:
    """One example; made by `scenario`. Each method but the last ones returns a new one."""

    _routers: tuple[EventRouter, ...]
    _modules: tuple[Module[Any, Any] | Feature, ...]
    _tables: sa.MetaData | None
    _given: tuple[Event, ...] = ()
    _when: tuple[Event, ...] = ()

    def given(self, *events: Event) -> Self:
        """What has happened before: handled one after the other, without a failure."""
        return replace(self, _given=(*self._given, *events))

    def when(self, *events: Event) -> Self:
        """What happens now: published in this order, then handled, also what handlers publish."""
        return replace(self, _when=(*self._when, *events))

    async def then(self, *, published: Sequence[Event] | None = None, check: Check | None = None) -> None:
        """Run it, and assert what comes of it.

        Args:
            published: exactly what handlers have published, in this order; None where that is not looked at.
            check: asserts what is in the database.

        Raises:
            AssertionError: it is something else, with the differences; or a handler failed for good.
        """
        async with self._run() as course:
            given_up = await course.given_up()
            assert not given_up, f"{given_up[0].said}\n{given_up[0].trace}"
            if published is not None:
                course.compare(published)
            if check is not None:
                await check(course.database())

    async def then_fails(
        self, error: type[BaseException] = Exception, match: str = "", *, check: Check | None = None
    ) -> None:
        """Run it, and assert that a handler fails for good: after all its attempts, between which virtual time passes.

        Args:
            error: what it raised at last.
            match: a regular expression that is found in the error's text.
            check: asserts what is in the database.

        Raises:
            AssertionError: every event was handled, or it is another error.
        """
        async with self._run() as course:
            given_up = await course.given_up()
            assert given_up, f"no handler failed with {error.__name__}: every event was handled"
            found = [each for each in given_up if each.is_a(error) and re.search(match, each.text)]
            said = f"{given_up[0].said}\n{given_up[0].trace}"
            assert found, f"expected {error.__name__}{f' that says {match!r}' if match else ''}; {said}"
            if check is not None:
                await check(course.database())

    @asynccontextmanager
    async def _run(self) -> AsyncGenerator[_Course, None]:
        clock = VirtualClock()
        errors: dict[tuple[str, str], Exception] = {}

        def watch(subscription: Subscription, call: Call) -> Call:
            async def watched(given: Event | list[Event], meta: Metadata | list[Metadata]) -> None:
                metas = list(meta) if isinstance(meta, list) else [meta]
                try:
                    await call(given, meta)
                except Exception as error:
                    for each in metas:
                        errors[subscription.group, each.id] = error
                    raise

            return watched

        modules = [*self._needed(), *self._modules]
        async with rehearsal_of(self._routers, modules, clock, watch=watch) as rehearsal:
            course = _Course(rehearsal, clock, errors, self._classes())
            if self._tables is not None:
                async with course.database().transaction() as session:
                    await (await session.connection()).run_sync(self._tables.create_all)
            for event in self._given:
                await course.publish(event)
                await course.settled()
                given_up = await course.given_up()
                assert not given_up, f"given {event!r}: {given_up[0].said}\n{given_up[0].trace}"
            course.begin()
            for event in self._when:
                await course.publish(event)
            await course.settled()
            yield course

    def _subscriptions(self) -> list[Subscription]:
        return [each for router in self._routers for each in router.subscriptions]

    def _needed(self) -> list[Module[Any, Any]]:
        needs = self._tables is not None or any(
            each.inbox
            or each.on_failure == "park"
            or isinstance(each.on_failure, RetryLater)
            or Database in given_kinds(each.call).values()
            for each in self._subscriptions()
        )
        if not needs or any(isinstance(each, DatabaseModule) for each in self._modules):
            return []
        return [DatabaseModule.for_root(DatabaseSettings(url=SecretStr("sqlite+aiosqlite:///:memory:")))]

    def _classes(self) -> list[type[Event]]:
        handled = [event for each in self._subscriptions() for event in each.events]
        return [*handled, *map(type, (*self._given, *self._when))]


def scenario(
    *routers: EventRouter, modules: Sequence[Module[Any, Any] | Feature] = (), tables: sa.MetaData | None = None
) -> Scenario:
    """An example of what handlers do.

        await scenario(events).given(OrderPaid(…)).when(OrderCancelled(…)).then(published=[RefundIssued(…)])

    The handlers run in memory as they do in production, with their retries, upcasters and policies, and time is
    virtual. A database in memory is there where one of them needs it.

    Args:
        routers: the features under test.
        modules: what else their App has, such as a module that yields a service of your own.
        tables: of the handlers, made before.
    """
    return Scenario(routers, tuple(modules), tables)


class _GivenUp:
    """An event that could not be handled."""

    def __init__(self, group: str, name: str, trace: str, error: Exception | None) -> None:
        self.trace = trace
        self.text = trace.strip().splitlines()[-1] if error is None else str(error)
        self.said = f"group {group} gave up {name}: {trace.strip().splitlines()[-1]}"
        self._error = error

    def is_a(self, kind: type[BaseException]) -> bool:
        """Whether it failed with such an error."""
        if self._error is None:  # it was refused before its handler was called
            return kind is Exception or self.text.partition(":")[0].endswith(kind.__qualname__)
        return isinstance(self._error, kind)


class _Course:
    """A scenario that is being run."""

    def __init__(
        self,
        rehearsal: Rehearsal,
        clock: VirtualClock,
        errors: dict[tuple[str, str], Exception],
        classes: Sequence[type[Event]],
    ) -> None:
        self._rehearsal = rehearsal
        self._clock = clock
        self._errors = errors
        self._classes = classes
        self._mine: set[bytes] = set()
        self._begin = 0

    def database(self) -> Database:
        return self._rehearsal.app.get(Database)

    async def publish(self, event: Event) -> None:
        self._mine.add((await self._rehearsal.publish(event)).encode())

    def begin(self) -> None:
        self._begin = len(self._rehearsal.app.get(MemoryTransport).sent)

    async def settled(self) -> None:
        """Return when all is handled; between attempts the virtual clock goes on, further each time."""
        end, step = time.monotonic() + _PATIENCE_SECONDS, 0.1
        consumers = self._rehearsal.app.get(EventConsumers).consumers
        while busy := [consumer.group for consumer in consumers if not consumer.idle]:
            if time.monotonic() > end:
                msg = f"after {_PATIENCE_SECONDS:g} s these groups still have work: {', '.join(busy)}"
                raise AssertionError(msg)
            await self._clock.advance(step)
            await asyncio.sleep(0.001)
            step = min(step * 1.5, _LONGEST_STEP_SECONDS)

    async def given_up(self) -> list[_GivenUp]:
        found = [
            _GivenUp(
                letter.group,
                letter.type,
                letter.error,
                self._errors.get((letter.group, (dict(letter.headers).get(ID) or b"").decode())),
            )
            for letter in await self._rehearsal.dead_letters()
        ]
        parked = await self._rehearsal.app.get(ParkedKeys).list() if self._has_database() else ()
        for key in parked:
            errors = [error for (group, _), error in self._errors.items() if group == key.group]
            found.append(_GivenUp(key.group, key.kind.rpartition(" ")[0], key.error, errors[-1] if errors else None))
        return found

    def _has_database(self) -> bool:
        return any(isinstance(module, DatabaseModule) for module in self._rehearsal.app.modules)

    def compare(self, expected: Sequence[Event]) -> None:
        known = {_name_of(kind): kind for kind in (*self._classes, *map(type, expected))}
        sent = self._rehearsal.app.get(MemoryTransport).sent[self._begin :]
        got = [_read(event, known) for event in sent if dict(event.headers)[ID] not in self._mine]
        if got != list(expected):
            lines = "\n".join(difflib.ndiff([*map(repr, expected)], [*map(repr, got)]))
            msg = f"what was published differs (- expected, + published):\n{lines}"
            raise AssertionError(msg)


def _name_of(kind: type[Event]) -> tuple[str, str]:
    definition = definition_of(kind)
    return definition.type, str(definition.version)


def _read(event: Outgoing, known: dict[tuple[str, str], type[Event]]) -> object:
    headers = dict(event.headers)
    name = (headers[TYPE] or b"").decode(), (headers[VERSION] or b"").decode()
    kind = known.get(name)
    value = event.value or b""
    return _Other(f"{' '.join(name)} {value.decode()}") if kind is None else codec_of(kind).read(value)


class _Other:
    """An event of a class that the scenario does not name."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text
