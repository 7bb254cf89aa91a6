"""What the commands are made of: a service of an App that looks, and what it says."""

from __future__ import annotations

import asyncio
import getpass
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

from mainstay.cli import as_json, document, named_app, needed_app, say, settings_of
from mainstay.core import App, ConfigurationError
from mainstay.database import DatabaseModule
from mainstay.events.dead_letters import DeadLetters
from mainstay.events.event import Event
from mainstay.events.log import EventLog
from mainstay.events.module import EventsModule
from mainstay.events.parked import ParkedKeys
from mainstay.events.pauses import Pauses
from mainstay.events.publisher import EventPublisher
from mainstay.events.refused import RefusedEvents
from mainstay.events.scheduled import ScheduledEvents
from mainstay.events.settings import EventsSettings

S = TypeVar("S", DeadLetters, ParkedKeys, Pauses, RefusedEvents, ScheduledEvents)
Part = TypeVar("Part")
T = TypeVar("T")
I = TypeVar("I")  # noqa: E741  an id, of whichever kind

Done = tuple[str, Mapping[str, Any]]
"""What was done, for a person and for a program."""


def to_each(
    service: type[S],
    ids: Sequence[I] | Callable[[S], Awaitable[Sequence[I]]],
    act: Callable[[S, I], Awaitable[Done | None]],
) -> None:
    """Do something to each of them, and say so one by one: also what was done before one could not be."""
    done: list[Mapping[str, Any]] = []

    async def each(store: S) -> None:
        for one in await ids(store) if callable(ids) else ids:
            result = await act(store, one)
            if result is not None:
                text, facts = result
                done.append(facts)
                say(text)

    try:
        with_service(service, each)
    finally:
        if as_json():
            document(done)


def show(facts: Mapping[str, Any]) -> None:
    """Show everything about one."""
    if as_json():
        document(facts)
        return
    for name, value in facts.items():
        lines = [f"{key}: {text}" for key, text in value] if name == "headers" else str(value).splitlines() or [""]
        say(f"{name:9} {lines[0] if lines else ''}", *(f"{'':9} {line}" for line in lines[1:]))


def with_service(service: type[S], work: Callable[[S], Awaitable[T]]) -> T:
    """Do something with a service of an App that has the settings, and no handlers."""
    settings = settings_of(EventsModule)
    _can_be_found(settings)
    if service is RefusedEvents and not (settings.transport == "kafka" and settings.writes_database):
        msg = "only the outbox in front of Kafka keeps events that were refused"
        raise ConfigurationError(msg)
    if service is ScheduledEvents and not settings.writes_database:
        msg = f"events wait for their time in the Database, and {settings.variable('outbox')} says that there is none"
        raise ConfigurationError(msg)
    modules: list[Any] = [EventsModule.for_root(settings)]
    if settings.writes_database or service in {ParkedKeys, Pauses}:
        looking = settings_of(DatabaseModule).model_copy(update={"migrate": False})
        modules.insert(0, DatabaseModule.for_root(looking))
    return _running(App(*modules), service, work)


def in_app(work: Callable[[DeadLetters], Awaitable[T]]) -> T:
    """Do something with the dead letters in the App that is named, which knows the handlers."""
    app = needed_app()
    for module in app.modules:
        module.only_looking()
    return _running(app, DeadLetters, work)


def with_log(work: Callable[[EventLog], Awaitable[T]]) -> T:
    """Look at the log of the App that is named, whose handlers are known then, or at that of the settings."""
    settings = settings_of(EventsModule)
    _can_be_found(settings)
    app = named_app()
    if app is None:
        modules: list[Any] = [EventsModule.for_root(settings)]
        if settings.writes_database:
            modules.insert(0, DatabaseModule.for_root(settings_of(DatabaseModule)))
        app = App(*modules)
    for module in app.modules:
        module.only_looking()
    return _running(app, EventLog, work)


def to_publish(app: App, event: Event) -> str:
    """Publish an event in the App that is named; no other part of it changes anything that is stored."""
    for module in app.modules:
        if isinstance(module, EventsModule):
            _can_be_found(module.settings)
        else:
            module.only_looking()
    return _running(app, EventPublisher, lambda publisher: publisher.publish(event))


def _can_be_found(settings: EventsSettings) -> None:
    if settings.transport == "memory":
        msg = "the memory transport keeps nothing for other processes"
        raise ConfigurationError(msg)
    if settings.transport == "kafka" and "source" not in settings.model_fields_set:
        source = settings.variable("source")
        msg = f"groups and dead letters on Kafka are called by the service's name: pass --app, or set {source}"
        raise ConfigurationError(msg)


def _running(app: App, service: type[Part], work: Callable[[Part], Awaitable[T]]) -> T:
    async def run() -> T:
        async with app:
            return await work(app.get(service))

    return asyncio.run(run())


def user() -> str:
    """The user of this terminal."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        return f"user {os.getuid()}"


def in_utc(moment: datetime | None) -> datetime | None:
    """A moment that was written without a zone."""
    return None if moment is None else moment.replace(tzinfo=UTC)


def last_words(error: str) -> str:
    """The exception below its traceback, all lines of its message: the last one alone may be anything."""
    lines = error.split("\n")
    below = max((number for number, line in enumerate(lines, 1) if line.startswith("  ")), default=0)
    return "\n".join(lines[below:]) or lines[-1]


def text_of(value: bytes | None) -> str:
    """Bytes for people."""
    return "(none)" if value is None else value.decode(errors="backslashreplace")
