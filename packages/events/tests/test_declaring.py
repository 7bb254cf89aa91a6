"""Event classes, handlers, settings: what is refused where it is written, and with which remedy."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from uuid import UUID, uuid4

import pytest
from pydantic import SecretStr, ValidationError

from mainstay.core import App, ConfigurationError, NotBoundError, Retry
from mainstay.database import DatabaseModule, DatabaseSettings
from mainstay.events import Event, EventPublisher, EventRouter, EventsModule, EventsSettings, Metadata, Version
from mainstay.events.event import EventDefinition, definition_of
from mainstay.events.testing import in_memory


class OrderPaid(Event, type="order.paid", version="1.0", key="order_id"):
    order_id: UUID
    amount: int


class OrderPaidAnew(Event, type="order.paid", version="2.0", key="order_id"):
    order_id: UUID
    cents: int


class Base(Event):
    tenant: str


class Named(Base, type="named", key="tenant", frozen=True):
    pass


def test_an_event_is_immutable_and_knows_its_definition() -> None:
    """The class keywords are the definition; a field cannot be set; a version has a default."""
    event = OrderPaid(order_id=uuid4(), amount=5)
    with pytest.raises(ValidationError):
        event.amount = 6  # type: ignore[misc]  # that it is refused is the test
    assert (definition_of(OrderPaid).type, definition_of(OrderPaid).version, definition_of(OrderPaid).key) == (
        "order.paid",
        Version(1, 0),
        "order_id",
    )
    assert definition_of(Named).version == Version(1, 0)
    assert Named(tenant="x").tenant == "x"


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"type": "order paid"}, "must be words of letters"),
        ({"type": "x" * 250}, "at most 249 characters"),
        ({"type": "x", "version": "1"}, "must be two numbers"),
        ({"type": "x", "version": "01.0"}, "must be two numbers"),
        ({"type": "x", "key": "nothing"}, "names no field; the fields are number"),
        ({"type": "x", "topic": "two words"}, "topic='two words' is no name of a topic: 1 to 249"),
        ({"type": "x", "topic": ".."}, "topic='..' is no name"),
        ({"type": "x", "topic": "x" * 250}, "is no name of a topic"),
        ({"version": "1.0"}, "no type="),
        ({"topic": "orders"}, "no type="),
    ],
)
def test_a_wrong_definition_is_refused_at_the_class(keywords: dict[str, Any], message: str) -> None:
    """The error names the class, the keyword and what is wrong with it."""
    with pytest.raises(TypeError, match=message):
        type("Wrong", (Event,), {"__annotations__": {"number": int}, "__module__": __name__}, **keywords)


def test_an_abstract_event_can_be_neither_published_nor_handled() -> None:
    """A class without a type is for inheriting."""
    with pytest.raises(TypeError, match="Base is not an event"):
        EventRouter().on(Base, group="g")
    with pytest.raises(TypeError, match="is not an event"):
        definition_of(int)  # type: ignore[arg-type]  # that it is refused is the test


def test_handlers_are_functions_and_classes_with_or_without_metadata() -> None:
    """All four forms are taken, given back unchanged, and classes are made once."""
    events = EventRouter()

    @events.on(OrderPaid, group="a")
    async def plain(event: OrderPaid) -> None: ...

    @events.on(OrderPaid, group="b")
    async def both(event: OrderPaid, meta: Metadata) -> None: ...

    @events.on(OrderPaid, group="c")
    class Handler:
        async def handle(self, event: OrderPaid, meta: Metadata) -> None: ...

    @events.on(OrderPaid, OrderPaidAnew, group="d")
    async def either(event: OrderPaid | OrderPaidAnew) -> None: ...

    assert isinstance(Handler, type)
    assert [subscription.wants_metadata for subscription in events.subscriptions] == [False, True, True, False]
    assert plain.__name__ == "plain"


def _sync(event: OrderPaid) -> None: ...
async def _three(event: OrderPaid, meta: Metadata, more: int) -> None: ...
async def _wrong_event(event: Named) -> None: ...
async def _wrong_metadata(event: OrderPaid, meta: int) -> None: ...
async def _keyword(event: OrderPaid, *, more: int) -> None: ...


class _NoHandle: ...


class _Needs:
    def __init__(self, more: int) -> None: ...
    async def handle(self, event: OrderPaid) -> None: ...


@pytest.mark.parametrize(
    ("handler", "message"),
    [
        (_sync, "not an async function: write async def"),
        (_three, r"a handler takes \(event\) or"),
        (_keyword, r"a handler takes \(event\) or"),
        (_wrong_event, "takes a Named, but handles OrderPaid"),
        (_wrong_metadata, "annotate it so"),
        (_NoHandle, "has no method handle"),
        (_Needs, "cannot be made without arguments"),
    ],
)
def test_what_cannot_be_a_handler_is_refused_with_the_remedy(handler: Any, message: str) -> None:
    """The error comes where the decorator is, and names the function."""
    with pytest.raises(TypeError, match=message):
        EventRouter().on(OrderPaid, group="g")(handler)


def test_options_of_on_are_checked() -> None:
    """No event, no group and no time are errors at once."""
    events = EventRouter()
    with pytest.raises(TypeError, match="needs an event class"):
        events.on(group="g")
    with pytest.raises(ValueError, match="needs a name"):
        events.on(OrderPaid, group="")
    with pytest.raises(ValueError, match="more than 0 seconds"):
        events.on(OrderPaid, group="g", timeout_seconds=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "keys"}, r"on\(order='keys'\): it is 'key' or 'none'"),
        ({"order": "none", "on_failure": "park"}, "a parked key keeps an order"),
        ({"concurrency": 0}, "at least 1 call"),
        ({"concurrency": 2.5}, "a whole number"),
        ({"concurrency": True}, "a whole number"),
    ],
)
def test_limits_of_a_handler_are_checked(options: dict[str, Any], message: str) -> None:
    """Where they are written."""
    with pytest.raises(ValueError, match=message):
        EventRouter().on(OrderPaid, group="g", **options)


class Keyless(Event, type="keyless"):
    pass


@pytest.mark.parametrize(
    ("events", "options", "message"),
    [
        ([OrderPaid], {"size": 0}, "a batch has 1 to 1000 events"),
        ([OrderPaid], {"size": 1001}, "a batch has 1 to 1000 events"),
        ([OrderPaid], {"size": 10.0}, r"size=10.0\): a batch has 1 to 1000 events"),
        ([OrderPaid], {"wait_seconds": -0.1}, "it is a number of seconds, 0 or more"),
        ([OrderPaid], {"wait_seconds": float("inf")}, "it is a number of seconds"),
        ([OrderPaid], {"wait_seconds": float("nan")}, "it is a number of seconds"),
        ([OrderPaid], {"by": "keys"}, "it is 'key' or 'partition'"),
        ([OrderPaid, Keyless], {"by": "key"}, "Keyless has no key; say by='partition'"),
        ([OrderPaid], {"inbox": "batch"}, "the events of a batch share a transaction"),
        ([OrderPaid], {"group": ""}, r"on_batch\(group=…\) needs a name"),
        ([OrderPaid], {"timeout_seconds": 0}, r"on_batch\(timeout_seconds=0\)"),
        ([OrderPaid], {"on_failure": "wait"}, r"on_batch\(on_failure='wait'\)"),
    ],
)
def test_options_of_on_batch_are_checked(events: list[type[Event]], options: dict[str, Any], message: str) -> None:
    """Where they are written."""
    with pytest.raises(ValueError, match=message):
        EventRouter().on_batch(*events, **{"group": "g", **options})


async def _one(event: OrderPaid) -> None: ...
async def _one_meta(events: list[OrderPaid], meta: Metadata) -> None: ...
async def _lists_of_others(events: list[Named]) -> None: ...
async def _one_or_other(event: OrderPaid | Named) -> None: ...
async def _tuple(events: tuple[OrderPaid, ...]) -> None: ...
async def _iterator(events: Iterator[OrderPaid]) -> None: ...
async def _three_lists(events: list[OrderPaid], metas: list[Metadata], more: int) -> None: ...


@pytest.mark.parametrize(
    ("handler", "message"),
    [
        (_sync, "not an async function"),
        (_one, r"takes one OrderPaid, and on_batch hands over lists: annotate it list\[OrderPaid\]"),
        (_one_or_other, r"takes one .*OrderPaid \| .*Named, and on_batch hands over lists: annotate it list\[…\]"),
        (_tuple, r"takes one tuple\[.*OrderPaid, ...\], and on_batch hands over lists: annotate it list\[…\]"),
        (_iterator, r"takes one .*Iterator\[.*OrderPaid\], and on_batch hands over lists"),
        (_one_meta, "the second parameter 'meta' is the list of the events' Metadata"),
        (_lists_of_others, "takes a Named, but handles OrderPaid"),
        (_three_lists, r"a handler takes \(events: list\[…\]\) or"),
    ],
)
def test_what_cannot_be_a_batch_handler_is_refused_with_the_remedy(handler: Any, message: str) -> None:
    """As for single events."""
    with pytest.raises(TypeError, match=message):
        EventRouter().on_batch(OrderPaid, group="g")(handler)


async def _or_nothing(events: list[OrderPaid] | None) -> None: ...
async def _iterable(events: Iterable[OrderPaid]) -> None: ...
async def _anything(events: object) -> None: ...


@pytest.mark.parametrize("handler", [_or_nothing, _iterable, _anything])
def test_what_takes_a_list_among_others_may_be_a_batch_handler(handler: Any) -> None:
    """An annotation that is wider than a list."""
    EventRouter().on_batch(OrderPaid, group="g")(handler)


async def test_describe_says_how_handlers_are_called() -> None:
    """What is not usual about them."""
    events = EventRouter()

    @events.on(OrderPaid, group="a", concurrency=3, order="none")
    async def plain(event: OrderPaid) -> None: ...
    @events.on_batch(OrderPaid, group="b", size=50, by="key")
    async def batch(some: Sequence[OrderPaid], metas: Sequence[Metadata]) -> None: ...

    app = App(EventsModule.for_root(EventsSettings(transport="memory")), EventsModule.for_feature(events))
    module = next(each for each in app.modules if isinstance(each, EventsModule))
    first, second = module.describe()["handlers"]
    assert first.endswith("handles order.paid 1.0 in group a, 3 calls at once, in no order")
    assert second.endswith("handles order.paid 1.0 in group b, up to 50 of a key at once")


async def test_a_group_handles_a_type_once_also_across_features() -> None:
    """A retry for one of two handlers would repeat the other; two major versions are two types."""
    events, others = EventRouter(), EventRouter()

    async def handle(event: OrderPaid) -> None: ...
    async def anew(event: OrderPaidAnew) -> None: ...

    events.on(OrderPaid, group="g")(handle)
    events.on(OrderPaidAnew, group="g")(anew)
    with pytest.raises(ValueError, match=r"group 'g' handles order.paid 1.x twice"):
        events.on(OrderPaid, group="g")(handle)
    others.on(OrderPaid, group="g")(handle)
    root = EventsModule.for_root(EventsSettings(transport="memory"))
    with pytest.raises(ConfigurationError, match=r"handles order\.paid 1.x twice"):
        async with App(root, EventsModule.for_feature(events, others)):
            pass


async def test_an_unbound_router_names_the_missing_line() -> None:
    """Publishing outside a running App says what to add."""
    with pytest.raises(NotBoundError, match=r"EventsModule\.for_feature"):
        await EventRouter().publish(OrderPaid(order_id=uuid4(), amount=1))


KAFKA = {"transport": "kafka", "kafka_servers": "x:1"}
ACCOUNT = {"kafka_username": "ann", "kafka_password": "hunter2"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"transport": "sql", "outbox": True}, "its log is its own outbox"),
        ({"transport": "sql", "kafka_servers": "x:1"}, "cannot honour kafka_servers"),
        ({"transport": "memory", "outbox": False}, "cannot honour outbox"),
        ({"transport": "memory", "lease_seconds": 3.0}, "cannot honour lease_seconds"),
        ({"transport": "memory", "log_days": 3.0}, "cannot honour log_days"),
        ({"transport": "kafka", "kafka_servers": "x:1", "log_days": 3.0}, "cannot honour log_days"),
        ({"transport": "kafka"}, "MAINSTAY_EVENTS_KAFKA_SERVERS=host:port"),
        ({"transport": "kafka", "kafka_servers": "x:1", "kafka_protocol": "SASL_SSL"}, "needs kafka_username"),
        ({"transport": "sql", "source": "two words"}, "MAINSTAY_EVENTS_SOURCE"),
        ({"transport": "sql", "send_seconds": 3.0}, "cannot honour send_seconds"),
        ({**KAFKA, "kafka_create_topics": False, "partitions": 3}, "cannot honour partitions"),
        ({**KAFKA, "kafka_create_topics": False, "kafka_replicas": 3}, "cannot honour kafka_replicas"),
        ({**KAFKA, "kafka_username": "ann"}, "'PLAINTEXT' cannot honour kafka_username"),
        ({**KAFKA, "kafka_password": "hunter2"}, "'PLAINTEXT' cannot honour kafka_password"),
        ({**KAFKA, "kafka_protocol": "SSL", "kafka_mechanism": "PLAIN"}, "'SSL' cannot honour kafka_mechanism"),
        ({**KAFKA, "kafka_ca_file": "ca.pem"}, "'PLAINTEXT' cannot honour kafka_ca_file"),
        (
            {**KAFKA, **ACCOUNT, "kafka_protocol": "SASL_PLAINTEXT", "kafka_ca_file": "ca.pem"},
            "'SASL_PLAINTEXT' cannot honour kafka_ca_file",
        ),
    ],
)
def test_trap_15_an_option_that_a_transport_cannot_honour_is_an_error(values: dict[str, Any], message: str) -> None:
    """Silence would be taken for consent."""
    with pytest.raises(ConfigurationError, match=message) as caught:
        EventsSettings(**values)
    assert "hunter2" not in str(caught.value)


def test_a_password_is_never_shown() -> None:
    """Neither in the settings' representation nor in an error."""
    settings = EventsSettings(
        transport="kafka",
        kafka_servers="x:1",
        kafka_protocol="SASL_SSL",
        kafka_username="ann",
        kafka_password=SecretStr("hunter2"),
    )
    assert "hunter2" not in repr(settings)


