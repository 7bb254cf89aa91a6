"""The module: puts publisher, transport, consumers, relay and dead letters together, as the settings say."""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

from mainstay.core import App, Clock, ConfigurationError, Health, Module, NotBoundError, Retry, timeout
from mainstay.database import Database, DatabaseModule, DatabaseSettings
from mainstay.events import _handled, _kafka, tables
from mainstay.events._codec import codec_of
from mainstay.events._consumer import Consumer
from mainstay.events._crashes import Crashes
from mainstay.events._decoding import Decoders, Foreign, NoSchemas
from mainstay.events._handled import Handled
from mainstay.events._in_hand import InHand
from mainstay.events._inbox import Inbox, handlers_at_once
from mainstay.events._letters import SqlDeadLetters
from mainstay.events._memory import MemorySchedule, MemoryTransport
from mainstay.events._outbox import Outbox
from mainstay.events._parking import Parking
from mainstay.events._registry import SchemaRegistry, check_format, context_of
from mainstay.events._relay import Broker, OutboxRelay
from mainstay.events._retention import LogRetention
from mainstay.events._routes import Batching, Limits, Route, Routes
from mainstay.events._schedule import ScheduleMover, SqlSchedule
from mainstay.events._sql import SqlTransport
from mainstay.events._sql_log import SqlLog
from mainstay.events._transport import Transport
from mainstay.events._upcasting import Upcast, Upcasting
from mainstay.events.dead_letters import DeadLetters, DeadLetterStore
from mainstay.events.event import EventDefinition, definition_of
from mainstay.events.foreign import Debezium, Decoder, Plain, Schemas
from mainstay.events.log import EventLog
from mainstay.events.metadata import Outgoing
from mainstay.events.parked import ParkedKeys
from mainstay.events.pauses import Pauses
from mainstay.events.publisher import EventPublisher, Send
from mainstay.events.refused import RefusedEvents
from mainstay.events.router import EventRouter, Subscription, decoder_each, one_handler_each, one_rule_each
from mainstay.events.scheduled import Schedule, ScheduledEvents
from mainstay.events.settings import EventsSettings
from mainstay.events.strategies import OnFailure, RetryLater

if TYPE_CHECKING:
    from mainstay.events._spans import Spans

__all__ = ["EventConsumers", "EventsModule"]

Call = Callable[..., Awaitable[None]]
Watch = Callable[[Subscription, Call], Call]
"""Put around what is called with the event and its metadata, or with a batch and theirs; an inbox included."""

_AT_START = Retry(attempts=6)
"""A file that others write to at the moment does not end a start; a database that is away has ended it before."""


class EventConsumers:
    """The consumer groups of this App, for its health."""

    def __init__(self, consumers: Sequence[Consumer]) -> None:
        self.consumers = consumers

    async def health(self) -> Health:
        """Degraded while a group's transport is away, or an event is in flight for too long."""
        reports = [await consumer.health() for consumer in self.consumers]
        worse = [report.detail for report in reports if report.status != "ok"]
        if worse:
            return Health("degraded", "; ".join(worse))
        return Health("ok", "; ".join(report.detail for report in reports) or "no groups")


