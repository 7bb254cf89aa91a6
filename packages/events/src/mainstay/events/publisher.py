"""Publishing: one verb, which inside a workflow happens once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING
from uuid import UUID

from mainstay.core import Clock, Context, current, derived_id, once, uuid7
from mainstay.events._codec import codec_of
from mainstay.events._metrics import PUBLISHED_SECONDS, published
from mainstay.events.event import Event, EventDefinition, definition_of
from mainstay.events.metadata import Outgoing, encode, envelope
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
        spans: of what is published; None where nobody records any.
    """

    def __init__(
        self,
        send: Send,
        *,
        transactional: bool,
        settings: EventsSettings,
        clock: Clock,
        spans: Spans | None = None,
    ) -> None:
        self._send = send
        self._transactional = transactional
        self._settings = settings
        self._clock = clock
        self._spans = spans

    async def publish(self, event: Event) -> str:
        """Publish one event; returns when it is durable, or joins the unit of work that is open and commits with it.

        Inside a workflow function it is a recorded step: a replay does not publish again, and a repetition after a
        crash has the same event id. An event that is published outside any conversation starts one, with its id.

        Returns:
            The event's id, which is `Metadata.id` where it is handled.

        Raises:
            PublishError: the broker did not confirm it in time (only without an outbox).
            TypeError: it is no event with a type, or JSON cannot hold a value of it, or (on the transport `memory`, in
                tests) a value would not come back equal.
        """
        (id_,) = await self.publish_batch((event,))
        return id_

    async def publish_batch(self, events: Sequence[Event]) -> list[str]:
        """Publish events together, in their order: one step in a workflow, one commit, few requests to a broker.

        With the `sql` transport or the outbox it is all of them or none. Raises what `publish` does.

        Returns:
            The ids of the events, in their order.
        """
        if not events:
            return []
        definitions = [definition_of(type(event)) for event in events]
        if self._settings.transport == "memory":  # a look at every value is for tests
            for event in events:
                codec_of(type(event)).compare(event)

        ids: list[UUID] = []

        async def effect(key: str | None) -> None:
            began = self._clock.monotonic()
            ids[:] = _ids(key, len(events))
            if self._spans is None:
                await self._send(self._encoded(events, definitions, ids, current()))
            else:
                topics = {self._settings.topic_of(definition) for definition in definitions}
                with self._spans.publishing(topics, ids) as context:
                    await self._send(self._encoded(events, definitions, ids, context))
            PUBLISHED_SECONDS.observe(self._clock.monotonic() - began)
            for definition in definitions:
                published(definition.type).inc()

        name = f"publish:{','.join(dict.fromkeys(definition.type for definition in definitions))}"
        key = await once(name, effect, transactional=self._transactional, arguments=lambda: events)
        return [str(id_) for id_ in ids or _ids(key, len(events))]  # none were made where a replay published nothing

    def _encoded(
        self, events: Sequence[Event], definitions: Sequence[EventDefinition], ids: Sequence[UUID], context: Context
    ) -> list[Outgoing]:
        settings = self._settings
        shared = envelope(time=self._clock.now(), source=settings.source, context=context)
        return [
            encode(event, id=id_, topic=settings.topic_of(definition), shared=shared)
            for event, id_, definition in zip(events, ids, definitions, strict=True)
        ]


def _ids(key: str | None, count: int) -> list[UUID]:
    """Ids for events: new ones, or those that a step of a workflow always gives them."""
    return [uuid7() if key is None else derived_id(f"{key}:{index}") for index in range(count)]
