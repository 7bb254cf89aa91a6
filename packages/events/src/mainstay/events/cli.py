"""`mainstay events`: looks at what could not be handled, has it tried again, or clears it away."""

from __future__ import annotations

import asyncio
import getpass
import os
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from uuid import UUID

import typer

from mainstay.cli import as_json, document, needed_app, say, settings_of, table
from mainstay.core import App, ConfigurationError
from mainstay.database import DatabaseModule
from mainstay.events.dead_letters import DeadLetter, DeadLetters
from mainstay.events.errors import RedriveError
from mainstay.events.module import EventsModule
from mainstay.events.parked import ParkedKey, ParkedKeys
from mainstay.events.refused import RefusedEvents

__all__ = ["commands"]

S = TypeVar("S", DeadLetters, ParkedKeys, RefusedEvents)
T = TypeVar("T")
I = TypeVar("I")  # noqa: E741  an id, of whichever kind

_ALL = 1_000_000
_MOST = 2**31 - 1  # no database takes a number without a limit

commands = typer.Typer(no_args_is_help=True, help="Events: what could not be handled, and sending it again.")
dead_letters = typer.Typer(no_args_is_help=True, help="Events that could not be handled.")
commands.add_typer(dead_letters, name="dead-letters")
refused = typer.Typer(no_args_is_help=True, help="Events that the broker refused for good.")
commands.add_typer(refused, name="refused")
parked = typer.Typer(no_args_is_help=True, help="Keys that wait behind an event that could not be handled.")
commands.add_typer(parked, name="parked")

Ids = Annotated[list[UUID], typer.Argument(metavar="ID…", help="Which.")]
Group = Annotated[str | None, typer.Option(help="Of this consumer group only.")]
Limit = Annotated[int, typer.Option(min=1, max=_MOST, help="At most so many.")]
Type = Annotated[str | None, typer.Option(help="With events of this type only.")]
Key = Annotated[str | None, typer.Option(help="With this key only.")]
Correlation = Annotated[str | None, typer.Option(help="Of this conversation only, by its correlation id.")]
Since = Annotated[datetime | None, typer.Option(help="Given up from this moment on, in UTC.")]
Until = Annotated[datetime | None, typer.Option(help="Given up before this moment, in UTC.")]
By = Annotated[str | None, typer.Option(help="Who does it; the user of this terminal by default.")]

# Dead letters


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
    letters = _with(
        DeadLetters,
        lambda store: store.list(
            group,
            type=type,
            key=key,
            correlation_id=correlation,
            since=_in_utc(since),
            until=_in_utc(until),
            state=None if state == "all" else state,
            limit=limit,
        ),
    )
    columns = ("id", "time", "group", "type", "error", *(("state",) if state == "all" else ()))
    table(columns, [_row(letter) for letter in letters], empty="no dead letters")


@dead_letters.command("show")
def show_letter(id: UUID) -> None:
    """Everything about one."""
    _show(_facts(_with(DeadLetters, lambda store: store.get(id))))


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
            letter = await store.redrive(id, by=by or _user())
        except RedriveError:
            if not every:
                raise
            return None  # another did it meanwhile, which is all that was asked for
        return f"sent again: {id} to group {letter.group}", {"id": id, "group": letter.group}

    _to_each(DeadLetters, chosen, redrive)


@dead_letters.command("discard")
def discard_letters(
    ids: Ids, reason: Annotated[str, typer.Option(help="Why, for those who ask later.")], by: By = None
) -> None:
    """Say that they are not to be handled."""

    async def discard(store: DeadLetters, id: UUID) -> Done:
        letter = await store.discard(id, reason=reason, by=by or _user())
        return f"discarded: {id} of group {letter.group}", {"id": id, "group": letter.group}

    _to_each(DeadLetters, ids, discard)


@dead_letters.command("edit")
def edit_letter(
    id: UUID,
    file: Annotated[str, typer.Argument(help="The event as JSON; - reads it from standard input.")],
    by: By = None,
) -> None:
    """Replace the value of one, after the class that its group handles has read it. Needs --app."""
    value = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()

    async def edit(store: DeadLetters) -> DeadLetter:
        return await store.edit(id, value, by=by or _user())

    _show(_facts(_in_app(edit)))


