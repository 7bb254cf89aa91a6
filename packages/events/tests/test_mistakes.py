"""Mistakes in handlers and settings of events are errors of `App(…)`: nothing is started here."""

from collections.abc import Callable

import pytest

from mainstay.core import App, ConfigurationError, given
from mainstay.database import DatabaseModule
from mainstay.events import Event, EventRouter, EventsModule, EventsSettings


class Paid(Event, type="mistakes.paid", version="1.0"):
    number: int


class Ledger:
    """A service that no module yields."""


def app(*routers: EventRouter, **settings: object) -> App:
    module = EventsModule.for_root(EventsSettings.model_validate(settings))
    return App(DatabaseModule.for_root(), module, EventsModule.for_feature(*routers))


def router(*, forgotten: EventRouter | None = None, inbox: bool = False) -> EventRouter:
    events = EventRouter()
    if forgotten is None:

        @events.on(Paid, group="one", inbox=inbox)
        async def count(event: Paid) -> None: ...

    else:

        @events.on(Paid, group="one")
        async def pass_on(event: Paid) -> None:
            await forgotten.publish(event)

    return events


def asking() -> EventRouter:
    events = EventRouter()

    @events.on(Paid, group="one")
    async def count(event: Paid, *, ledger: Ledger = given(Ledger)) -> None: ...

    return events


def without_database(transport: str, *, inbox: bool, **settings: object) -> App:
    values = {"transport": transport, **settings}
    root = EventsModule.for_root(EventsSettings.model_validate(values))
    return App(root, EventsModule.for_feature(router(inbox=inbox)))


MISTAKES: list[tuple[Callable[[], object], str]] = [
    (lambda: app(router(), router()), "group 'one' handles mistakes.paid 1.x twice, by .* and "),
    (lambda: app(router(forgotten=EventRouter())), r"pass_on uses the EventRouter made at .*add "),
    (lambda: app(asking()), "count: no module of this App yields the Ledger"),
    (lambda: without_database("sql", inbox=False), "EventsModule requires DatabaseModule"),
    (lambda: without_database("memory", inbox=True), "EventsModule requires DatabaseModule"),
    (
        lambda: without_database("kafka", inbox=True, kafka_servers="h:1", outbox=False),
        "EventsModule requires DatabaseModule",
    ),
    (lambda: app(transport="kafka"), "kafka_servers"),
    (lambda: app(transport="sql", outbox=True), "its log is its own outbox"),
    (lambda: app(transport="memory", log_days=1), "cannot honour log_days"),
]


@pytest.mark.parametrize(("build", "message"), MISTAKES, ids=[message[:40] for _, message in MISTAKES])
def test_a_mistake_is_named_when_the_app_is_constructed(build: Callable[[], object], message: str) -> None:
    """With the handlers, and the line to write."""
    with pytest.raises(ConfigurationError, match=message):
        build()
