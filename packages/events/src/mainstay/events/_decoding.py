"""From the records of others to events: each as if headers said what its topic's decoder found.

Which decoder it is depends on the topic, and is settled when the App is put together. A record that says by its headers
that it is a CloudEvent is read as one on every topic. Of a record that does not, no header is believed: not who acted,
not for which tenant. The trace that it names is taken over, so that what others began and what is done here is one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from hashlib import blake2b
from typing import NamedTuple

from mainstay.core import Context, MainstayError, derived_id
from mainstay.events._members import exact
from mainstay.events._structured import is_structured, understood
from mainstay.events._transport import LogRecord
from mainstay.events.errors import DecodeError
from mainstay.events.foreign import Data, Decoded, Decoder, Format, Received, Schemas
from mainstay.events.metadata import (
    CORRELATION,
    ID,
    ONLY_GROUP,
    SOURCE,
    TIME,
    TYPE,
    UNREADABLE,
    VERSION,
    Headers,
    Record,
    kind_of,
)

NO_EVENT = "mainstay-no-event"
"""On the stand-in of a record that says nothing, as its decoder sees it."""
FIRST_READ = "mainstay-first-read"
"""On a record of others that was redriven: where it was before, which stays its identity."""

_OURS = ("ce_", "mainstay-")
_TRACE, _STATE = _W3C = ("traceparent", "tracestate")
_ATTRIBUTE = re.compile(r"[a-z0-9]+", re.ASCII)
_LONGEST_ID = 128


class Foreign(NamedTuple):
    """A topic that others write, as a group sees it.

    Attributes:
        decoder: of its records.
        type: of a record that cannot be read: whose handler says what becomes of it.
    """

    decoder: Decoder
    type: str


class Seen(NamedTuple):
    """A record as its group reads it, with its headers, and why it cannot be read if it cannot."""

    record: Record
    headers: Mapping[str, bytes | None]
    error: Exception | None


class NoSchemas:
    """What a decoder is given where no registry is configured."""

    def read(self, format: Format, value: bytes) -> Data:
        """See `Schemas`."""
        msg = f"{len(value)} bytes in {format} need a schema registry: set MAINSTAY_EVENTS_REGISTRY_URL"
        raise DecodeError(msg)


class Decoders:
    """Reads the records of a group's topics.

    Args:
        topics: those that others write.
        schemas: what their decoders look schemas up in.

    Attributes:
        topics, schemas: as given.
    """

    def __init__(self, topics: Mapping[str, Foreign], schemas: Schemas) -> None:
        self.topics = topics
        self.schemas = schemas

    def seen(self, record: Record) -> Seen:
        """A record as it is handled: a CloudEvent in binary mode as it is, without another look."""
        headers = dict(record.headers)
        if headers.get(TYPE):
            return Seen(record, headers, None)
        try:
            understood = self.understood(record)
        except MainstayError as passing:
            return Seen(record, headers, passing)
        headers = dict(understood.headers)
        why = headers.get(UNREADABLE)
        return Seen(understood, headers, None if why is None else DecodeError(why.decode(errors="replace")))

    def understood(self, record: Record) -> Record:
        """A record as if it were a CloudEvent in binary mode: itself, if it is one.

        Of one that cannot be read the headers say why, by `UNREADABLE`.

        Raises:
            MainstayError: not now, but later: what is needed to read it is away.
        """
        topic = self.topics.get(record.topic)
        if topic is None or is_structured(record):
            return understood(record)
        headers = dict(record.headers)
        if headers.get(TYPE) or UNREADABLE in headers:
            return record
        try:
            decoded = topic.decoder.decode(
                Received(record.topic, record.partition, record.offset, record.key, record.value, headers),
                self.schemas,
            )
        except Exception as error:
            if will_pass(error):
                raise
            why = str(error) if isinstance(error, DecodeError) else f"its decoder raised {type(error).__name__}"
            return _unreadable(record, topic, why)
        if decoded is None:
            return _stand_in(record, [(NO_EVENT, b"")])
        try:
            return _event(record, decoded)
        except Exception as error:  # noqa: BLE001  a decoder may say what no event can be, and no record stops the others
            return _unreadable(record, topic, f"what its decoder found is no event: {type(error).__name__}")

    def unreadable(self, record: Record, why: str) -> Record:
        """What stands for a record of a topic that others write, and that cannot be read, with the reason."""
        return _unreadable(record, self.topics[record.topic], why)

    def kind_of(self, record: Record) -> str:
        """What a handler of a record is chosen by, empty where it cannot be read.

        Raises:
            MainstayError: see `understood`.
        """
        headers = dict(self.understood(record).headers)
        return "" if UNREADABLE in headers else kind_of(headers)

    def type_of(self, record: Record) -> str:
        """The type of a record's event, as far as it is known now."""
        try:
            headers = dict(self.understood(record).headers)
        except MainstayError:
            return ""
        return (headers.get(TYPE) or b"").decode(errors="replace")


