"""Events of older major versions are read into the classes of today; mistakes in that are errors of `App(…)`."""

import re
from decimal import Decimal
from typing import Any

import pytest

from mainstay.core import App, ConfigurationError
from mainstay.events import Event, EventRouter, EventsModule, EventsSettings, Metadata
from mainstay.events.testing import in_memory


class PaidOnce(Event, type="till.paid", version="1.1", key="order"):
    order: str
    amount: Decimal


class PaidTwice(Event, type="till.paid", version="2.0", key="order"):
    order: str
    amount: Decimal
    currency: str


class Paid(Event, type="till.paid", version="3.0", key="order"):
    order: str
    price: tuple[Decimal, str]


def upcasters(events: EventRouter) -> None:
    """From 1 to 2 to 3."""

    @events.upcast(Paid, from_=1)
    def with_currency(old: dict[str, Any]) -> dict[str, Any]:
        return {**old, "currency": "EUR"}

    @events.upcast(Paid, from_=2)
    def with_price(old: dict[str, Any]) -> dict[str, Any]:
        return {"order": old["order"], "price": [old["amount"], old["currency"]]}


def app(*routers: EventRouter) -> App:
    """An App of routers, to be constructed only."""
    return App(EventsModule.for_root(EventsSettings(transport="memory")), EventsModule.for_feature(*routers))


async def test_a_handler_of_the_newest_version_is_called_with_events_of_all() -> None:
    """Step by step; the metadata says what was written, and the amounts come through exactly."""
    events = EventRouter()
    upcasters(events)
    seen: list[tuple[Paid, str]] = []

    @events.on(Paid, group="books")
    async def book(event: Paid, meta: Metadata) -> None:
        seen.append((event, str(meta.version)))

    async with in_memory(events) as rehearsal:
        await rehearsal.publish(PaidOnce(order="a", amount=Decimal("0.10")))
        await rehearsal.publish(PaidTwice(order="a", amount=Decimal("12345678901234567890.12"), currency="CHF"))
        await rehearsal.publish(Paid(order="a", price=(Decimal(1), "USD")))
        await rehearsal.settled()
        assert await rehearsal.dead_letters() == []
    assert seen == [
        (Paid(order="a", price=(Decimal("0.10"), "EUR")), "1.1"),
        (Paid(order="a", price=(Decimal("12345678901234567890.12"), "CHF")), "2.0"),
        (Paid(order="a", price=(Decimal(1), "USD")), "3.0"),
    ]


async def test_a_group_that_handles_an_older_version_itself_keeps_it() -> None:
    """The chain ends at the class that is handled: 2.x is not made 3.x there, and 1.x is made 2.x."""
    events = EventRouter()
    upcasters(events)
    seen: list[Event] = []

    @events.on(PaidTwice, Paid, group="books")
    async def book(event: PaidTwice | Paid) -> None:
        seen.append(event)

    async with in_memory(events) as rehearsal:
        two = PaidTwice(order="a", amount=Decimal(2), currency="CHF")
        await rehearsal.publish(two)
        await rehearsal.publish(PaidOnce(order="a", amount=Decimal(1)))
        await rehearsal.settled()
    assert seen == [two, PaidTwice(order="a", amount=Decimal(1), currency="EUR")]


@pytest.mark.parametrize(
    ("what", "says"),
    [
        (lambda old: old["nothing"], r"till\.paid 1\.x cannot be read: .*<lambda> raised KeyError"),
        (lambda _: {"order": object()}, r"returned what JSON cannot hold"),
        (lambda _: {"order": "a", "amount": "x"}, r"amount: Input should be a valid decimal; currency: Field required"),
    ],
)
async def test_an_upcaster_that_fails_makes_a_dead_letter_that_names_it(what: Any, says: str) -> None:
    """At once: another attempt would take the same payload. The record is kept as it was written."""
    events = EventRouter()
    events.upcast(PaidTwice, from_=1)(what)

    @events.on(PaidTwice, group="books")
    async def book(event: PaidTwice) -> None:
        raise AssertionError

    async with in_memory(events) as rehearsal:
        await rehearsal.publish(PaidOnce(order="a", amount=Decimal(1)))
        await rehearsal.settled()
        (letter,) = await rehearsal.dead_letters()
        assert letter.attempts == 1
        assert letter.value == b'{"order":"a","amount":"1"}'
    assert re.search(says, letter.error), letter.error


def test_a_hole_in_a_chain_is_an_error_of_the_app_that_says_what_to_write() -> None:
    """Before anything is read."""
    events = EventRouter()

    @events.upcast(Paid, from_=1)
    def with_currency(old: dict[str, Any]) -> dict[str, Any]:
        return old

    with pytest.raises(ConfigurationError, match=r"nothing leads on from 2\.x: write @events\.upcast\(Paid, from_=2\)"):
        app(events)


def test_two_upcasters_of_one_version_are_an_error_of_the_app() -> None:
    """Also in two features."""
    routers = [EventRouter(), EventRouter()]
    for events in routers:
        upcasters(events)
    with pytest.raises(ConfigurationError, match=r"till\.paid 1\.x is upcast twice"):
        app(*routers)


def test_what_cannot_be_an_upcaster_is_refused_where_it_is_written() -> None:
    """A version that is not older, a class that is no event, a function that would have to be awaited."""
    events = EventRouter()
    with pytest.raises(ValueError, match=r"from_=3\): the class is version 3\.0, which is not newer"):
        events.upcast(Paid, from_=3)
    with pytest.raises(TypeError, match="is not an event"):
        events.upcast(Event, from_=1)

    async def later(old: dict[str, Any]) -> dict[str, Any]:
        return old

    decorate: Any = events.upcast(Paid, from_=1)
    with pytest.raises(TypeError, match="is no plain function"):
        decorate(later)
