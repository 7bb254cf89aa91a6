"""Handlers in memory, without a server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any, TypeVar

from mainstay.core import SYSTEM_CLOCK, App, Clock, Context, Feature, Module, current, uuid7
from mainstay.events._codec import codec_of
from mainstay.events._memory import MemoryTransport
from mainstay.events._transport import LogRecord
from mainstay.events.dead_letters import DeadLetter, DeadLetters
from mainstay.events.event import Event, definition_of
from mainstay.events.metadata import TYPE, Metadata, Outgoing, encode, envelope
from mainstay.events.module import EventConsumers, EventsModule, Watch
from mainstay.events.publisher import EventPublisher
from mainstay.events.router import EventRouter
from mainstay.events.settings import EventsSettings

E = TypeVar("E", bound=Event)


def metadata_of(event: Event, *, group: str = "test", attempt: int = 1, context: Context | None = None) -> Metadata:
    """Metadata as a handler would get it with `event`, to call the handler by hand.

    Raises:
        TypeError: the event would not come back equal.
    """
    codec_of(type(event)).compare(event)
    outgoing = encode(
        event,
        id=str(uuid7()),
        topic=EventsSettings(transport="memory").topic_of(definition_of(type(event))),
        shared=envelope(time=datetime.now(UTC), source="test", context=current() if context is None else context),
    )
    record = LogRecord(outgoing.topic, 0, 0, outgoing.key, outgoing.value, outgoing.headers)
    return Metadata(record, group=group, attempt=attempt)


class Rehearsal:
    """What `in_memory` yields.

    Attributes:
        app: the running App.
    """

    def __init__(self, app: App) -> None:
        self.app = app

    def published(self, kind: type[E]) -> list[E]:
        """Every event of a class that was published and committed so far, in order."""
        type_ = definition_of(kind).type.encode()
        sent = self.app.get(MemoryTransport).sent
        read = codec_of(kind).read
        return [
            read(event.value) for event in sent if event.value is not None and dict(event.headers).get(TYPE) == type_
        ]

    async def publish(self, event: Event) -> str:
        """Publish, as the service's own code would, and return the event's id."""
        return await self.app.get(EventPublisher).publish(event)

    async def receive(
        self,
        topic: str,
        value: bytes | None,
        *,
        key: bytes | None = None,
        headers: Sequence[tuple[str, bytes | None]] = (),
    ) -> None:
        """Put a record on a topic, as others would that know nothing of this package."""
        await self.app.get(MemoryTransport).send([Outgoing(topic, key, value, headers)])

    async def dead_letters(self) -> Sequence[DeadLetter]:
        """What could not be handled."""
        return await self.app.get(DeadLetters).list()

    async def settled(self, seconds: float = 5.0) -> None:
        """Return when every group has handled everything, also what handlers published.

        Raises:
            TimeoutError: that takes longer than `seconds`; says which group is busy.
        """
        end = time.monotonic() + seconds
        while busy := [consumer.group for consumer in self.app.get(EventConsumers).consumers if not consumer.idle]:
            if time.monotonic() > end:
                msg = f"after {seconds:g} s these groups still have work: {', '.join(busy)}"
                raise TimeoutError(msg)
            await asyncio.sleep(0)


@asynccontextmanager
async def in_memory(
    *routers: EventRouter,
    modules: Sequence[Module[Any, Any] | Feature] = (),
    clock: Clock = SYSTEM_CLOCK,
    **settings: Any,
) -> AsyncGenerator[Rehearsal, None]:
    """Run the handlers of `routers` on the memory transport.

    Args:
        routers: the features under test.
        modules: what else the App needs, such as `DatabaseModule.for_root(…)` for handlers with an inbox.
        clock: a virtual one makes retries wait for the test.
        settings: further `EventsSettings`.
    """
    async with rehearsal_of(routers, modules, clock, **settings) as rehearsal:
        yield rehearsal


@asynccontextmanager
async def rehearsal_of(
    routers: Sequence[EventRouter],
    modules: Sequence[Module[Any, Any] | Feature],
    clock: Clock,
    *,
    watch: Watch | None = None,
    **settings: Any,
) -> AsyncGenerator[Rehearsal, None]:
    """As `in_memory`, with something put around each handler."""
    root = EventsModule.for_root(EventsSettings(transport="memory", **settings))
    root._watch = watch
    app = App(*modules, root, EventsModule.for_feature(*routers), clock=clock, drain_seconds=5.0)
    async with app.running(serve=True):
        yield Rehearsal(app)