OURS = Decoders({}, NoSchemas())
"""Of a group that reads CloudEvents only."""


def will_pass(error: Exception) -> bool:
    """Whether an error says that nothing happened, and that it will pass."""
    return isinstance(error, MainstayError) and error.no_effect and error.retryable


def identity(record: Record) -> str:
    """The id of a record that has none of its own: where it was read first, and what it was.

    A topic that was deleted and made anew counts its offsets from 0 again, so that the bytes belong to it.
    """
    headers = dict(record.headers)
    before = headers.get(FIRST_READ)
    if before and headers.get(ONLY_GROUP):  # only what was redriven has both
        return before.decode(errors="replace")
    key, value = record.key or b"", record.value or b""
    digest = blake2b(b"%d:%b%b" % (len(key), key, value), digest_size=8).hexdigest()
    name = f"{record.topic}/{record.partition}@{record.offset}:{digest}"
    return name if len(name) <= _LONGEST_ID else str(derived_id(name))


def is_cloud_event(record: Record) -> bool:
    """Whether a record says that it is one, in either mode."""
    return bool(dict(record.headers).get(TYPE)) or is_structured(record)


def _event(record: Record, decoded: Decoded) -> Record:
    id_ = identity(record).encode()
    attributes = [
        (f"ce_{name}", text.encode()) for name, text in decoded.attributes.items() if _ATTRIBUTE.fullmatch(name)
    ]
    headers: list[tuple[str, bytes | None]] = [
        *attributes,
        (TYPE, decoded.type.encode()),
        (VERSION, decoded.version.encode()),
        (ID, id_),
        (SOURCE, record.topic.encode()),
        (CORRELATION, id_),
    ]
    if decoded.time is not None:
        headers.append((TIME, decoded.time.isoformat().encode()))
    if _TRACE not in decoded.attributes:
        headers += _trace(record)
    key = record.key if decoded.key is None else decoded.key.encode(errors="surrogatepass")
    return _stand_in(record, headers)._replace(key=key, value=exact(decoded.json).encode(errors="surrogatepass"))


def _trace(record: Record) -> Headers:
    """The trace that a record is part of. It is no claim about who acted; one that is malformed is none."""
    said = {name: value.decode(errors="replace") for name, value in record.headers if name in _W3C and value}
    context = Context.from_dict(said)
    if context.traceparent is None:
        return []
    state = [] if context.tracestate is None else [(f"ce_{_STATE}", context.tracestate.encode())]
    return [(f"ce_{_TRACE}", context.traceparent.encode()), *state]


def _unreadable(record: Record, topic: Foreign, why: str) -> LogRecord:
    return _stand_in(record, [(UNREADABLE, why.encode(errors="replace")), (TYPE, topic.type.encode())])


def _stand_in(record: Record, headers: Headers) -> LogRecord:
    kept = [pair for pair in record.headers if pair[0] == ONLY_GROUP or not pair[0].lower().startswith(_OURS)]
    return LogRecord(record.topic, record.partition, record.offset, record.key, record.value, [*headers, *kept])
