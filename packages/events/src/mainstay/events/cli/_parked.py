"""`mainstay events parked`: keys that wait behind an event that could not be handled."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated
from uuid import UUID

import typer

from mainstay.cli import as_json, document, say, table
from mainstay.events.cli._options import Group, Ids, Limit
from mainstay.events.cli._service import Done, last_words, show, text_of, to_each, with_service
from mainstay.events.parked import ParkedKey, ParkedKeys

parked = typer.Typer(no_args_is_help=True, help="Keys that wait behind an event that could not be handled.")


@parked.command("list")
def list_parked(group: Group = None, limit: Limit = 100) -> None:
    """The parked keys, those that have been failing for the longest first."""
    keys = with_service(ParkedKeys, lambda store: store.list(group, limit=limit))
    rows = [
        {
            "id": each.id,
            "since": f"{each.since:%Y-%m-%d %H:%M:%S}",
            "group": each.group,
            "key": text_of(each.key),
            "waiting": each.waiting,
            "kind": each.kind,
            "alone": each.alone,
            "due": None if each.due is None else f"{each.due:%Y-%m-%d %H:%M:%S}",
            "error": last_words(each.error),
        }
        for each in keys
    ]
    table(("id", "since", "group", "key", "waiting", "error"), rows, empty="no parked keys")


@parked.command("show")
def show_parked(id: UUID) -> None:
    """Everything about one."""
    key = with_service(ParkedKeys, lambda store: store.get(id))
    due = "when told to" if key.due is None else f"{key.due:%Y-%m-%d %H:%M:%S %Z}"
    due = "once it is resumed" if key.paused else due
    show(
        {
            "id": key.id,
            "group": key.group,
            "read from": f"{key.topic}/{key.partition}",
            "key": text_of(key.key),
            "waiting": f"{key.waiting}, by itself: its key goes on" if key.alone else key.waiting,
            "kind": key.kind or "(no type)",
            "failing": f"since {key.since:%Y-%m-%d %H:%M:%S %Z}",
            "again": f"{due}, attempt {key.attempt}",
            "error": key.error,
        }
    )


@parked.command("retry")
def retry_parked(ids: Ids) -> None:
    """Have the events of keys tried again, each from its first one on."""
    to_each(ParkedKeys, ids, _parked(ParkedKeys.retry, "tried again"))


@parked.command("skip")
def skip_parked(ids: Ids) -> None:
    """Make the first event of keys a dead letter, and have the others tried."""
    to_each(ParkedKeys, ids, _parked(ParkedKeys.skip, "without its first event, tried again"))


@parked.command("discard")
def discard_parked(ids: Ids) -> None:
    """Delete the whole queues of keys, unhandled."""
    to_each(ParkedKeys, ids, _parked(ParkedKeys.discard, "discarded"))


@parked.command("forget")
def forget_kind(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="Type and major version, like 'order.paid 1.x'.")],
    group: Annotated[str, typer.Option(help="The consumer group.")],
) -> None:
    """Let no event of a kind wait any more for a process that handles it: none will."""
    with_service(ParkedKeys, lambda store: store.forget(group, kind))
    say(f"forgotten: {kind} in group {group}")
    if as_json():
        document({"group": group, "kind": kind})


def _parked(
    act: Callable[[ParkedKeys, UUID], Awaitable[ParkedKey]], what: str
) -> Callable[[ParkedKeys, UUID], Awaitable[Done]]:
    async def acted(store: ParkedKeys, id: UUID) -> Done:
        key = await act(store, id)
        text = text_of(key.key)
        return f"{what}: {id}, key {text} in group {key.group}", {"id": id, "group": key.group, "key": text}

    return acted
