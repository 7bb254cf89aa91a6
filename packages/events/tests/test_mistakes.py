"""Mistakes in handlers and settings of events are errors of `App(…)`: nothing is started here."""

import re
from collections.abc import Callable
from functools import partial

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
    *(
        (partial(app, transport="kafka", kafka_servers=servers), re.escape(f"{named!r} is no address of a broker"))
        for servers, named in {
            "PLAINTEXT://h:9092": "PLAINTEXT://h:9092",
            '["h:9092"]': '["h:9092"]',
            "h:9092,k": "k",
            "h:0": "h:0",
            "h:65536": "h:65536",
            "h:9092,": "",
        }.items()
    ),
    *(
        (partial(app, topics={"mistakes.paid": topic}), re.escape(f"{topic!r} is no name of a topic"))
        for topic in ("two words", "", "..", "t" * 250, "straße")
    ),
    (
        lambda: app(router(), topics={"mistakes.paid": "a.line", "other": "a_line"}),
        "do not tell the topics a.line and a_line apart.*MAINSTAY_EVENTS_TOPICS",
    ),
    *(
        (
            partial(app, transport="kafka", kafka_servers="[::1]:9092, h:1", kafka_protocol="SSL", kafka_ca_file=file),
            f"MAINSTAY_EVENTS_KAFKA_CA_FILE={file} {wrong}",
        )
        for file, wrong in {"/nowhere/ca.pem": "cannot be read", __file__: "holds no certificate"}.items()
    ),
    (lambda: app(transport="sql", outbox=True), "its log is its own outbox"),
    (lambda: app(transport="memory", log_days=1), "cannot honour log_days"),
]


@pytest.mark.parametrize(("build", "message"), MISTAKES, ids=[message[:40] for _, message in MISTAKES])
def test_a_mistake_is_named_when_the_app_is_constructed(build: Callable[[], object], message: str) -> None:
    """With the handlers, and the line to write."""
    with pytest.raises(ConfigurationError, match=message):
        build()
