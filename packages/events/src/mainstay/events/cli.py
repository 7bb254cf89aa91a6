"""`mainstay events`: looks at dead letters and refused events, and sends them again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, TypeVar
from uuid import UUID

import typer

from mainstay.cli import as_json, document, say, settings_of, table
from mainstay.core import App, ConfigurationError
from mainstay.database import DatabaseModule
from mainstay.events.dead_letters import DeadLetter, DeadLetters
from mainstay.events.errors import RedriveError
from mainstay.events.module import EventsModule
from mainstay.events.refused import RefusedEvents
from mainstay.events.settings import EventsSettings

__all__ = ["commands"]

T = TypeVar("T")

_ALL = 1_000_000
_MOST = 2**31 - 1  # no database takes a number without a limit

commands = typer.Typer(no_args_is_help=True, help="Events: what could not be handled, and sending it again.")
dead_letters = typer.Typer(no_args_is_help=True, help="Events that could not be handled.")
commands.add_typer(dead_letters, name="dead-letters")
refused = typer.Typer(no_args_is_help=True, help="Events that the broker refused for good.")
commands.add_typer(refused, name="refused")

Group = Annotated[str | None, typer.Option(help="Of this consumer group only.")]


@dead_letters.command("list")
def list_letters(
    group: Group = None, limit: Annotated[int, typer.Option(min=1, max=_MOST, help="At most so many.")] = 100
) -> None:
    """The dead letters, the oldest first."""
    letters = _with(lambda store: store.list(group, limit=limit))
    table(("id", "time", "group", "type", "error"), [_row(letter) for letter in letters], empty="no dead letters")


@dead_letters.command("show")
def show_letter(id: UUID) -> None:
    """Everything about one."""
    letter = _with(lambda store: store.get(id))
    facts = _facts(letter)
    if as_json():
        document(facts)
        return
    for name, value in facts.items():
        lines = [f"{key}: {text}" for key, text in value] if name == "headers" else str(value).splitlines() or [""]
        say(f"{name:9} {lines[0] if lines else ''}", *(f"{'':9} {line}" for line in lines[1:]))


@dead_letters.command("redrive")
def redrive_letters(
    ids: Annotated[list[UUID] | None, typer.Argument(metavar="ID…", help="Which.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every one that is there now.")] = False,
    group: Group = None,
) -> None:
    """Send again, to the group that failed and to no other."""
    if bool(ids) == every:
        msg = "name the dead letters to send again, or pass --all"
        raise typer.BadParameter(msg)

    sent: list[DeadLetter] = []

    async def redrive(store: DeadLetters) -> None:
        chosen = [letter.id for letter in await store.list(group, limit=_ALL)] if every else ids or []
        for letter_id in chosen:
            try:
                letter = await store.redrive(letter_id)
            except RedriveError:
                if not every:
                    raise
                continue  # another did it meanwhile, which is all that was asked for
            sent.append(letter)
            say(f"sent again: {letter.id} to group {letter.group}")

    try:
        _with(redrive)
    finally:  # also what was sent before one could not be
        if as_json():
            document([{"id": letter.id, "group": letter.group} for letter in sent])


@refused.command("list")
def list_refused(limit: Annotated[int, typer.Option(min=1, max=_MOST, help="At most so many.")] = 100) -> None:
    """The refused events, the oldest first."""
    events = _with_refused(lambda refused: refused.list(limit=limit))
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
    _each(ids, lambda refused, event: refused.retry(event), "to be sent again")


@refused.command("discard")
def discard_refused(ids: Annotated[list[int], typer.Argument(metavar="ID…", help="Which.")]) -> None:
    """Delete for good."""
    _each(ids, lambda refused, event: refused.discard(event), "discarded")


def _each(ids: list[int], work: Callable[[RefusedEvents, int], Awaitable[None]], what: str) -> None:
    done: list[int] = []

    async def all_of_them(refused: RefusedEvents) -> None:
        for event in ids:
            await work(refused, event)
            done.append(event)
            say(f"{what}: {event}")

    try:
        _with_refused(all_of_them)
    finally:  # also what was done before one could not be
        if as_json():
            document([{"id": event} for event in done])


def _with_refused(work: Callable[[RefusedEvents], Awaitable[T]]) -> T:
    settings = settings_of(EventsModule)
    if not (settings.transport == "kafka" and settings.writes_database):
        msg = "only the outbox in front of Kafka keeps events that were refused"
        raise ConfigurationError(msg)
    return _running(settings, lambda app: work(app.get(RefusedEvents)))


def _with(work: Callable[[DeadLetters], Awaitable[T]]) -> T:
    settings = settings_of(EventsModule)
    if settings.transport == "memory":
        msg = "the memory transport keeps nothing for other processes"
        raise ConfigurationError(msg)
    return _running(settings, lambda app: work(app.get(DeadLetters)))


def _running(settings: EventsSettings, work: Callable[[App], Awaitable[T]]) -> T:
    modules: list[Any] = []
    if settings.writes_database:
        database = settings_of(DatabaseModule).model_copy(update={"migrate": False})
        modules.append(DatabaseModule.for_root(database))

    async def run() -> T:
        async with App(*modules, EventsModule.for_root(settings)) as app:
            return await work(app)

    return asyncio.run(run())


def _row(letter: DeadLetter) -> dict[str, Any]:
    return {
        "id": letter.id,
        "time": f"{letter.time:%Y-%m-%d %H:%M:%S}",
        "group": letter.group,
        "type": letter.type or "(no type)",
        "error": _last_words(letter.error),
    }


def _last_words(error: str) -> str:
    """The exception below its traceback, all lines of its message: the last one alone may be anything."""
    lines = error.split("\n")
    below = max((number for number, line in enumerate(lines, 1) if line.startswith("  ")), default=0)
    return "\n".join(lines[below:]) or lines[-1]


def _facts(letter: DeadLetter) -> dict[str, Any]:
    return {
        "id": letter.id,
        "group": letter.group,
        "read at": f"{letter.topic}/{letter.partition}@{letter.offset}",
        "given up": f"{letter.time:%Y-%m-%d %H:%M:%S %Z} after {letter.attempts} attempts",
        "key": _text(letter.key),
        "headers": [(name, _text(value)) for name, value in letter.headers],
        "value": _text(letter.value),
        "error": letter.error,
    }


def _text(value: bytes | None) -> str:
    return "(none)" if value is None else value.decode(errors="backslashreplace")
