"""The event classes that this process has imported, by what they are called on the wire."""

from __future__ import annotations

from collections.abc import Iterator

from mainstay.events._codec import codec_of
from mainstay.events._routes import unreadable
from mainstay.events.errors import DecodeError
from mainstay.events.event import Event
from mainstay.events.metadata import kind_named

EventClass = type[Event]


def declared(type: str, major: int | None = None) -> list[EventClass]:
    """The classes of a type, of one major version or of the newest that there is; the newest minor version first."""
    found = [(each.__event__.version, each) for each in _every(Event) if each.__event__ and each.__event__.type == type]
    wanted = max((version.major for version, _ in found), default=0) if major is None else major
    of_major = [(version, each) for version, each in found if version.major == wanted]
    return [each for _, each in sorted(of_major, key=lambda pair: pair[0], reverse=True)]


def _every(base: EventClass) -> Iterator[EventClass]:
    for each in base.__subclasses__():
        yield each
        yield from _every(each)


def read(type: str, major: int, value: bytes) -> Event:
    """An event, by the class that is declared for it.

    Raises:
        DecodeError: there is none, or it cannot read the event; the message names the fields, never their values.
    """
    classes = declared(type, major)
    if not classes:
        msg = f"no class is declared here for {kind_named(type, major)}"
        raise DecodeError(msg)
    try:
        event: Event = codec_of(classes[0]).read(value)
    except Exception as invalid:  # noqa: BLE001  an event's own validator may raise anything
        raise unreadable(type, invalid) from None
    return event
