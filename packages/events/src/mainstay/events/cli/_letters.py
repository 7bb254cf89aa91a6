"""`mainstay events dead-letters`: events that could not be handled."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal
from uuid import UUID

import typer

from mainstay.cli import as_json, document, say, table
from mainstay.events.cli._options import By, Correlation, Group, Ids, Key, Limit, Since, Type, Until
from mainstay.events.cli._service import Done, in_app, in_utc, last_words, show, text_of, to_each, user, with_service
from mainstay.events.dead_letters import DeadLetter, DeadLetters
from mainstay.events.errors import RedriveError

_ALL = 1_000_000

dead_letters = typer.Typer(no_args_is_help=True, help="Events that could not be handled.")


@dead_letters.command("list")
def list_letters(
    group: Group = None,
    *,
    type: Type = None,
    key: Key = None,
    correlation: Correlation = None,
    since: Since = None,
    until: Until = None,
    state: Annotated[
        Literal["waiting", "redriven", "discarded", "all"], typer.Option(help="In this state.")
    ] = "waiting",
    limit: Limit = 100,
) -> None:
    """The dead letters, the oldest first."""
    letters = with_service(
        DeadLetters,
        lambda store: store.list(
            group,
            type=type,
            key=key,
            correlation_id=correlation,
            since=in_utc(since),
            until=in_utc(until),
            state=None if state == "all" else state,
            limit=limit,
        ),
    )
    columns = ("id", "time", "group", "type", "error", *(("state",) if state == "all" else ()))
    table(columns, [_row(letter) for letter in letters], empty="no dead letters")


@dead_letters.command("show")
def show_letter(id: UUID) -> None:
    """Everything about one."""
    show(_facts(with_service(DeadLetters, lambda store: store.get(id))))


@dead_letters.command("redrive")
def redrive_letters(
    ids: Annotated[list[UUID] | None, typer.Argument(metavar="ID…", help="Which.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every one that waits now.")] = False,
    group: Group = None,
    by: By = None,
) -> None:
    """Send again, to the group that failed and to no other."""
    if bool(ids) == every:
        msg = "name the dead letters to send again, or pass --all"
        raise typer.BadParameter(msg)

    async def chosen(store: DeadLetters) -> Sequence[UUID]:
        return [letter.id for letter in await store.list(group, limit=_ALL)] if every else ids or []

    async def redrive(store: DeadLetters, id: UUID) -> Done | None:
        try:
            letter = await store.redrive(id, by=by or user())
        except RedriveError:
            if not every:
                raise
            return None  # another did it meanwhile, which is all that was asked for
        return f"sent again: {id} to group {letter.group}", {"id": id, "group": letter.group}

    to_each(DeadLetters, chosen, redrive)


@dead_letters.command("discard")
def discard_letters(
    ids: Ids, reason: Annotated[str, typer.Option(help="Why, for those who ask later.")], by: By = None
) -> None:
    """Say that they are not to be handled."""

    async def discard(store: DeadLetters, id: UUID) -> Done:
        letter = await store.discard(id, reason=reason, by=by or user())
        return f"discarded: {id} of group {letter.group}", {"id": id, "group": letter.group}

    to_each(DeadLetters, ids, discard)


@dead_letters.command("edit")
def edit_letter(
    id: UUID,
    file: Annotated[str, typer.Argument(help="The event as JSON; - reads it from standard input.")],
    by: By = None,
) -> None:
    """Replace the value of one, after the class that its group handles has read it. Needs --app."""
    value = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()

    async def edit(store: DeadLetters) -> DeadLetter:
        return await store.edit(id, value, by=by or user())

    show(_facts(in_app(edit)))


@dead_letters.command("try")
def try_letter(
    id: UUID,
    handler: Annotated[
        bool, typer.Option("--handler", help="Call its handler, too; what that writes to the Database is rolled back.")
    ] = False,
) -> None:
    """Read one as its group does, and send nothing. Needs --app."""
    event = in_app(lambda store: store.dry_run(id, handler=handler))
    if as_json():
        document({"id": id, "event": event.model_dump(mode="json")})
    else:
        say(f"{'handled' if handler else 'read'}: {event!r}")


def _row(letter: DeadLetter) -> dict[str, Any]:
    return {
        "id": letter.id,
        "time": f"{letter.time:%Y-%m-%d %H:%M:%S}",
        "group": letter.group,
        "type": letter.type or "(no type)",
        "error": last_words(letter.error),
        "state": letter.state,
    }


def _facts(letter: DeadLetter) -> dict[str, Any]:
    changed = "" if letter.changed_at is None else f", last changed {letter.changed_at:%Y-%m-%d %H:%M:%S %Z}"
    facts = {
        "id": letter.id,
        "group": letter.group,
        "read at": f"{letter.topic}/{letter.partition}@{letter.offset}",
        "given up": f"{letter.time:%Y-%m-%d %H:%M:%S %Z} after {letter.attempts} attempts",
        "state": f"{letter.state}{changed}{f' by {letter.changed_by}' if letter.changed_by else ''}",
        "key": text_of(letter.key),
        "headers": [(name, text_of(value)) for name, value in letter.headers],
        "value": text_of(letter.value),
        "error": letter.error,
    }
    if letter.reason:
        facts["reason"] = letter.reason
    if letter.edited:
        facts["received"] = text_of(letter.received)
    return facts
