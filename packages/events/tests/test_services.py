"""Handlers are given services, and a mistake in the configuration is no verdict on an event."""

import asyncio

import pytest

from mainstay.core import App, ConfigurationError, NotBoundError, given
from mainstay.database import Database, DatabaseModule
from mainstay.events import Event, EventRouter, EventsModule, EventsSettings
from mainstay.events.publisher import EventPublisher
from mainstay.events.testing import in_memory


class Sold(Event, type="services.sold", version="1.0"):
    number: int


async def test_a_handler_is_given_the_services_of_its_app() -> None:
    """By class, as a keyword-only parameter; a test passes its own."""
    events = EventRouter()
    seen: list[object] = []

    @events.on(Sold, group="one")
    async def count(event: Sold, *, publisher: EventPublisher = given(EventPublisher)) -> None:
        seen.append(publisher)

    async with in_memory(events) as rehearsal:
        await rehearsal.publish(Sold(number=1))
        await rehearsal.settled()
        mine = rehearsal.app.get(EventPublisher)
        await count(Sold(number=2), publisher=mine)
        assert seen == [mine, mine]


def test_a_service_that_the_app_lacks_is_an_error_at_construction() -> None:
    """Before the first event, with the parameter and its class."""
    events = EventRouter()

    @events.on(Sold, group="one")
    async def count(event: Sold, *, db: Database = given(Database)) -> None: ...

    module = EventsModule.for_root(EventsSettings(transport="memory"))
    with pytest.raises(ConfigurationError, match="count: no module of this App yields the Database"):
        App(module, EventsModule.for_feature(events))
    App(DatabaseModule.for_root(), EventsModule.for_root(), EventsModule.for_feature(events))


def test_a_forgotten_router_is_an_error_at_construction() -> None:
    """A handler that publishes through a router of no feature would fail at its first event."""
    events, forgotten = EventRouter(), EventRouter()

    @events.on(Sold, group="one")
    async def pass_on(event: Sold) -> None:
        await forgotten.publish(event)

    module = EventsModule.for_root(EventsSettings(transport="memory"))
    with pytest.raises(ConfigurationError, match=r"pass_on uses the EventRouter made at .*EventsModule\.for_feature"):
        App(module, EventsModule.for_feature(events))
    App(module, EventsModule.for_feature(events, forgotten))


def test_a_type_that_a_group_handles_twice_is_an_error_at_construction() -> None:
    """Over two routers, too, and without a start."""
    one, two = EventRouter(), EventRouter()
    for router in (one, two):

        @router.on(Sold, group="one")
        async def count(event: Sold) -> None: ...

    with pytest.raises(ConfigurationError, match="twice"):
        App(EventsModule.for_root(EventsSettings(transport="memory")), EventsModule.for_feature(one, two))


async def test_a_mistake_in_the_configuration_never_makes_a_dead_letter() -> None:
    """The event waits, attempt after attempt, until the mistake is mended."""
    events = EventRouter()
    calls, mended = 0, asyncio.Event()

    @events.on(Sold, group="one")
    async def count(event: Sold) -> None:
        nonlocal calls
        calls += 1
        if calls < 5:
            msg = "the line is missing"
            raise NotBoundError(msg)
        mended.set()

    async with in_memory(events, retry_attempts=2, retry_initial_seconds=0.001, retry_max_seconds=0.002) as rehearsal:
        await rehearsal.publish(Sold(number=1))
        await asyncio.wait_for(mended.wait(), 30)
        await rehearsal.settled()
        assert await rehearsal.dead_letters() == []
