"""`mainstay events scheduled`: events that were published for later and wait for their time."""

from __future__ import annotations

from uuid import UUID

import typer

from mainstay.cli import table
from mainstay.events.cli._options import Ids, Key, Limit, Type
from mainstay.events.cli._service import Done, text_of, to_each, with_service
from mainstay.events.scheduled import ScheduledEvents

scheduled = typer.Typer(no_args_is_help=True, help="Events that were published for later.")


@scheduled.command("list")
def list_scheduled(*, type: Type = None, key: Key = None, limit: Limit = 100) -> None:
    """The events that wait for their time, the next one first."""
    events = with_service(ScheduledEvents, lambda waiting: waiting.list(type=type, key=key, limit=limit))
    rows = [
        {
            "id": event.id,
            "due": f"{event.due:%Y-%m-%d %H:%M:%S}",
            "published": f"{event.published_at:%Y-%m-%d %H:%M:%S}",
            "topic": event.topic,
            "type": event.type,
            "key": text_of(event.key),
        }
        for event in events
    ]
    table(("id", "due", "published", "topic", "type", "key"), rows, empty="no scheduled events")


@scheduled.command("cancel")
def cancel_scheduled(ids: Ids) -> None:
    """Delete what waits: it will not be handed on."""

    async def cancel(waiting: ScheduledEvents, id: UUID) -> Done:
        event = await waiting.cancel(str(id))
        return f"cancelled: {id}, {event.type} with key {text_of(event.key)}", {"id": id, "type": event.type}

    to_each(ScheduledEvents, ids, cancel)
