"""What others publish: CloudEvents in structured mode, versions without a minor number, records that are no events."""

import asyncio
import json
import math
import re
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from enum import StrEnum
from typing import Any
from uuid import UUID

import pytest
from aiokafka import AIOKafkaProducer
from cloudevents.core.bindings.kafka import KafkaMessage, from_binary, to_binary, to_structured
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from pydantic import Field, SecretStr

from mainstay.core import App, bind
from mainstay.core.testing import eventually
from mainstay.database import DatabaseModule, DatabaseSettings
from mainstay.events import Event, EventRouter, EventsModule, EventsSettings, Metadata
from mainstay.events._memory import MemoryTransport
from mainstay.events.metadata import Outgoing
from mainstay.events.testing import Rehearsal, in_memory

STRUCTURED = [("content-type", b"application/cloudevents+json; charset=UTF-8")]


class Weighed(Event, type="scale.weighed", version="2.3", key="sack"):
    sack: str
    kilos: Decimal


class Scale:
    """A handler that keeps what it was given."""

    def __init__(self) -> None:
        self.events = EventRouter()
        self.seen: list[tuple[Weighed, Metadata]] = []

        @self.events.on(Weighed, group="scale")
        async def weigh(event: Weighed, meta: Metadata) -> None:
            self.seen.append((event, meta))

    @asynccontextmanager
    async def given(self, value: bytes, headers: Any) -> AsyncIterator[Rehearsal]:
        """A record of another, handled or not."""
        async with in_memory(self.events) as rehearsal:
            record = Outgoing("scale", b"a", value, headers)
            await rehearsal.app.get(MemoryTransport).send([record])
            await rehearsal.settled()
            yield rehearsal


def envelope(**more: Any) -> dict[str, Any]:
    """A CloudEvent in structured mode."""
    return {
        "specversion": "1.0",
        "id": "17",
        "source": "/scales/4",
        "type": "scale.weighed",
        "dataversion": "2",
        "time": "2026-03-01T10:00:00+02:00",
        **more,
    }


async def test_an_event_in_structured_mode_is_handled_as_one_in_binary_mode() -> None:
    """With its metadata, its extensions, and the headers beside it."""
    scale = Scale()
    data = {"sack": "a", "kilos": 1.25}
    text = json.dumps(envelope(shift=3, urgent=True, note=None, correlationid="c-1", data=data))
    async with scale.given(text.encode(), [*STRUCTURED, ("x-trace", b"7")]) as rehearsal:
        assert await rehearsal.dead_letters() == []
    ((event, meta),) = scale.seen
    assert event == Weighed(sack="a", kilos=Decimal("1.25"))
    assert (meta.id, meta.source, meta.type, str(meta.version)) == ("17", "/scales/4", "scale.weighed", "2.0")
    assert meta.time == datetime(2026, 3, 1, 8, tzinfo=UTC)
    assert meta.correlation_id == "c-1"
    assert {name: value for name, value in meta.headers.items() if name in {"ce_shift", "ce_urgent", "x-trace"}} == {
        "ce_shift": b"3",
        "ce_urgent": b"true",
        "x-trace": b"7",
    }
    assert "ce_note" not in meta.headers


async def test_an_amount_in_structured_mode_is_what_was_written() -> None:
    """Digit for digit: neither the envelope nor a float rounds it."""
    scale = Scale()
    data = '{"sack": "3.00000000000000000001", "kilos": 12345678901234567.89}'
    text = json.dumps(envelope()).removesuffix("}") + f', "data": {data}}}'
    async with scale.given(text.encode(), STRUCTURED) as rehearsal:
        assert await rehearsal.dead_letters() == []
    assert [event for event, _ in scale.seen] == [
        Weighed(sack="3.00000000000000000001", kilos=Decimal("12345678901234567.89"))
    ]


class Colour(StrEnum):
    RED = "red"


class Everything(Event, type="scale.everything", key="colour"):
    colour: Colour
    amount: Decimal
    at: datetime
    ref: UUID
    raw: bytes
    share: float
    note: str | None
    named: int = Field(alias="given-name")
    lines: list[dict[str, Decimal]]


EVERYTHING: dict[str, Any] = {
    "colour": "red",
    "amount": "0.10",
    "at": "2026-03-01T10:00:00.123456+02:00",
    "ref": "00000000-0000-0000-0000-000000000007",
    "raw": "__4A",
    "share": "Infinity",
    "note": None,
    "given-name": 3,
    "lines": [{"a": "1.50"}],
}
VALUE = Everything.model_validate(
    {
        "colour": Colour.RED,
        "amount": Decimal("0.10"),
        "at": datetime(2026, 3, 1, 8, 0, 0, 123456, tzinfo=UTC),
        "ref": UUID(int=7),
        "raw": b"\xff\xfe\x00",
        "share": math.inf,
        "note": None,
        "given-name": 3,
        "lines": [{"a": Decimal("1.50")}],
    }
)