class EventsModule(Module[EventsSettings, EventRouter]):
    """`EventsModule.for_root()` once; `EventsModule.for_feature(router)` for each feature.

    Yields `EventPublisher`, `DeadLetters`, `ParkedKeys`, `Pauses` and, but on Kafka without an outbox,
    `ScheduledEvents`. While the App serves, consumers and the outbox relay run, and scheduled events are handed on.
    """

    name: ClassVar[str] = "events"
    _watch: Watch | None = None  # put around each handler by simulations
    _relay_to: Broker | None = None  # what stands between the outbox and the log in simulations

    def requires(self) -> Sequence[type[Module[Any, Any]]]:
        """The Database, where the log, the outbox, an inbox or parked keys are kept in it."""
        return [DatabaseModule] if self._needs_database() else []

    def _needs_database(self) -> bool:
        counted = "crash_attempts" in self.settings.model_fields_set
        return (
            self.settings.writes_database
            or counted
            or any(each.inbox or _waits_in_tables(each.on_failure) for each in self._subscriptions())
        )

    def _subscriptions(self) -> list[Subscription]:
        return [subscription for router in self.parts for subscription in router.subscriptions]

    def _upcasts(self) -> list[Upcast]:
        return [upcast for router in self.parts for upcast in router.upcasts]

    def yields(self) -> Sequence[type]:
        """Publisher, dead letters, consumers, and the parts of the transport that the settings choose."""
        registry = () if self.settings.registry_url is None else (SchemaRegistry,)
        yielded = (EventPublisher, DeadLetters, ParkedKeys, Pauses, EventConsumers)
        return (*yielded, *registry, *_transport_classes(self.settings))

    def functions(self) -> Sequence[Callable[..., Any]]:
        """The handlers."""
        return [subscription.call for subscription in self._subscriptions()]

    def check(self) -> None:
        """Refuse what would fail later: handlers, events, topics and a connection that cannot be.

        The service's name becomes the source of its events here, unless `settings` name one.

        Raises:
            ConfigurationError: a type that a group handles twice, a field that would not be read back, topics
                that brokers do not tell apart, a client that is not installed, a file of certificates that is none, a
                service without a name on Kafka.
        """
        names = (module.service_name for module in self.modules)
        self.settings = self.settings.named(next(filter(None, names), None))
        subscriptions = self._subscriptions()
        decoders: Sequence[Decoder] = ()
        try:
            one_handler_each(subscriptions)
            for event in {event for subscription in subscriptions for event in subscription.events}:
                codec_of(event)  # also of a class that could not be looked at yet when it was declared
            Upcasting(self._upcasts())
            one_rule_each(subscriptions)
            decoders = [*self._decoders().values()]
        except (TypeError, ValueError) as error:
            raise ConfigurationError(str(error)) from error
        _distinct_topics([definition_of(event) for each in subscriptions for event in each.events], self.settings)
        _check_formats(decoders, self.settings)
        if self.settings.transport == "kafka":
            _kafka.check_connection(self.settings)

    def _decoders(self) -> Mapping[str, Decoder]:
        """Of the topics that others write, the decoder of each."""
        return decoder_each(self._subscriptions(), self.settings)

    def describe(self) -> Mapping[str, Sequence[str]]:
        """The handlers with their groups, and the topics that they read."""
        handlers: list[str] = []
        topics: set[str] = set()
        for subscription in self._subscriptions():
            for event in subscription.events:
                definition = definition_of(event)
                topics.add(self.settings.topic_of(definition))
                what, how = f"{definition.type} {definition.version}", _how(subscription)
                by = "" if definition.decoder is None else f", read by {definition.decoder}"
                handlers.append(f"{subscription.name} handles {what} in group {subscription.group}{how}{by}")
        return {"handlers": handlers, "topics": sorted(topics)}

    async def inspect(self, app: App) -> Sequence[str]:
        """Missing rights, topics that are missing or too narrow, and a pool that is smaller than the groups need."""
        found: list[str] = []
        if self._needs_database():
            database = app.get(Database)
            found += await database.missing_rights(tables.SCHEMA.metadata.sorted_tables)
            found += self._too_few_connections(_pool_size(app), database.dialect)
            if self.settings.transport == "sql":
                found += await self._given_up(app, database)
        if self.settings.transport == "kafka":
            topics = sorted(self.describe()["topics"])
            found += await app.get(_kafka.KafkaTransport).topics.wrong(topics)
        if self.settings.registry_url is not None:
            found += await app.get(SchemaRegistry).wrong()
        return found

    def _retention(self, app: App, database: Database) -> LogRetention:
        mine = {
            (each.group, self.settings.topic_of(definition_of(event)))
            for each in self._subscriptions()
            for event in each.events
        }
        return LogRetention(database, days=self.settings.log_days, mine=mine, clock=app.clock)

    async def _given_up(self, app: App, database: Database) -> list[str]:
        days = self.settings.log_days
        return [
            f"group {group} has had no member that reads topic {topic} for {seconds / 86_400:.1f} days: after {days:g} "
            "days what it has not read is deleted with the rest. Start a process of it; or, if it is gone for good, "
            "delete its rows of that topic from mainstay_events_offsets and mainstay_events_members"
            for (group, topic), seconds in (await self._retention(app, database).without_members()).items()
            if seconds / 86_400 > days / 2
        ]

    def _too_few_connections(self, size: int, dialect: str) -> list[str]:
        variable = DatabaseSettings.variable("pool_size")
        groups = {subscription.group for subscription in self._subscriptions()}
        if size < len(groups):
            shared = f"{len(groups)} consumer groups share {size} connections, so some always wait for others"
            return [f"{shared}: set {variable} to {len(groups)} or more"]
        if any(each.inbox is True for each in self._subscriptions()) and handlers_at_once(dialect, size) >= size:
            return [f"a handler with an inbox takes the only connection: set {variable} to 4 or more"]
        return []

    def _has_inbox(self) -> bool:
        return any(subscription.inbox for subscription in self._subscriptions())

    def _in_hand(self, group: str, routes: Routes, database: Database | None, clock: Clock) -> InHand | None:
        """The notes of what a group has in hand for long, where other processes can see them."""
        if database is None or self.settings.transport == "memory":
            return None
        mine = [each for each in self._subscriptions() if each.group == group]
        handlers = {definition_of(event).type: each.name for each in mine for event in each.events}
        return InHand(database, group, handlers, clock, routes.decoders)

    def _concurrency(self, group: str, inbox: Inbox | None) -> int:
        """The most handlers of a group at once; where all have an inbox, no more than may run."""
        most = self.settings.concurrency
        if inbox is None or not all(each.inbox is True for each in self._subscriptions() if each.group == group):
            return most
        return min(most, inbox.at_once)

    @asynccontextmanager
    async def running(self, app: App) -> AsyncGenerator[Sequence[object], None]:
        """See `Module`."""
        settings = self.settings
        database: Database | None = None
        if self._needs_database():
            database = app.get(Database)
            await database.ensure_schema(tables.SCHEMA)
        spans = _spans(settings)
        services: list[object] = []
        async with AsyncExitStack() as stack:
            foreign = self._decoders()
            send, transport, letters, schedule = await _transport(
                app, settings, database, services, stack, foreign=foreign, relay_to=self._relay_to
            )
            if isinstance(transport, SqlTransport):
                app.serve("log", self._retention(app, transport.database).run)
                if not self.looking:
                    await _AT_START.call(transport.note_partitions)
            inbox: Inbox | None = None
            if database is not None and self._has_inbox():
                inbox = Inbox(database, handlers_at_once(database.dialect, _pool_size(app)))
            crashes = _crashes(database, settings)
            groups = _groups(self, partial(_call, app, inbox, self._watch), spans)
            _read_foreign(groups.values(), foreign, _schemas(app, settings, services))
            parking = _parking(database, groups, settings)
            if parking and not self.looking:
                handled = [each.handled for each in parking.values()]
                await _AT_START.call(_handled.note, handled)  # now: this App may publish what its handlers are for
                app.serve("handled", partial(_handled.note_often, handled))
            consumers = [
                Consumer(
                    group,
                    topics,
                    routes,
                    transport=transport,
                    dead_letters=letters,
                    parking=parking.get(group),
                    concurrency=self._concurrency(group, inbox),
                    crashes=crashes,
                    in_hand=self._in_hand(group, routes, database, app.clock),
                    window_bytes=settings.window_bytes,
                    drain_seconds=settings.drain_seconds,
                    stuck_seconds=settings.stuck_seconds,
                    clock=app.clock,
                )
                for group, (topics, routes) in groups.items()
            ]
            for consumer in consumers:
                app.serve(consumer.group, consumer.serve)
            if inbox is not None:
                app.serve("inbox", partial(inbox.sweep, settings.inbox_days))
            publisher = self._publisher(app, send, schedule, spans)
            for router in self.parts:
                stack.enter_context(router.binding.to(publisher))
            known = database or _database_of(app)
            dead = DeadLetters(letters, {group: routes for group, (_, routes) in groups.items()}, known)
            services += _log(transport, settings, database, groups)
            services += [dead, ParkedKeys(known, letters), Pauses(known)]
            yield [publisher, EventConsumers(consumers), *services]

    def _publisher(self, app: App, send: Send, schedule: Schedule | None, spans: Spans | None) -> EventPublisher:
        return EventPublisher(
            send,
            transactional=self.settings.writes_database,
            settings=self.settings,
            clock=app.clock,
            schedule=schedule,
            spans=spans,
        )


