"""CloudEvents in structured mode: a record whose value holds the whole event is read as if headers said the rest."""

from __future__ import annotations

import json
import re
from base64 import b64decode
from collections.abc import Mapping
from typing import Any

from mainstay.events._members import exact, members
from mainstay.events._transport import LogRecord
from mainstay.events.errors import DecodeError
from mainstay.events.metadata import TYPE, UNREADABLE, Headers, Record

_CONTENT_TYPE = "content-type"
_MODE = b"application/cloudevents"
_JSON = b"application/cloudevents+json"
_NAME = re.compile(r"[a-z0-9]+", re.ASCII)


def understood(record: Record) -> Record:
    """A record in binary mode: itself, unless its value says what headers should.

    One that cannot be understood has a header `UNREADABLE` that says why.
    """
    kind = _kind_of_content(record)
    if not kind.startswith(_MODE) or any(value and name.lower() == TYPE for name, value in record.headers):
        return record
    value: bytes | None = None
    try:
        if kind != _JSON:
            msg = f"a CloudEvent as {kind.decode(errors='replace')} is not understood, only as {_JSON.decode()}"
            raise ValueError(msg)
        attributes, value = _parts(record.value or b"")
        said = [(f"ce_{name}", text.encode()) for name, text in attributes.items()]
    except ValueError as error:
        said = [(UNREADABLE, f"the record is no CloudEvent in structured mode: {error}".encode())]
    # A header that says which group it is for was added by us, as it was redriven.
    rest: Headers = [(name, each) for name, each in record.headers if name.lower() != _CONTENT_TYPE]
    return LogRecord(record.topic, record.partition, record.offset, record.key, value, [*said, *rest])


def is_structured(record: Record) -> bool:
    """Whether a record says that its value is a whole CloudEvent."""
    return _kind_of_content(record).startswith(_MODE)


def _kind_of_content(record: Record) -> bytes:
    headers = {name.lower(): value for name, value in record.headers}
    return (headers.get(_CONTENT_TYPE) or b"").partition(b";")[0].strip().lower()


def _parts(value: bytes) -> tuple[Mapping[str, str], bytes | None]:
    """The attributes of an event as headers have them, and its payload.

    Raises:
        ValueError: it is none; the message says why, and nothing of what it holds.
    """
    try:
        whole = members(value.decode("utf-8-sig"))
    except (ValueError, DecodeError):
        msg = "its value is no JSON object"
        raise ValueError(msg) from None
    attributes: dict[str, str] = {}
    payload: bytes | None = None
    for name, written in whole.items():
        if name == "data":
            payload = exact(written).encode()
            continue
        said: Any = json.loads(written)
        if name == "data_base64":
            if not isinstance(said, str):
                msg = "data_base64 is no text"
                raise ValueError(msg)
            payload = b64decode(said, validate=True)
        elif said is None:  # as if it were not there
            continue
        elif _NAME.fullmatch(name) is None or not isinstance(said, str | int):
            msg = "an attribute has a name or a value that none may have"
            raise ValueError(msg)
        else:
            attributes[name] = said if isinstance(said, str) else written
    missing = [name for name in ("id", "source", "type") if not attributes.get(name)]
    if missing:
        msg = f"it has no {' and no '.join(missing)}"
        raise ValueError(msg)
    return attributes, payload