@pytest.mark.parametrize("mode", [to_binary, to_structured])
async def test_what_the_cloudevents_package_writes_is_read_by_value(mode: Any) -> None:
    """In either mode: each kind of field, the attributes, and those of our own."""
    events = EventRouter()
    seen: list[tuple[Everything, Metadata]] = []

    @events.on(Everything, group="scale")
    async def handle(event: Everything, meta: Metadata) -> None:
        seen.append((event, meta))

    attributes = {
        "type": "scale.everything",
        "source": "/scales/4",
        "id": "not a uuid",
        "specversion": "1.0",
        "time": datetime(2026, 3, 1, 10, tzinfo=timezone(timedelta(hours=2))),
        "datacontenttype": "application/json",
        "dataversion": "1.7",
        "correlationid": "c-1",
        "tenant": "acme",
        "partitionkey": "red",
    }
    message = mode(CloudEvent(attributes, EVERYTHING), JSONFormat())
    key = message.key.encode() if isinstance(message.key, str) else message.key
    async with in_memory(events) as rehearsal:
        await rehearsal.receive("scale", message.value, key=key, headers=list(message.headers.items()))
        await rehearsal.settled()
        assert await rehearsal.dead_letters() == []
    ((event, meta),) = seen
    assert event == VALUE
    assert (meta.id, meta.source, str(meta.version), meta.key) == ("not a uuid", "/scales/4", "1.7", "red")
    assert meta.time == datetime(2026, 3, 1, 8, tzinfo=UTC)
    assert (meta.correlation_id, meta.tenant) == ("c-1", "acme")


async def test_kcat_and_the_cloudevents_package_read_ours(kafka: str, kcat: str, client: str, prefix: str) -> None:
    """Key, value and headers by another's client, and then the event by another's library."""
    events = EventRouter()
    settings = EventsSettings(
        transport="kafka",
        outbox=False,
        kafka_client=client,
        kafka_servers=kafka,
        topics={"scale.everything": prefix},
        partitions=1,
        source="scales",
    )
    app = App(EventsModule.for_root(settings), EventsModule.for_feature(events))
    async with app.running():
        with bind(correlation_id="c-1", actor="ann", tenant="acme"):
            id_ = await events.publish(VALUE)
    command = [kcat, "-b", kafka, "-t", prefix, "-C", "-J", "-e", "-q", "-o", "beginning"]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, timeout=60, check=True)
    (line,) = done.stdout.splitlines()
    record = json.loads(line)
    assert record["key"] == "red"
    names, values = record["headers"][::2], record["headers"][1::2]
    headers = dict(zip(names, values, strict=True))
    assert len(headers) == len(names)
    assert {name: headers[name] for name in headers if name != "ce_time"} == {
        "ce_type": "scale.everything",
        "ce_dataversion": "1.0",
        "ce_specversion": "1.0",
        "content-type": "application/json",
        "ce_id": id_,
        "ce_correlationid": "c-1",
        "ce_source": "scales",
        "ce_actor": "ann",
        "ce_tenant": "acme",
    }
    payload = json.loads(record["payload"])
    assert payload == {**EVERYTHING, "at": payload["at"]}
    assert datetime.fromisoformat(payload["at"]) == VALUE.at
    message = KafkaMessage({name: text.encode() for name, text in headers.items()}, b"red", record["payload"].encode())
    event = from_binary(message, JSONFormat())
    assert (event.get_id(), event.get_type(), event.get_source()) == (id_, "scale.everything", "scales")
    assert event.get_extension("dataversion") == "1.0"
    assert event.get_data() == payload
    said = event.get_time()
    assert said is not None
    assert abs(datetime.now(UTC) - said) < timedelta(hours=1)


async def test_a_payload_in_base64_is_its_bytes() -> None:
    """As writers do that do not know that it is JSON."""
    scale = Scale()
    value = json.dumps(envelope(data_base64="eyJzYWNrIjoiYSIsImtpbG9zIjoiMS41In0="))
    async with scale.given(value.encode(), STRUCTURED):
        assert [event for event, _ in scale.seen] == [Weighed(sack="a", kilos=Decimal("1.5"))]


