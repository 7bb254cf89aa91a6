"""`mainstay events`: looks at what could not be handled, has it tried again, or clears it away."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Annotated, Any, TypeVar
from uuid import UUID

import typer

from mainstay.cli import as_json, document, say, settings_of, table
from mainstay.core import App, ConfigurationError
from mainstay.database import DatabaseModule
from mainstay.events.dead_letters import DeadLetter, DeadLetters
from mainstay.events.errors import RedriveError
from mainstay.events.module import EventsModule
from mainstay.events.parked import ParkedKey, ParkedKeys
from mainstay.events.refused import RefusedEvents
from mainstay.events.settings import EventsSettings

__all__ = ["commands"]

S = TypeVar("S", DeadLetters, ParkedKeys)
T = TypeVar("T")

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


@dead_letters.command("list")
def list_letters(
    group: Group = None, limit: Annotated[int, typer.Option(min=1, max=_MOST, help="At most so many.")] = 100
) -> None:
    """The dead letters, the oldest first."""
    letters = _with(DeadLetters, lambda store: store.list(group, limit=limit))
    table(("id", "time", "group", "type", "error"), [_row(letter) for letter in letters], empty="no dead letters")


@dead_letters.command("show")
def show_letter(id: UUID) -> None:
    """Everything about one."""
    _show(_facts(_with(DeadLetters, lambda store: store.get(id))))


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
        _with(DeadLetters, redrive)
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


@parked.command("list")
def list_parked(
    group: Group = None, limit: Annotated[int, typer.Option(min=1, max=_MOST, help="At most so many.")] = 100
) -> None:
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
    _to_each(ids, ParkedKeys.retry, "tried again")


@parked.command("skip")
def skip_parked(ids: Ids) -> None:
    """Make the first event of keys a dead letter, and have the others tried."""
    _to_each(ids, ParkedKeys.skip, "without its first event, tried again")


@parked.command("discard")
def discard_parked(ids: Ids) -> None:
    """Delete the whole queues of keys, unhandled."""
    _to_each(ids, ParkedKeys.discard, "discarded")


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


def _to_each(ids: Sequence[UUID], act: Callable[[ParkedKeys, UUID], Awaitable[ParkedKey]], what: str) -> None:
    done: list[ParkedKey] = []

    async def each(store: ParkedKeys) -> None:
        for parked_id in ids:
            done.append(await act(store, parked_id))
            say(f"{what}: {parked_id}, key {_text(done[-1].key)} in group {done[-1].group}")

    try:
        _with(ParkedKeys, each)
    finally:  # also what was done before one could not be
        if as_json():
            document([{"id": key.id, "group": key.group, "key": _text(key.key)} for key in done])


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
    return _running(
        settings, lambda app: work(app.get(service)), database=settings.writes_database or service is ParkedKeys
    )


def _running(settings: EventsSettings, work: Callable[[App], Awaitable[T]], *, database: bool = True) -> T:
    modules: list[Any] = []
    if database:
        looking = settings_of(DatabaseModule).model_copy(update={"migrate": False})
        modules.append(DatabaseModule.for_root(looking))

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