@dead_letters.command("try")
def try_letter(
    id: UUID,
    handler: Annotated[
        bool, typer.Option("--handler", help="Call its handler, too; what that writes to the Database is rolled back.")
    ] = False,
) -> None:
    """Read one as its group does, and send nothing. Needs --app."""
    event = _in_app(lambda store: store.dry_run(id, handler=handler))
    if as_json():
        document({"id": id, "event": event.model_dump(mode="json")})
    else:
        say(f"{'handled' if handler else 'read'}: {event!r}")


# Refused events


@refused.command("list")
def list_refused(limit: Limit = 100) -> None:
    """The refused events, the oldest first."""
    events = _with(RefusedEvents, lambda refused: refused.list(limit=limit))
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

    _to_each(RefusedEvents, ids, retry)


@refused.command("discard")
def discard_refused(ids: Annotated[list[int], typer.Argument(metavar="ID…", help="Which.")]) -> None:
    """Delete for good."""

    async def discard(refused: RefusedEvents, id: int) -> Done:
        await refused.discard(id)
        return f"discarded: {id}", {"id": id}

    _to_each(RefusedEvents, ids, discard)


# Parked keys


@parked.command("list")
def list_parked(group: Group = None, limit: Limit = 100) -> None:
    """The parked keys, those that have been failing for the longest first."""
    keys = _with(ParkedKeys, lambda store: store.list(group, limit=limit))
    rows = [
        {
            "id": each.id,
            "since": f"{each.since:%Y-%m-%d %H:%M:%S}",
            "group": each.group,
            "key": _text(each.key),
            "waiting": each.waiting,
            "kind": each.kind,
            "error": _last_words(each.error),
        }
        for each in keys
    ]
    table(("id", "since", "group", "key", "waiting", "error"), rows, empty="no parked keys")


@parked.command("show")
def show_parked(id: UUID) -> None:
    """Everything about one."""
    key = _with(ParkedKeys, lambda store: store.get(id))
    due = "when told to" if key.due is None else f"{key.due:%Y-%m-%d %H:%M:%S %Z}"
    _show(
        {
            "id": key.id,
            "group": key.group,
            "read from": f"{key.topic}/{key.partition}",
            "key": _text(key.key),
            "waiting": key.waiting,
            "kind": key.kind or "(no type)",
            "failing": f"since {key.since:%Y-%m-%d %H:%M:%S %Z}",
            "again": f"{due}, attempt {key.attempt}",
            "error": key.error,
        }
    )


@parked.command("retry")
def retry_parked(ids: Ids) -> None:
    """Have the events of keys tried again, each from its first one on."""
    _to_each(ParkedKeys, ids, _parked(ParkedKeys.retry, "tried again"))


@parked.command("skip")
def skip_parked(ids: Ids) -> None:
    """Make the first event of keys a dead letter, and have the others tried."""
    _to_each(ParkedKeys, ids, _parked(ParkedKeys.skip, "without its first event, tried again"))


@parked.command("discard")
def discard_parked(ids: Ids) -> None:
    """Delete the whole queues of keys, unhandled."""
    _to_each(ParkedKeys, ids, _parked(ParkedKeys.discard, "discarded"))


@parked.command("forget")
def forget_kind(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="Type and major version, like 'order.paid 1.x'.")],
    group: Annotated[str, typer.Option(help="The consumer group.")],
) -> None:
    """Let no event of a kind wait any more for a process that handles it: none will."""
    _with(ParkedKeys, lambda store: store.forget(group, kind))
    say(f"forgotten: {kind} in group {group}")
    if as_json():
        document({"group": group, "kind": kind})


def _parked(
    act: Callable[[ParkedKeys, UUID], Awaitable[ParkedKey]], what: str
) -> Callable[[ParkedKeys, UUID], Awaitable[Done]]:
    async def acted(store: ParkedKeys, id: UUID) -> Done:
        key = await act(store, id)
        text = _text(key.key)
        return f"{what}: {id}, key {text} in group {key.group}", {"id": id, "group": key.group, "key": text}

    return acted


