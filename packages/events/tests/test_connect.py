"""What Kafka Connect and Debezium write as numbers and bytes: by the schema beside it amounts and times are such."""

import json
from base64 import b64encode
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

import pytest

from mainstay.events import Event, EventRouter, Metadata
from mainstay.events._connect import _meaning_of
from mainstay.events.foreign import Debezium, Plain
from mainstay.events.testing import in_memory

bills = Debezium("bill")


class BillChanged(Event, type="bill.changed", topic="shop.public.bills", key="id", decoder=bills):
    id: int
    amount: Decimal
    rate: Decimal | None = None
    born: date | None = None
    at: datetime | None = None
    micros: datetime | None = None
    nanos: str | None = None
    opens: time | None = None
    took: timedelta | None = None
    lines: list[Decimal] | None = None
    by: dict[str, date] | None = None
    text: str | None = "the default"
    raw: bytes = b""
    share: float = 0.0


class BillDeleted(Event, type="bill.deleted", topic="shop.public.bills", key="id", decoder=bills):
    id: int


class PriceSet(Event, type="price.set", topic="prices", key="item", decoder=Plain("price.set")):
    item: str
    price: Decimal = Decimal(0)


class PriceGone(Event, type="price.set.deleted", topic="prices", key="key", decoder=Plain("price.set")):
    key: str


class Kept:
    """Handlers that keep what they were given."""

    def __init__(self, *classes: type[Event]) -> None:
        self.events = EventRouter()
        self.seen: list[tuple[Any, Metadata]] = []

        @self.events.on(*classes, group="kept")
        async def keep(event: Event, meta: Metadata) -> None:
            self.seen.append((event, meta))

    @property
    def all(self) -> list[Any]:
        """The events."""
        return [event for event, _ in self.seen]


CONNECT = "org.apache.kafka.connect.data"
DECIMAL = {"type": "bytes", "name": f"{CONNECT}.Decimal", "version": 1, "parameters": {"scale": "2"}}
DATE = {"type": "int32", "name": "io.debezium.time.Date", "version": 1}