async def _transport(
    app: App,
    settings: EventsSettings,
    database: Database | None,
    services: list[object],
    stack: AsyncExitStack,
    *,
    foreign: Collection[str],
    relay_to: Broker | None,
) -> tuple[Callable[..., Awaitable[None]], Transport, DeadLetterStore, Schedule | None]:
    """Where publishing writes, where consumers read, where dead letters go, where events wait for their time."""
    if settings.transport == "memory":
        memory = MemoryTransport(partitions=settings.partitions, database=partial(_database_of, app), clock=app.clock)
        services.append(memory)
        later = MemorySchedule(memory, app.clock)
        services.append(ScheduledEvents(later))
        stack.callback(later.close)
        return memory.send, memory, memory, later
    if settings.transport == "sql":
        assert database is not None  # noqa: S101  required
        log = SqlTransport(
            database,
            partitions=settings.partitions,
            lease_seconds=settings.lease_seconds,
            clock=app.clock,
        )
        services.append(log)
        if relay_to is not None:
            outbox, _, schedule = _relayed(app, settings, database, relay_to)
            services.append(ScheduledEvents(schedule))
            return outbox.send, log, _letters(app, settings, database, outbox.send_again), schedule
        schedule = _schedule(app, settings, database, log.send)
        services.append(ScheduledEvents(schedule))
        return log.send, log, _letters(app, settings, database, log.send), schedule
    kafka = _kafka.KafkaTransport(settings, app.clock, foreign)
    stack.push_async_callback(kafka.close)
    services.append(kafka)
    if not settings.writes_database:
        await kafka.producer.connect()
        has_database = any(isinstance(module, DatabaseModule) for module in app.modules)
        direct = _kafka.Direct(kafka.producer, partial(_database_of, app) if has_database else None)
        return direct.send, kafka, kafka.letters(), None
    assert database is not None  # noqa: S101  required
    outbox, relay, schedule = _relayed(app, settings, database, kafka)
    services += [relay, RefusedEvents(database, outbox), ScheduledEvents(schedule)]
    return outbox.send, kafka, _letters(app, settings, database, outbox.send_again), schedule