@pytest.mark.parametrize(
    ("value", "headers", "says"),
    [
        (b"{", STRUCTURED, "its value is no JSON object"),
        (b"[1]", STRUCTURED, "its value is no JSON object"),
        (b"\xff", STRUCTURED, "its value is no JSON object"),
        (b"[" * 100_000, STRUCTURED, "its value is no JSON object"),
        (b'{"type":"scale.weighed","id":""}', STRUCTURED, "it has no id and no source"),
        (json.dumps(envelope(bad=[1])).encode(), STRUCTURED, "an attribute has a name or a value that none may have"),
        (json.dumps(envelope(data_base64="%")).encode(), STRUCTURED, "no CloudEvent in structured mode"),
        (b"[]", [("content-type", b"application/cloudevents-batch+json")], "cloudevents-batch+json is not understood"),
        (b"{}", [], "the record has no header ce_type: it is not an event"),
        (b"{}", [("ce_type", None)], "the record has no header ce_type: it is not an event"),
        (b"{}", [("ce_type", b"")], "the record has no header ce_type: it is not an event"),
        (b"{}", [("ce_type", b"scale.weighed"), ("ce_dataversion", b"two")], "version 'two' must be two numbers"),
    ],
)
async def test_a_record_that_is_no_event_is_a_dead_letter_byte_for_byte(value: bytes, headers: Any, says: str) -> None:
    """With the reason, and never skipped."""
    scale = Scale()
    async with scale.given(value, headers) as rehearsal:
        (letter,) = await rehearsal.dead_letters()
        assert re.search(re.escape(says), letter.error), letter.error
        assert (letter.value, list(letter.headers)) == (value, headers)
        assert scale.seen == []


async def test_a_time_that_no_zone_of_ours_has_is_none() -> None:
    """The event is handled all the same, in either mode; a number too large to hold is a dead letter."""
    scale = Scale()
    async with in_memory(scale.events, partitions=1) as rehearsal:
        data = {"sack": "a", "kilos": 1}
        for time in ("0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"):
            value = json.dumps(envelope(id=time, time=time, data=data)).encode()
            await rehearsal.receive("scale", value, key=b"a", headers=STRUCTURED)
        endless = json.dumps(envelope(data=data)).replace(
            '"kilos": 1', '"kilos": 1.000000000000000e-99999999999999999999'
        )
        await rehearsal.receive("scale", endless.encode(), key=b"a", headers=STRUCTURED)
        await rehearsal.receive(
            "scale",
            json.dumps(data).encode(),
            key=b"a",
            headers=[
                ("ce_type", b"scale.weighed"),
                ("ce_dataversion", b"2"),
                ("ce_id", b"4"),
                ("ce_time", b"0001-01-01T00:00:00+01:00"),
            ],
        )
        await rehearsal.settled()
        (letter,) = await rehearsal.dead_letters()
    assert letter.value == endless.encode()
    assert [meta.time for _, meta in scale.seen] == [None, None, None]


async def test_a_version_without_a_minor_number_is_that_major_version() -> None:
    """`dataversion` is no attribute of the standard: others write what they like."""
    scale = Scale()
    headers = [("ce_type", b"scale.weighed"), ("ce_id", b"1"), ("ce_dataversion", b"2")]
    async with scale.given(b'{"sack":"a","kilos":2}', headers):
        ((_, meta),) = scale.seen
        assert str(meta.version) == "2.0"


async def test_the_events_of_the_cloudevents_package_are_handled_once(kafka: str, prefix: str, sqlite_url: str) -> None:
    """Written by it in structured mode, twice, and the inbox knows the second by source and id."""
    events = EventRouter()
    seen: list[str] = []

    @events.on(Weighed, group=prefix, inbox=True)
    async def weigh(event: Weighed) -> None:
        seen.append(event.sack)

    settings = EventsSettings(
        transport="kafka", outbox=False, kafka_servers=kafka, topics={"scale.weighed": prefix}, partitions=1
    )
    database = DatabaseModule.for_root(DatabaseSettings(url=SecretStr(sqlite_url)))
    producer = AIOKafkaProducer(bootstrap_servers=kafka)
    await producer.start()
    try:
        async with App(database, EventsModule.for_root(settings), EventsModule.for_feature(events)).running(serve=True):
            for id_, source, sack in (("1", "/a", "a"), ("1", "/a", "a"), ("1", "/b", "b"), ("2", "/a", "c")):
                attributes = {
                    "type": "scale.weighed",
                    "source": source,
                    "id": id_,
                    "specversion": "1.0",
                    "time": datetime(2026, 3, 1, tzinfo=UTC),
                    "datacontenttype": "application/json",
                    "dataversion": "2.9",
                }
                message = to_structured(CloudEvent(attributes, {"sack": sack, "kilos": "1"}), JSONFormat())
                headers = [(name, value) for name, value in message.headers.items()]
                await producer.send_and_wait(prefix, message.value, key=sack.encode(), headers=headers)
            await eventually(lambda: "c" in seen, seconds=60)
    finally:
        await producer.stop()
    assert seen == ["a", "b", "c"]
