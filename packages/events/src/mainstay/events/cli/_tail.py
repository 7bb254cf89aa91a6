"""`mainstay events tail` and `publish`: the events of topics as they are kept, and one more of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from mainstay.cli import as_json, document, json_line, named_app, needed_app, say, settings_of
from mainstay.core import ConfigurationError
from mainstay.events._declared import declared, read
from mainstay.events._decoding import NO_EVENT
from mainstay.events._members import exact
from mainstay.events.cli._options import Correlation, Key, Type
from mainstay.events.cli._service import in_utc, to_publish, with_log
from mainstay.events.errors import DecodeError
from mainstay.events.event import definition_of
from mainstay.events.log import EventLog, LoggedEvent
from mainstay.events.metadata import VERSION, Metadata
from mainstay.events.module import EventsModule

_LONGEST = 2000
"""Characters of a value that are shown to a person."""


def tail(
    topics: Annotated[list[str], typer.Argument(metavar="TOPIC…", help="Where to look.")],
    *,
    type: Type = None,
    key: Key = None,
    correlation: Correlation = None,
    since: Annotated[datetime | None, typer.Option(help="The first ones from this moment on, in UTC.")] = None,
    until: Annotated[datetime | None, typer.Option(help="Written before this moment, in UTC.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what comes, until Ctrl-C.")] = False,
    limit: Annotated[int, typer.Option(min=1, max=1_000_000, help="At most so many; the newest without --since.")] = 20,
) -> None:
    """Events of topics, read without a group: no place of any is moved. With --app they are read by their classes."""
    if follow and until is not None:
        msg = "--follow goes on without end: leave out --until"
        raise typer.BadParameter(msg)
    typed = named_app() is not None
    sought: dict[str, Any] = {"type": type, "key": key, "correlation_id": correlation}

    async def look(log: EventLog) -> None:
        if follow:
            async for event in log.follow(topics, since=in_utc(since), limit=limit, **sought):
                _print(event, log if typed else None)
                sys.stdout.flush()
            return
        await _are_there(log, topics)
        if since is None:
            found = await log.newest(topics, until=in_utc(until), limit=limit, **sought)
        else:
            found = await log.since(topics, since.replace(tzinfo=UTC), until=in_utc(until), limit=limit, **sought)
        for event in found:
            _print(event, log if typed else None)
        if not found:
            say("no events")

    with_log(look)


async def _are_there(log: EventLog, topics: Sequence[str]) -> None:
    missing = [each.name for each in await log.topics(topics) if each.missing]
    if missing:
        msg = f"there is no topic {', '.join(missing)}: mainstay events topics lists those that there are"
        raise ConfigurationError(msg)


def _print(event: LoggedEvent, log: EventLog | None) -> None:
    meta = event.meta
    read_as, why_not = (None, None) if log is None else _read(event, log)
    if as_json():
        json_line(
            {
                "time": meta.time,
                "written_at": event.written_at,
                "topic": meta.topic,
                "partition": meta.partition,
                "offset": meta.offset,
                "type": meta.type,
                "version": _version(meta),
                "id": meta.id,
                "source": meta.source,
                "key": meta.key,
                "correlation_id": meta.correlation_id,
                "causation_id": meta.causation_id,
                "value": _value(event.value),
                **({"event": read_as and read_as.model_dump(mode="json"), "unreadable": why_not} if log else {}),
            }
        )
        return
    key = "without key" if meta.key is None else f"key {meta.key}"
    raw = "(no value)" if event.value is None else event.value.decode(errors="backslashreplace")
    text = raw if read_as is None else repr(read_as)
    cut = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… ({len(text)} characters; --json shows all)"
    say(
        f"{meta.time or event.written_at:%Y-%m-%d %H:%M:%S}  {meta.type or '(no type)'} {_version(meta)}  {key}",
        f"    {meta.topic}/{meta.partition}@{meta.offset}  id {meta.id or '(none)'}",
        *([f"    correlation {meta.correlation_id}"] if meta.correlation_id not in {None, meta.id} else []),
        f"    {cut}",
        *([f"    {why_not}"] if why_not else []),
    )


def _version(meta: Metadata) -> str:
    return (meta.headers.get(VERSION) or b"").decode(errors="replace")


def _value(value: bytes | None) -> object:
    if value is None:
        return None
    try:
        return json.loads(exact(value.decode()))  # an amount is shown as it was written, not as a float holds it
    except (ValueError, RecursionError):
        return value.decode(errors="backslashreplace")


def _read(event: LoggedEvent, log: EventLog) -> tuple[Any, str | None]:
    """The event by its class, or why that cannot be; what says nothing is none."""
    if NO_EVENT in event.meta.headers:
        return None, None
    try:
        return log.read(event), None
    except DecodeError as error:
        return None, str(error)


def publish(
    type: Annotated[str, typer.Argument(metavar="TYPE", help="Such as order.paid; its newest version is taken.")],
    file: Annotated[str, typer.Option("--file", help="The event as JSON; - reads it from standard input.")],
) -> None:
    """Publish an event, after its class has read it, as the service itself would. Needs --app."""
    app = needed_app()
    classes = declared(type)
    if not classes:
        msg = f"the App declares no event of type {type}: its module has to import the class"
        raise ConfigurationError(msg)
    event_class = classes[0]
    if len(classes) > 1 and definition_of(classes[1]).version == definition_of(event_class).version:
        places = " and ".join(f"{each.__module__}.{each.__qualname__}" for each in classes[:2])
        msg = f"{type} {definition_of(event_class).version} is declared twice, by {places}: which is it?"
        raise ConfigurationError(msg)
    value = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    version = definition_of(event_class).version
    event = read(type, version.major, value)
    published = to_publish(app, event)
    topic = settings_of(EventsModule).topic_of(definition_of(event_class))
    say(f"published: {published}, {type} {version} on topic {topic}")
    if as_json():
        document({"id": published, "type": type, "version": str(version), "topic": topic})