# What all of them are made of

Done = tuple[str, Mapping[str, Any]]
"""What was done, for a person and for a program."""


def _to_each(
    service: type[S],
    ids: Sequence[I] | Callable[[S], Awaitable[Sequence[I]]],
    act: Callable[[S, I], Awaitable[Done | None]],
) -> None:
    """Do something to each of them, and say so one by one: also what was done before one could not be."""
    done: list[Mapping[str, Any]] = []

    async def each(store: S) -> None:
        for one in await ids(store) if callable(ids) else ids:
            result = await act(store, one)
            if result is not None:
                text, facts = result
                done.append(facts)
                say(text)

    try:
        _with(service, each)
    finally:
        if as_json():
            document(done)


def _show(facts: Mapping[str, Any]) -> None:
    if as_json():
        document(facts)
        return
    for name, value in facts.items():
        lines = [f"{key}: {text}" for key, text in value] if name == "headers" else str(value).splitlines() or [""]
        say(f"{name:9} {lines[0] if lines else ''}", *(f"{'':9} {line}" for line in lines[1:]))


def _with(service: type[S], work: Callable[[S], Awaitable[T]]) -> T:
    settings = settings_of(EventsModule)
    if settings.transport == "memory":
        msg = "the memory transport keeps nothing for other processes"
        raise ConfigurationError(msg)
    if service is RefusedEvents and not (settings.transport == "kafka" and settings.writes_database):
        msg = "only the outbox in front of Kafka keeps events that were refused"
        raise ConfigurationError(msg)
    modules: list[Any] = [EventsModule.for_root(settings)]
    if settings.writes_database or service is ParkedKeys:
        looking = settings_of(DatabaseModule).model_copy(update={"migrate": False})
        modules.insert(0, DatabaseModule.for_root(looking))
    return _running(App(*modules), service, work)


def _in_app(work: Callable[[DeadLetters], Awaitable[T]]) -> T:
    """Work in the App that is named, which knows the handlers."""
    app = needed_app()
    for module in app.modules:
        module.only_looking()
    return _running(app, DeadLetters, work)


def _running(app: App, service: type[S], work: Callable[[S], Awaitable[T]]) -> T:
    async def run() -> T:
        async with app:
            return await work(app.get(service))

    return asyncio.run(run())


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        return f"user {os.getuid()}"


def _in_utc(moment: datetime | None) -> datetime | None:
    return None if moment is None else moment.replace(tzinfo=UTC)


def _row(letter: DeadLetter) -> dict[str, Any]:
    return {
        "id": letter.id,
        "time": f"{letter.time:%Y-%m-%d %H:%M:%S}",
        "group": letter.group,
        "type": letter.type or "(no type)",
        "error": _last_words(letter.error),
        "state": letter.state,
    }


def _last_words(error: str) -> str:
    """The exception below its traceback, all lines of its message: the last one alone may be anything."""
    lines = error.split("\n")
    below = max((number for number, line in enumerate(lines, 1) if line.startswith("  ")), default=0)
    return "\n".join(lines[below:]) or lines[-1]


def _facts(letter: DeadLetter) -> dict[str, Any]:
    changed = "" if letter.changed_at is None else f", last changed {letter.changed_at:%Y-%m-%d %H:%M:%S %Z}"
    facts = {
        "id": letter.id,
        "group": letter.group,
        "read at": f"{letter.topic}/{letter.partition}@{letter.offset}",
        "given up": f"{letter.time:%Y-%m-%d %H:%M:%S %Z} after {letter.attempts} attempts",
        "state": f"{letter.state}{changed}{f' by {letter.changed_by}' if letter.changed_by else ''}",
        "key": _text(letter.key),
        "headers": [(name, _text(value)) for name, value in letter.headers],
        "value": _text(letter.value),
        "error": letter.error,
    }
    if letter.reason:
        facts["reason"] = letter.reason
    if letter.edited:
        facts["received"] = _text(letter.received)
    return facts


def _text(value: bytes | None) -> str:
    return "(none)" if value is None else value.decode(errors="backslashreplace")
