"""What travels beside an event: who, when, because of what; and the wire form, CloudEvents 1.0 in Kafka's binary mode.

The value of a record is the event as JSON and nothing else; everything about it is in headers. Any CloudEvents reader
understands them, and a reader of ours needs no parsing of the value to know whether it wants it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache, lru_cache
from typing import NamedTuple, Protocol

from mainstay.core import Context
from mainstay.events._codec import codec_of
from mainstay.events.event import Event, Version, definition_of

__all__ = ["Metadata"]

Headers = Sequence[tuple[str, bytes | None]]
"""Names and values; a foreign producer may write a header without a value."""

ID = "ce_id"
TYPE = "ce_type"
VERSION = "ce_dataversion"
SOURCE = "ce_source"
TIME = "ce_time"
CORRELATION = "ce_correlationid"
CAUSATION = "ce_causationid"
# A redriven event is for the one group that could not handle it: every other group skips it.
UNREADABLE = "mainstay-unreadable"
"""On the stand-in of a record that the client cannot read at all: why."""
ONLY_GROUP = "ce_onlygroup"

_CONTEXT = {
    "correlation_id": CORRELATION,
    "causation_id": CAUSATION,
    "actor": "ce_actor",
    "tenant": "ce_tenant",
    "traceparent": "ce_traceparent",
    "tracestate": "ce_tracestate",
}
OF_CONTEXT = frozenset({ID, *_CONTEXT.values()})
"""The headers of which a handler's context is made."""
_RARE = frozenset(_CONTEXT.values()) - {CORRELATION, CAUSATION}
_ID_BYTES = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._:@/+=-"
_LONGEST_ID = 128


class Record(Protocol):
    """One record of a log, as a transport hands it out."""

    @property
    def topic(self) -> str:
        """Where it is."""
        ...

    @property
    def partition(self) -> int:
        """The part of the topic."""
        ...

    @property
    def offset(self) -> int:
        """Its place there; rises, not by one."""
        ...

    @property
    def key(self) -> bytes | None:
        """What orders it."""
        ...

    @property
    def value(self) -> bytes | None:
        """The event as JSON, if it is one."""
        ...

    @property
    def headers(self) -> Headers:
        """What is known about it."""
        ...


class Outgoing(NamedTuple):
    """One event, encoded, on its way to a transport; without a value only where a record without one is redriven."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: Headers

    @property
    def placing_key(self) -> bytes:
        """What chooses its partition and lane: the key, or the id where it has none, so that those are spread."""
        return (dict(self.headers).get(ID) or b"") if self.key is None else self.key

    @property
    def size(self) -> int:
        """Bytes of key, value and headers."""
        size = len(self.value or b"") + len(self.key or b"")
        for name, value in self.headers:  # a generator would cost four times as much, for each event
            size += len(name) + len(value or b"")
        return size


class Metadata:
    """What is known about one event while a handler has it.

    Everything but `attempt` and `group` is read from the record when it is asked for: most handlers ask for little.

    Attributes:
        group: the consumer group of the handler.
        attempt: 1 for the first, counted by this process.
    """

    __slots__ = ("_headers", "_record", "attempt", "group")

    def __init__(
        self, record: Record, *, group: str, attempt: int = 1, headers: dict[str, bytes | None] | None = None
    ) -> None:
        self._record = record
        self._headers = dict(record.headers) if headers is None else headers
        self.group = group
        self.attempt = attempt

    def _text(self, name: str) -> str | None:
        value = self._headers.get(name)
        return None if value is None else value.decode(errors="replace")

    @property
    def id(self) -> str:
        """The event's id, the same on every delivery; with `source` it names the event.

        Ours are UUIDs: version 7, or derived from the step that published it. Those of others are any text.
        """
        return self._text(ID) or ""

    @property
    def type(self) -> str:
        """The event's type, such as `order.paid`."""
        return self._text(TYPE) or ""

    @property
    def version(self) -> Version:
        """The version of the type that the publisher wrote; 1.0 where it wrote none, 2.0 where it wrote 2."""
        return version_of(self._text(VERSION))

    @property
    def source(self) -> str:
        """The service that published it."""
        return self._text(SOURCE) or ""

    @property
    def time(self) -> datetime | None:
        """When it was published, by the publisher's wall clock, in UTC; None where it does not say so as RFC 3339 does.

        That is so of an event that was published for later, too: it says when something happened, not when others were
        to hear of it. A time without a zone is taken for UTC, in any zone of this process.
        """
        text = self._text(TIME)
        if text is None:
            return None
        try:
            time = datetime.fromisoformat(text)
            return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
        except (ValueError, OverflowError):  # the first and the last day have no such time in every zone
            return None

    @property
    def correlation_id(self) -> str | None:
        """The conversation that the event is part of: its own id where it was published outside any."""
        return self._text(CORRELATION)

    @property
    def causation_id(self) -> str | None:
        """What directly caused the event: a request, a step, or the id of another event."""
        return self._text(CAUSATION)

    @property
    def actor(self) -> str | None:
        """Who acted, as the publishing service knew them."""
        return self._text("ce_actor")

    @property
    def tenant(self) -> str | None:
        """On whose behalf."""
        return self._text("ce_tenant")

    @property
    def traceparent(self) -> str | None:
        """The W3C trace context of the publisher."""
        return self._text("ce_traceparent")

    @property
    def topic(self) -> str:
        """The topic it was read from."""
        return self._record.topic

    @property
    def partition(self) -> int:
        """The partition it was read from."""
        return self._record.partition

    @property
    def offset(self) -> int:
        """Its place in the partition. On Kafka it rises, but not by one; on `sql` it is unique."""
        return self._record.offset

    @property
    def key(self) -> str | None:
        """The value of the event's key field as text, None without one."""
        key = self._record.key
        return None if key is None else key.decode(errors="replace")

    @property
    def headers(self) -> Mapping[str, bytes]:
        """Every header that has a value, as it was received."""
        return {name: value for name, value in self._headers.items() if value is not None}

    def context(self) -> Context:
        """The context that a handler of this event works in: the publisher's, caused by this event."""
        return context_of(self._headers)

    def __repr__(self) -> str:
        place = f"{self.topic}/{self.partition}@{self.offset}"
        return f"<Metadata {self.type} {self._text(ID)} {place} attempt {self.attempt}>"


