"""Publishing: one verb, which inside a workflow happens once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING
from uuid import UUID

from mainstay.core import Clock, ConfigurationError, Context, current, derived_id, once, uuid7
from mainstay.events._codec import codec_of
from mainstay.events._metrics import PUBLISHED_SECONDS, published
from mainstay.events.event import Event, EventDefinition, definition_of
from mainstay.events.metadata import Outgoing, encode, envelope
from mainstay.events.scheduled import Due, Schedule, due_of
from mainstay.events.settings import EventsSettings

if TYPE_CHECKING:
    from mainstay.events._spans import Spans

__all__ = ["EventPublisher"]

Send = Callable[[Sequence[Outgoing]], Awaitable[None]]
"""Takes encoded events, in order, and returns when they are durable; after an exception some may be."""


class EventPublisher:
    """Publishes events; `app.get(EventPublisher)`, or `publish` of a router.

    Args:
        send: the transport, or the outbox in front of it.
        transactional: `send` writes to the Database and nowhere else.
        settings: the names of topics and of this service.
        clock: what stamps events.
        spans: of what is published; None where none are recorded.
        schedule: keeps events that are published for later; None where there is no Database to keep them in.
    """

    def __init__(
        self,
        send: Send,
        *,
        transactional: bool,
        settings: EventsSettings,
        clock: Clock,
        schedule: Schedule | None,
        spans: Spans | None = None,
    ) -> None:
        self._send = send
        self._schedule = schedule
        self._transactional = transactional
        self._settings = settings
        self._clock = clock
        self._spans = spans

    async def publish(self, event: Event, *, at: datetime | None = None, delay_seconds: float | None = None) -> str:
        """Publish one event; returns when it is durable, or joins the unit of work that is open and commits with it.

        Inside a workflow function it is a recorded step: a replay does not publish again, and a repetition after a
        crash has the same event id. An event that is published outside any conversation starts one, with its id.

        With `at` or `delay_seconds` the event waits in the Database, and a process that serves hands it on when its
        time has come by the Database's clock, within a second; on the transport `memory` it is the App's clock. It has
        its place in the order of its key from then on. `ScheduledEvents` lists and cancels what waits.

        Args:
            event: what has happened.
            at: when it is handed on, with a time zone. A moment that has passed is now.
            delay_seconds: after how long it is handed on instead, from 0 to 10,000,000,000. In a workflow it begins
                when the step is first executed.

        Returns:
            The event's id, which is `Metadata.id` where it is handled, and by which it can be cancelled.

        Raises:
            PublishError: the broker did not confirm it in time (only without an outbox).
            TypeError: it is no event with a type, or JSON cannot hold a value of it, or (on the transport `memory`, in
                tests) a value would not come back equal; or `at` is no datetime, the delay no number, or both are
                given.
            ValueError: `at` has no time zone or is after the year 9998, or the delay is negative, too long or nan.
            ConfigurationError: a time is given, and this service publishes to Kafka without an outbox.
        """
        (id_,) = await self._publish((event,), due_of(at, delay_seconds))
        return id_

    async def publish_batch(self, events: Sequence[Event]) -> list[str]:
        """Publish events together, in their order: one step in a workflow, one commit, few requests to a broker.

        With the `sql` transport or the outbox it is all of them or none. Raises what `publish` does.

        Returns:
            The ids of the events, in their order.
        """
        return await self._publish(events, None) if events else []

    async def _publish(self, events: Sequence[Event], due: Due | None) -> list[str]:
        if due is not None and self._schedule is None:
            msg = (
                "publish(at=…) and publish(delay_seconds=…) keep the event in the Database until then, and this "
                f"service publishes to Kafka without it: set {self._settings.variable('outbox')}=true, and add "
                "DatabaseModule.for_root() to the App"
            )
            raise ConfigurationError(msg)
        definitions = [definition_of(type(event)) for event in events]
        if self._settings.transport == "memory":  # a look at every value is for tests
            for event in events:
                codec_of(type(event)).compare(event)

        ids: list[str] = []

        async def effect(key: str | None) -> None:
            began = self._clock.monotonic()
            ids[:] = _ids(key, len(events))
            if self._spans is None:
                await self._hand_over(self._encoded(events, definitions, ids, current()), ids, due)
            else:
                topics = {self._settings.topic_of(definition) for definition in definitions}
                with self._spans.publishing(topics, ids) as context:
                    await self._hand_over(self._encoded(events, definitions, ids, context), ids, due)
            PUBLISHED_SECONDS.observe(self._clock.monotonic() - began)
            for definition in definitions:
                published(definition.type).inc()

        types = dict.fromkeys([definition.type for definition in definitions])
        arguments = events if due is None else (events, due)
        key = await once(
            f"publish:{','.join(types)}", effect, transactional=self._transactional, arguments=lambda: arguments
        )
        return ids or _ids(key, len(events))  # none were made where a replay published nothing

    async def _hand_over(self, batch: Sequence[Outgoing], ids: Sequence[str], due: Due | None) -> None:
        if due is None or self._schedule is None:
            await self._send(batch)
            return
        for id_, event in zip(ids, batch, strict=True):
            await self._schedule.add(UUID(id_), event, due)

    def _encoded(
        self, events: Sequence[Event], definitions: Sequence[EventDefinition], ids: Sequence[str], context: Context
    ) -> list[Outgoing]:
        settings = self._settings
        shared = envelope(time=self._clock.now(), source=settings.source, context=context)
        return [
            encode(event, id=id_, topic=settings.topic_of(definition), shared=shared)
            for event, id_, definition in zip(events, ids, definitions, strict=True)
        ]


def _ids(key: str | None, count: int) -> list[str]:
    """Ids for events: new ones, or those that a step of a workflow always gives them."""
    return [str(uuid7() if key is None else derived_id(f"{key}:{index}")) for index in range(count)]