def _relayed(
    app: App, settings: EventsSettings, database: Database, broker: Broker
) -> tuple[Outbox, OutboxRelay, SqlSchedule]:
    """The outbox, what carries it to a broker, and where events wait for their time before it."""
    outbox = Outbox(database, _kafka.check_size)
    relay = OutboxRelay(
        database,
        outbox,
        broker,
        lease_seconds=settings.lease_seconds,
        most_bytes=settings.outbox_bytes,
        clock=app.clock,
        spans=_spans(settings),
    )
    app.serve("relay", relay.serve)
    app.serve("outbox", relay.rows.measure)
    return outbox, relay, _schedule(app, settings, database, outbox.send_again, _kafka.check_size)


def _spans(settings: EventsSettings) -> Spans | None:
    """What records spans; OpenTelemetry is not imported for it, since an SDK would have done so."""
    if "opentelemetry.trace" not in sys.modules:
        return None
    found: Spans | None = import_module("mainstay.events._spans").spans_of(settings.transport)
    return found


def _letters(app: App, settings: EventsSettings, database: Database, send: Send) -> SqlDeadLetters:
    letters = SqlDeadLetters(database, send, app.clock)
    app.serve("dead-letters", partial(letters.sweep, settings.dead_letter_days))
    return letters


def _schedule(
    app: App,
    settings: EventsSettings,
    database: Database,
    send: Send,
    check: Callable[[Outgoing], None] | None = None,
) -> SqlSchedule:
    schedule = SqlSchedule(database, check, settings.stuck_seconds)
    mover = ScheduleMover(database, schedule.arrivals, send, lease_seconds=settings.lease_seconds, clock=app.clock)
    app.serve("schedule", mover.serve)
    app.serve("scheduled", schedule.measure)
    return schedule


