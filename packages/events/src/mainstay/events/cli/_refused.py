"""`mainstay events refused`: events that the broker refused for good."""

from __future__ import annotations

from typing import Annotated

import typer

from mainstay.cli import table
from mainstay.events.cli._options import Limit
from mainstay.events.cli._service import Done, to_each, with_service
from mainstay.events.refused import RefusedEvents

refused = typer.Typer(no_args_is_help=True, help="Events that the broker refused for good.")


@refused.command("list")
def list_refused(limit: Limit = 100) -> None:
    """The refused events, the oldest first."""
    events = with_service(RefusedEvents, lambda refused: refused.list(limit=limit))
    rows = [
        {
            "id": event.id,
            "published": f"{event.published_at:%Y-%m-%d %H:%M:%S}",
            "topic": event.topic,
            "type": event.type or "(no type)",
            "bytes": len(event.value or b""),
            "reason": event.reason,
        }
        for event in events
    ]
    table(("id", "published", "topic", "type", "bytes", "reason"), rows, empty="no refused events")


@refused.command("retry")
def retry_refused(ids: Annotated[list[int], typer.Argument(metavar="ID…", help="Which.")]) -> None:
    """Send again, after the topic was told to take them."""

    async def retry(refused: RefusedEvents, id: int) -> Done:
        await refused.retry(id)
        return f"to be sent again: {id}", {"id": id}

    to_each(RefusedEvents, ids, retry)


@refused.command("discard")
def discard_refused(ids: Annotated[list[int], typer.Argument(metavar="ID…", help="Which.")]) -> None:
    """Delete for good."""

    async def discard(refused: RefusedEvents, id: int) -> Done:
        await refused.discard(id)
        return f"discarded: {id}", {"id": id}

    to_each(RefusedEvents, ids, discard)