def test_topics_follow_the_type_unless_named() -> None:
    """What belongs to one thing shares a topic, so that its events keep their order; a mapping says otherwise."""
    settings = EventsSettings(transport="memory", topics={"order.audit": "secrets", "order.seen": "views"})
    topics = {
        "order.paid": None, "order.placed": None, "shop.order.paid": None, "plain": None,
        "order.late": "late", "order.seen": "seen", "order.audit": None,
    }  # fmt: skip
    definitions = [EventDefinition(type_, Version(1, 0), None, topic) for type_, topic in topics.items()]
    assert [settings.topic_of(definition) for definition in definitions] == [
        "order", "order", "shop.order", "plain", "late", "views", "secrets",
    ]  # fmt: skip
    assert settings.retry() == Retry(5, settings.retry().wait)


async def test_a_class_names_its_topic() -> None:
    """Publishers and handlers agree on it without a word in anybody's settings."""
    events = EventRouter()
    topics: list[str] = []

    class Moved(Event, type="parcel.moved", topic="movements"):
        pass

    @events.on(Moved, group="g")
    async def handle(event: Moved, meta: Metadata) -> None:
        topics.append(meta.topic)

    async with in_memory(events) as rehearsal:
        await rehearsal.publish(Moved())
        await rehearsal.settled()
    assert topics == ["movements"]