def _transport_classes(settings: EventsSettings) -> Sequence[type]:
    if settings.transport == "memory":
        return (MemoryTransport, ScheduledEvents)
    if settings.transport == "sql":
        return (SqlTransport, EventLog, ScheduledEvents)
    relayed = (OutboxRelay, RefusedEvents, ScheduledEvents) if settings.writes_database else ()
    return (_kafka.KafkaTransport, EventLog, *relayed)


def _distinct_topics(events: Iterable[EventDefinition], settings: EventsSettings) -> None:
    seen: dict[str, str] = {}
    for topic in sorted({*map(settings.topic_of, events), *settings.topics.values()}):
        other = seen.setdefault(topic.replace(".", "_"), topic)
        if other != topic:
            msg = (
                f"brokers do not tell the topics {other} and {topic} apart: give one of them another name with "
                f"{settings.variable('topics')}"
            )
            raise ConfigurationError(msg)


def _check_formats(decoders: Iterable[Decoder], settings: EventsSettings) -> None:
    for decoder in decoders:
        format_ = decoder.format if isinstance(decoder, Plain | Debezium) else "json"
        check_format(format_)
        if format_ != "json" and settings.registry_url is None:
            msg = f"{decoder} asks a schema registry: set {settings.variable('registry_url')}=https://host:port"
            raise ConfigurationError(msg)
    if settings.registry_url is not None:
        context_of(settings)


def _schemas(app: App, settings: EventsSettings, services: list[object]) -> Schemas:
    """What decoders look schemas up in."""
    if settings.registry_url is None:
        return NoSchemas()
    registry = SchemaRegistry(settings, app.clock)
    services.append(registry)
    app.background("registry", registry.run)
    return registry


def _read_foreign(groups: Iterable[tuple[list[str], Routes]], foreign: Mapping[str, Decoder], schemas: Schemas) -> None:
    """Have each group read the topics of others by their decoders."""
    for _, routes in groups:
        topics: dict[str, Foreign] = {}
        for topic, decoder in foreign.items():
            here = [route for route in routes.values() if topic in route.topics]
            if here:  # the strictest decides what becomes of what cannot be read
                strictest = max(here, key=lambda route: ("dead-letter", "park", "stop").index(route.on_failure))
                topics[topic] = Foreign(decoder, strictest.type)
        if topics:
            routes.decoders = Decoders(topics, schemas)


def _log(
    transport: Transport,
    settings: EventsSettings,
    database: Database | None,
    groups: Mapping[str, tuple[list[str], Routes]],
) -> list[object]:
    """The log seen from outside, with the groups of this App, which read it as their handlers do."""
    foreign = {topic: each for _, routes in groups.values() for topic, each in routes.decoders.topics.items()}
    schemas = next((routes.decoders.schemas for _, routes in groups.values() if routes.decoders.topics), NoSchemas())
    decoders = Decoders(foreign, schemas)
    if isinstance(transport, SqlTransport):
        log = SqlLog(transport.database, partitions=settings.partitions, log_days=settings.log_days)
        return [EventLog(log, database, groups, decoders)]
    return [EventLog(transport.log, database, groups, decoders)] if isinstance(transport, _kafka.KafkaTransport) else []


def _database_of(app: App) -> Database | None:
    try:
        return app.get(Database)
    except NotBoundError:
        return None


def _pool_size(app: App) -> int:
    return next(module.settings.pool_size for module in app.modules if isinstance(module, DatabaseModule))


def _crashes(database: Database | None, settings: EventsSettings) -> Crashes | None:
    """How the holders of partitions ended; in memory no other process takes part."""
    if database is None or settings.transport == "memory":
        return None
    return Crashes(database, settings.crash_attempts)


def _on_failure(subscription: Subscription, *, lasting: bool) -> OnFailure:
    """What becomes of what keeps failing: by itself a key is parked that has an order and a place to wait."""
    if subscription.on_failure is not None:
        return subscription.on_failure
    return "park" if lasting and subscription.order == "key" else "dead-letter"


def _waits_in_tables(on_failure: OnFailure | None) -> bool:
    return on_failure == "park" or isinstance(on_failure, RetryLater)