def context_of(headers: Mapping[str, bytes | None]) -> Context:
    """The context that headers describe; malformed values are dropped, and the event itself is the cause.

    This runs for every event. Most carry a correlation and an id and nothing else, and both are looked at without a
    regular expression: what is left after deleting the characters an id may have must be nothing.
    """
    cause, correlation = headers.get(ID), headers.get(CORRELATION)
    if cause is not None and (len(cause) > _LONGEST_ID or cause.translate(None, _ID_BYTES)):
        cause = None
    if correlation is not None and (len(correlation) > _LONGEST_ID or correlation.translate(None, _ID_BYTES)):
        correlation = None
    if not _RARE.isdisjoint(headers):
        values: dict[str, object] = {
            field: value.decode(errors="replace") for field, name in _CONTEXT.items() if (value := headers.get(name))
        }
        values["correlation_id"] = correlation and correlation.decode()
        values["causation_id"] = cause and cause.decode()
        return Context.from_dict(values)
    return Context(correlation.decode() if correlation else None, cause.decode() if cause else None)


class Envelope(NamedTuple):
    """What the events of one publication have in common.

    Attributes:
        headers: all but the correlation id.
        correlation_id: the conversation that is going on; without one each event starts its own.
    """

    headers: Headers
    correlation_id: bytes | None


def envelope(*, time: datetime, source: str, context: Context) -> Envelope:
    """The envelope of what is published by this service, at this time, in this context."""
    headers = [(SOURCE, source.encode()), (TIME, time.isoformat().encode())]
    for field, name in _CONTEXT.items():
        value: str | None = getattr(context, field)
        if value is not None and name != CORRELATION:
            headers.append((name, value.encode()))
    return Envelope(headers, context.correlation_id.encode() if context.correlation_id else None)


@cache
def _label(event: type[Event]) -> Headers:
    """What all events of a class have in common; the type first, since readers look for it."""
    definition = definition_of(event)
    return [
        (TYPE, definition.type.encode()),
        (VERSION, str(definition.version).encode()),
        ("ce_specversion", b"1.0"),
        ("content-type", b"application/json"),
    ]


def encode(event: Event, *, id: str, topic: str, shared: Envelope) -> Outgoing:
    """An event in its wire form.

    Raises:
        TypeError: it is no event with a type, or JSON cannot hold a value of it.
    """
    codec = codec_of(type(event))
    written = id.encode()
    correlation = (CORRELATION, shared.correlation_id or written)
    headers = [*_label(type(event)), (ID, written), correlation, *shared.headers]
    value = codec.write(event)  # first, since it names the field that cannot be written
    return Outgoing(topic, codec.key(event), value, headers)


def version_of(text: str | None) -> Version:
    """The version that a header says: others may write the major number only, or none.

    Raises:
        ValueError: it is none.
    """
    return Version.parse(f"{text}.0" if text and text.isdecimal() else text or "1.0")


def kind_of(headers: Mapping[str, bytes | None]) -> str:
    """What a handler is chosen by: the type and the major version, like `order.paid 2.x`; empty where it has none."""
    return _kind(headers.get(TYPE) or b"", headers.get(VERSION) or b"1.0")


@lru_cache(maxsize=1024)
def _kind(type: bytes, version: bytes) -> str:
    try:
        return kind_named(type.decode(), version_of(version.decode()).major) if type else ""
    except ValueError:
        return ""


def kind_named(type: str, major: int) -> str:
    """The name of a major version of a type."""
    return f"{type} {major}.x"