def digits(unscaled: int) -> str:
    """The digits of an amount, as Connect writes them."""
    return b64encode(unscaled.to_bytes((unscaled.bit_length() + 8) // 8, "big", signed=True)).decode()


ROW: list[tuple[dict[str, Any], str, Any]] = [
    ({"field": "id", "type": "int32"}, "id", 7),
    ({"field": "amount", **DECIMAL}, "amount", "1234"),  # in base64, and another amount
    (
        {
            "field": "rate",
            "type": "struct",
            "name": "io.debezium.data.VariableScaleDecimal",
            "fields": [{"field": "scale", "type": "int32"}, {"field": "value", "type": "bytes"}],
        },
        "rate",
        {"scale": 20, "value": digits(-100000000000000000001)},
    ),
    ({"field": "born", **DATE}, "born", 59),
    # Of the year 1970, where milliseconds are fewer than the seconds of today.
    ({"field": "at", "type": "int64", "name": "io.debezium.time.Timestamp"}, "at", 5_097_600_001),
    ({"field": "micros", "type": "int64", "name": "io.debezium.time.MicroTimestamp"}, "micros", 1_740_477_600_123_456),
    ({"field": "nanos", "type": "int64", "name": "io.debezium.time.NanoTimestamp"}, "nanos", 1_740_477_600_123_456_789),
    ({"field": "opens", "type": "int64", "name": "io.debezium.time.MicroTime"}, "opens", 34_200_000_001),
    ({"field": "took", "type": "int64", "name": "io.debezium.time.MicroDuration"}, "took", -1_500_000),
    ({"field": "lines", "type": "array", "items": DECIMAL}, "lines", [digits(-1), digits(0), digits(128)]),
    ({"field": "by", "type": "map", "keys": {"type": "string"}, "values": DATE}, "by", {"ann": 0}),
    ({"field": "text", "type": "string"}, "text", None),
    ({"field": "raw", "type": "bytes"}, "raw", "//4A"),
    ({"field": "share", "type": "double"}, "share", 0.1),
]
BILL = BillChanged(
    id=7,
    amount=Decimal("-26588.24"),
    rate=Decimal("-1.00000000000000000001"),
    born=date(1970, 3, 1),
    at=datetime(1970, 3, 1, 0, 0, 0, 1000, tzinfo=UTC),
    micros=datetime(2025, 2, 25, 10, 0, 0, 123456, tzinfo=UTC),
    nanos="2025-02-25T10:00:00.123456789Z",
    opens=time(9, 30, 0, 1),
    took=timedelta(seconds=-1.5),
    lines=[Decimal("-0.01"), Decimal("0.00"), Decimal("1.28")],
    by={"ann": date(1970, 1, 1)},
    text=None,
    raw=b"\xff\xfe\x00",
    share=0.1,
)


def beside(payload: Any, *fields: dict[str, Any]) -> bytes:
    """A payload beside its schema, as Connect writes it."""
    return json.dumps({"schema": {"type": "struct", "fields": list(fields)}, "payload": payload}).encode()


def envelope(row: dict[str, Any], *fields: dict[str, Any], op: str = "c") -> bytes:
    """A change event of Debezium beside its schema."""
    of_row = {"type": "struct", "fields": list(fields)}
    sides = {"before": row, "after": None} if op == "d" else {"before": None, "after": row}
    return beside({**sides, "op": op}, {"field": "before", **of_row}, {"field": "after", **of_row})


async def test_amounts_and_times_beside_their_schema_are_read_as_they_are_meant() -> None:
    """None of them as the other number or text that it would pass for."""
    kept = Kept(BillChanged)
    row = {name: value for _, name, value in ROW}
    async with in_memory(kept.events) as rehearsal:
        await rehearsal.receive("shop.public.bills", envelope(row, *(field for field, _, _ in ROW)), key=b'{"id": 7}')
        await rehearsal.settled()
        assert await rehearsal.dead_letters() == []
    assert kept.all == [BILL]


@pytest.mark.parametrize(
    ("name", "raw", "text"),
    [
        ("io.debezium.time.Date", 2_937_600, "2937600 days after 1970-01-01"),
        ("io.debezium.time.Date", -719_162, "0001-01-01"),
        ("io.debezium.time.MicroTimestamp", 2**63 - 1, f"{(2**63 - 1) * 1000} nanoseconds after 1970-01-01"),
        ("io.debezium.time.MicroTimestamp", -1, "1969-12-31T23:59:59.999999Z"),
        (f"{CONNECT}.Timestamp", -62_135_596_800_000, "0001-01-01T00:00:00Z"),
        (f"{CONNECT}.Time", 1, "00:00:00.001000"),
        ("io.debezium.time.NanoTime", 1, "00:00:00.000000001"),
        ("io.debezium.time.Time", -3_020_399_000, "-838:59:59"),
        ("io.debezium.time.NanoDuration", 1, "PT0.000000001S"),
        ("io.debezium.time.Year", 2026, "2026"),
        ("io.debezium.time.ZonedTimestamp", "2026-03-01T10:00:00Z", "2026-03-01T10:00:00Z"),
        ("io.debezium.time.Date", "a text", "a text"),
    ],
)
async def test_a_time_that_no_calendar_has_is_a_text_that_is_none(name: str, raw: Any, text: str) -> None:
    """As are hours of more than a day; what has another form than its schema says stays what it is."""
    kept = Kept(PriceSet)
    field = {"field": "item", "type": "int64" if isinstance(raw, int) else "string", "name": name}
    async with in_memory(kept.events) as rehearsal:
        value = beside({"item": raw}, field).replace(b"2026}", b'"2026"}')
        await rehearsal.receive("prices", value, key=b"a")
        await rehearsal.settled()
        assert await rehearsal.dead_letters() == []
    assert kept.all == [PriceSet(item=text)]


async def test_what_is_not_as_the_schema_beside_it_says_is_a_dead_letter() -> None:
    """An amount without a scale, digits that are none; one that was written as a number is read as it is."""
    kept = Kept(PriceSet)
    price = {"field": "price", **DECIMAL}
    bad = [
        beside({"item": "a", "price": "?"}, price),
        beside({"item": "a", "price": "AA=="}, {**price, "parameters": {}}),
        beside({"item": "a", "price": {}}, {**price, "name": "io.debezium.data.VariableScaleDecimal"}),
        b'{"schema": {"type": "struct", "fields": 7}, "payload": {"item": "a"}}',
    ]
    async with in_memory(kept.events, partitions=1) as rehearsal:
        for value in bad:
            await rehearsal.receive("prices", value, key=b"a")
        written = beside({"item": "a", "price": 0}, price).replace(b'"price": 0', b'"price": 12345678901234567.89')
        await rehearsal.receive("prices", written, key=b"a")
        await rehearsal.settled()
        letters = await rehearsal.dead_letters()
    assert [letter.value for letter in letters] == bad
    assert all("not what the schema beside it says" in letter.error for letter in letters)
    assert kept.all == [PriceSet(item="a", price=Decimal("12345678901234567.89"))]


async def test_schemas_of_others_do_not_fill_the_memory() -> None:
    """A few are remembered, and long ones are read anew each time."""
    kept = Kept(PriceSet)
    _meaning_of.cache_clear()
    async with in_memory(kept.events) as rehearsal:
        for n in range(100):
            field = {"field": "price", **DECIMAL, "doc": "x" * (100_000 if n < 10 else n)}
            await rehearsal.receive("prices", beside({"item": "a", "price": digits(n)}, field), key=b"%d" % n)
        await rehearsal.settled()
        assert await rehearsal.dead_letters() == []
    assert sorted(event.price for event in kept.all) == [Decimal(n) / 100 for n in range(100)]
    assert _meaning_of.cache_info().currsize == 64


UNTOLD = "__debezium_unavailable_value"


@pytest.mark.parametrize(
    "column",
    [UNTOLD, b64encode(UNTOLD.encode()).decode(), [UNTOLD], {UNTOLD: UNTOLD}],
    ids=["text", "bytes", "array", "map"],
)
async def test_a_column_that_debezium_does_not_know_is_left_out(column: Any) -> None:
    """PostgreSQL tells no large value that was not changed: it is neither overwritten by a placeholder nor by null."""
    kept = Kept(BillChanged)
    row = {"id": 7, "amount": "1.00", "text": column}
    async with in_memory(kept.events, partitions=1) as rehearsal:
        await rehearsal.receive("shop.public.bills", json.dumps({"op": "u", "after": row}).encode(), key=b'{"id": 7}')
        row = {"id": 7, "amount": column}
        await rehearsal.receive("shop.public.bills", json.dumps({"op": "u", "after": row}).encode(), key=b'{"id": 7}')
        row = {"id": 7, "amount": 1, "text": f"It says {UNTOLD}.", "lines": []}
        await rehearsal.receive("shop.public.bills", json.dumps({"op": "u", "after": row}).encode(), key=b'{"id": 7}')
        await rehearsal.settled()
        (letter,) = await rehearsal.dead_letters()
    assert "amount: Field required" in letter.error
    untold, told = kept.all
    assert (untold.text, untold.model_fields_set) == ("the default", {"id", "amount"})
    assert told.text == f"It says {UNTOLD}."


@pytest.mark.parametrize(
    ("key", "text"),
    [
        (b"84406", "84406"),
        (b'"84406"', "84406"),
        (b'{"key": "84406"}', "84406"),
        (b'{"schema": {"type": "string", "optional": false}, "payload": "84406"}', "84406"),
        (b'{"payload": {"key": "84406"}, "schema": {"type": "struct", "fields": []}}', "84406"),
        (b'\0\0\0\0\1"84406"', "84406"),
        (b"null and void", "null and void"),
    ],
)
async def test_a_key_is_the_same_text_in_each_form(key: bytes, text: str) -> None:
    """So that what is deleted is what was written; in whichever way the value says that it is none."""
    kept = Kept(PriceSet, PriceGone)
    async with in_memory(kept.events, partitions=1) as rehearsal:
        for value in (b'{"item": "84406"}', None, b"null", b'{"schema": null, "payload": null}'):
            await rehearsal.receive("prices", value, key=key)
        await rehearsal.settled()
        assert await rehearsal.dead_letters() == []
    assert kept.all == [PriceSet(item="84406"), *[PriceGone(key=text)] * 3]
    assert {meta.key for _, meta in kept.seen} == {text}


async def test_the_key_of_a_number_in_bytes_is_no_text() -> None:
    """What it is about cannot be said by a deletion; a value says it itself."""
    kept = Kept(PriceSet, PriceGone)
    async with in_memory(kept.events, partitions=1) as rehearsal:
        for key in ((7).to_bytes(8, "big"), (7).to_bytes(4, "big")):
            await rehearsal.receive("prices", b'{"item": "a"}', key=key)
            await rehearsal.receive("prices", None, key=key)
        await rehearsal.settled()
        letters = await rehearsal.dead_letters()
    assert len(letters) == 2
    assert all("says by its key alone" in letter.error for letter in letters)
    assert kept.all == [PriceSet(item="a")] * 2


@pytest.mark.parametrize(
    "value",
    [
        b'{"schema": {"type": "struct", "fields": []}, "payload": {"item": "a"}}',
        b'{"payload":{"item":"a"},"schema":{"type":"struct","fields":[]}}',
        b' {\n "schema" : null,\n "payload" : {"item": "a"}}',
        b'\0\0\0\0\x11{"item": "a"}',
    ],
)
async def test_json_is_read_in_whichever_way_it_is_wrapped(value: bytes) -> None:
    """Beside a schema in any order, or behind the id of one, which JSON can be read without."""
    kept = Kept(PriceSet)
    async with in_memory(kept.events) as rehearsal:
        await rehearsal.receive("prices", value, key=b"a")
        await rehearsal.settled()
        assert await rehearsal.dead_letters() == []
    assert kept.all == [PriceSet(item="a")]


async def test_debeziums_null_is_skipped_as_its_tombstone_is() -> None:
    """Older converters write it so."""
    kept = Kept(BillDeleted)
    async with in_memory(kept.events, partitions=1) as rehearsal:
        row = {"id": 7, "amount": digits(1)}
        for value in (envelope(row, {"field": "amount", **DECIMAL}, op="d"), b"null", None):
            await rehearsal.receive("shop.public.bills", value, key=b'{"id": 7}')
        await rehearsal.settled()
        assert await rehearsal.dead_letters() == []
    assert kept.all == [BillDeleted(id=7)]