def test_versions_are_compared_by_their_numbers() -> None:
    """1.10 follows 1.9, which no comparison of texts says."""
    assert Version.parse("1.9") < Version.parse("1.10") < Version.parse("2.0")
    assert str(Version(1, 10)) == f"{Version(1, 10)}" == "1.10"
    for text in ("1", "1.0.0", "01.0", "1.x", "", "1.0 ", "\u0661.0", "1." + "9" * 5000):
        with pytest.raises(ValueError, match="must be two numbers"):
            Version.parse(text)


async def test_the_database_is_required_where_it_is_used() -> None:
    """sql, the outbox and an inbox need it; the error names the line."""
    events = EventRouter()

    @events.on(OrderPaid, group="g", inbox=True)
    async def handle(event: OrderPaid) -> None: ...

    for settings in (EventsSettings(), EventsSettings(transport="kafka", kafka_servers="x:1")):
        with pytest.raises(ConfigurationError, match=r"DatabaseModule\.for_root"):
            App(EventsModule.for_root(settings))
    memory = EventsModule.for_root(EventsSettings(transport="memory"))
    with pytest.raises(ConfigurationError, match=r"DatabaseModule\.for_root"):
        App(memory, EventsModule.for_feature(events))


async def test_a_router_belongs_to_one_running_app(sqlite_url: str) -> None:
    """A second App of the process is refused, and after a stop the router is free again."""
    events = EventRouter()

    def app() -> App:
        database = DatabaseModule.for_root(DatabaseSettings(url=SecretStr(sqlite_url)))
        return App(database, EventsModule.for_root(EventsSettings()), EventsModule.for_feature(events))

    async with app() as first:
        await first.get(EventPublisher).publish_batch([])
        with pytest.raises(ConfigurationError, match="already running"):
            async with app():
                pass
    async with app():
        await events.publish_batch([OrderPaid(order_id=uuid4(), amount=1)])


def test_a_secret_in_an_event_is_refused_at_the_class() -> None:
    """It would be published as asterisks, and nobody would notice until it is used."""
    with pytest.raises(TypeError, match="event CardStored cannot be published: number holds a secret"):

        class CardStored(Event, type="card.stored"):
            number: SecretStr