def _groups(
    module: EventsModule, call_of: Callable[[Subscription], tuple[Call, bool, Batching | None]], spans: Spans | None
) -> Mapping[str, tuple[list[str], Routes]]:
    """For each group, its topics and its routes by type; what keeps failing parks its key where it can."""
    lasting = module._needs_database()
    groups: dict[str, tuple[list[str], Routes]] = {}
    settings, upcasting = module.settings, Upcasting(module._upcasts())
    for subscription in module._subscriptions():
        topics, routes = groups.setdefault(subscription.group, ([], Routes()))
        routes.unknown, routes.start, routes.spans = subscription.unknown, subscription.start, spans
        call, wants_metadata, batching = call_of(subscription)
        limits = _limits(subscription)
        retry = settings.retry() if subscription.retry is None else subscription.retry
        for event in subscription.events:
            definition = definition_of(event)
            type_, topic = definition.type, settings.topic_of(definition)
            if topic not in topics:
                topics.append(topic)
            if type_ not in routes:
                routes[type_] = Route(type_, subscription.group)
            routes[type_].topics.add(topic)
            routes[type_].reads(
                event,
                call,
                wants_metadata=wants_metadata,
                retry=retry,
                on_failure=_on_failure(subscription, lasting=lasting),
                batching=batching,
                limits=limits,
            )
    for _, routes in groups.values():
        for route in routes.values():
            route.reads_older(upcasting)
    return groups


def _parking(
    database: Database | None, groups: Mapping[str, tuple[list[str], Routes]], settings: EventsSettings
) -> Mapping[str, Parking]:
    """For each group, its parked keys, with what this process handles; none without a Database."""
    if database is None:
        return {}
    kinds = {
        group: {kind for route in routes.values() for kind in route.kinds} for group, (_, routes) in groups.items()
    }
    return {
        group: Parking(
            database, group, Handled(database, group, mine), settings.lease_seconds, groups[group][1].decoders
        )
        for group, mine in kinds.items()
    }


def _call(
    app: App, inbox: Inbox | None, watch: Watch | None, subscription: Subscription
) -> tuple[Call, bool, Batching | None]:
    """What a delivery calls, whether that takes the metadata, and how it is given several events."""
    call, wants_metadata = _once(app, inbox, subscription)
    if not wants_metadata and (watch is not None or subscription.batches is not None):
        call, wants_metadata = _without_metadata(call), True
    if watch is not None:
        call = watch(subscription, call)
    if subscription.batches is None:
        return call, wants_metadata, None
    size, wait_seconds, by = subscription.batches
    batching = Batching(call, size, wait_seconds, by_key=by == "key")
    return batching.alone, True, batching


def _once(app: App, inbox: Inbox | None, subscription: Subscription) -> tuple[Call, bool]:
    call: Call = app.fill(subscription.call)
    wants_metadata = subscription.wants_metadata
    if subscription.timeout_seconds is not None:
        call = _limited(call, subscription.timeout_seconds)
    if subscription.inbox:
        assert inbox is not None  # noqa: S101  made for it
        call = call if wants_metadata else _without_metadata(call)
        if subscription.batches is not None:
            return inbox.around_batch(subscription.group, call), True
        return inbox.around(subscription.group, call, subscription.inbox), True
    return call, wants_metadata


def _limits(subscription: Subscription) -> Limits | None:
    if subscription.concurrency is None and subscription.order == "key":
        return None
    return Limits(subscription.concurrency, in_order=subscription.order == "key")


def _how(subscription: Subscription) -> str:
    """What is special about a handler, for `describe`."""
    said = ["once"] if subscription.inbox else []
    if subscription.batches is not None:
        said.append(f"up to {subscription.batches.size} of a {subscription.batches.by} at once")
    if subscription.concurrency is not None:
        said.append(f"{subscription.concurrency} calls at once")
    if subscription.order == "none":
        said.append("in no order")
    if subscription.start != "earliest":
        said.append(f"from {subscription.start} on")
    return "".join(f", {each}" for each in said)


def _limited(call: Call, seconds: float) -> Call:
    async def limited(*arguments: object) -> None:
        async with timeout(seconds):
            await call(*arguments)

    return limited


def _without_metadata(call: Call) -> Call:
    async def plain(event: object, _meta: object) -> None:
        await call(event)

    return plain
