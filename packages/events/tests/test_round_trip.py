"""What can be published can be read: types that lose values are refused where they are declared, values in tests."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from enum import Enum, IntEnum, StrEnum
from typing import Any

import pytest
from pydantic import (
    AliasChoices,
    AliasPath,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    JsonValue,
    SecretStr,
    computed_field,
    create_model,
    field_serializer,
    model_serializer,
    model_validator,
)
from pydantic.alias_generators import to_camel

from mainstay.core import App, ConfigurationError, Kept
from mainstay.core.testing import eventually
from mainstay.database import DatabaseModule, DatabaseSettings
from mainstay.events import DeadLetters, Event, EventRouter, EventsModule, EventsSettings, Metadata
from mainstay.events.testing import in_memory, metadata_of


class Colour(Enum):
    RED = "red"


class Level(IntEnum):
    HIGH = 3


class Word(StrEnum):
    A = "a"


class Item(BaseModel):
    name: str


class Priced(Item):
    price: Decimal


class Parcel(BaseModel):
    """A model of its own, whose fields have other names for others."""

    model_config = ConfigDict(alias_generator=to_camel)

    weight_grams: int


@dataclass
class Place:
    hall: str
    row: int = 0


class Camel(Event, type="trip.camel", key="order_id"):
    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True)

    order_id: str
    parcels: tuple[Parcel, ...] = ()


class Aliased(Event, type="trip.aliased", key="order_id"):
    order_id: str = Field(alias="orderId")
    note: str | None = Field(default=None, alias="remark")


class ReadTwice(Event, type="trip.read-twice"):
    name: str = Field(validation_alias=AliasChoices("old", AliasPath("deep", 0), "new"), serialization_alias="new")


class ReadOnly(Event, type="trip.read-only"):
    name: str = Field(validation_alias="heading")


class ByAlias(Event, type="trip.by-alias"):
    model_config = ConfigDict(serialize_by_alias=True)

    name: str = Field(alias="n")


class Doubled(Event, type="trip.doubled"):
    model_config = ConfigDict(extra="forbid")

    a: int

    @computed_field  # type: ignore[prop-decorator]  # pydantic's own way
    @property
    def double(self) -> int:
        """Follows from the fields."""
        return self.a * 2


class Numbers(Event, type="trip.numbers"):
    rate: float
    exact: Decimal = Decimal("1.10")


class Blob(Event, type="trip.blob"):
    data: bytes


class Moments(Event, type="trip.moments"):
    at: datetime
    day: date = date(2026, 1, 2)
    took: timedelta = timedelta(microseconds=1)


class Mixed(Event, type="trip.mixed"):
    tags: frozenset[str] = frozenset()
    anything: JsonValue = None
    more: dict[str, JsonValue] | None = None
    place: Place = Place("main")
    word: Word = Word.A


BACK: list[Event] = [
    Camel(order_id="1", parcels=(Parcel(weightGrams=5),)),
    Aliased(orderId="1", remark="kept"),
    ReadTwice(new="x"),
    ReadOnly(heading="x"),
    ByAlias(n="x"),
    Doubled(a=2),
    Numbers(rate=float("inf")),
    Numbers(rate=float("nan"), exact=Decimal("1E+30")),
    Blob(data=b"\xff\x00\x80"),
    Moments(at=datetime(2026, 1, 2, 3, tzinfo=timezone(timedelta(hours=5, minutes=45)))),
    Moments(at=datetime(2026, 1, 2, 3, tzinfo=UTC)),
    Mixed(tags=frozenset({"a", "b"}), anything={"x": [1, None, "y"]}, more={"n": 1.5}),
    Mixed(anything="a\x00b😀"),
]


@pytest.mark.parametrize("event", BACK, ids=[type(event).__name__ for event in BACK])
async def test_what_is_published_comes_back_equal(event: Event, sqlite_url: str) -> None:
    """On a transport that looks at no value, too: nothing becomes a dead letter, and nothing is changed."""
    events = EventRouter()
    seen: list[Event] = []

    @events.on(type(event), group="g")
    async def handle(event: Event) -> None:
        seen.append(event)

    app = App(
        DatabaseModule.for_root(DatabaseSettings(url=SecretStr(sqlite_url))),
        EventsModule.for_root(EventsSettings()),
        EventsModule.for_feature(events),
    )
    async with app.running(serve=True):
        await events.publish(event)
        await eventually(lambda: bool(seen), what="the delivery")
        assert await app.get(DeadLetters).list() == []
    assert len(seen) == 1
    assert Kept(type(event), "event").same(seen[0], event)  # also nan, which is not equal to itself
    metadata_of(event)


def test_others_read_aliases_and_write_either() -> None:
    """The JSON of an event has the names that its fields have for others; those of the class are read as well."""
    value = metadata_of(Camel(order_id="1", parcels=(Parcel(weightGrams=5),)))._record.value
    assert json.loads(value or b"") == {"orderId": "1", "parcels": [{"weightGrams": 5}]}
    value = metadata_of(Doubled(a=2))._record.value
    assert json.loads(value or b"") == {"a": 2}


def declared(**fields: Any) -> Callable[[], type[Event]]:
    """Declares an event with these fields: the annotation, or the annotation and the field."""

    def declare() -> type[Event]:
        return create_model("Wrong", __base__=Event, __cls_kwargs__={"type": "trip.wrong"}, **fields)

    return declare


class Rate(BaseModel):
    value: float


class Attachment(BaseModel):
    data: bytes


class MaybeRate(BaseModel):
    value: float | None


@dataclass
class Renamed:
    name: str = Field(serialization_alias="title")


REFUSED: list[tuple[Callable[[], type[Event]], str]] = [
    (declared(name=(str, Field(serialization_alias="title"))), "name is written as 'title', by which it is not read"),
    (declared(x=(str, Field(alias="y")), y=str), "x is written as 'y', which is another field"),
    (declared(inner=list[Renamed]), r"inner\[\*\].name is written as 'title'"),
    (declared(name=(str, Field(exclude=True))), r"name is never written \(exclude=True\)"),
    (declared(attachment=Attachment), "attachment.data is bytes: say ser_json_bytes"),
    (declared(what=Any), "what may be anything, .*JsonValue"),
    (declared(what=dict[str, Any]), "what may be anything"),
    (declared(what=list), r"what\[\*\] may be anything"),
    (declared(when=str | datetime), "when is a union in which a datetime comes back as a str"),
    (declared(number=SecretStr), "number holds a secret"),
]


@pytest.mark.parametrize(("declare", "message"), REFUSED, ids=[message[:30] for _, message in REFUSED])
def test_a_type_that_loses_values_is_refused_at_the_class(declare: Callable[[], type[Event]], message: str) -> None:
    """The error names the class and the field, however deep, and the remedy."""
    with pytest.raises(TypeError, match=f"^event Wrong cannot be published: ({message})"):
        declare()


def test_the_remedies_are_taken() -> None:
    """What an error recommends is no error."""

    class Safe(BaseModel):
        model_config = ConfigDict(
            ser_json_inf_nan="strings", ser_json_bytes="base64", val_json_bytes="base64", allow_inf_nan=True
        )
        rate: float
        data: bytes

    class Finite(BaseModel):
        rate: FiniteFloat

    event = declared(safe=Safe, finite=Finite, more=dict[str, JsonValue])()
    metadata_of(event(safe=Safe(rate=float("inf"), data=b"\xff"), finite=Finite(rate=1.0), more={"a": [1.5]}))


Unchecked = dict[str, Any]
"""Fields that a type checker does not look at, as those of `model_construct` are by nobody."""


class Rated(Event, type="trip.rated"):
    rate: Rate | None = None
    maybe: tuple[float | None, ...] = ()
    perhaps: tuple[MaybeRate, ...] = ()


class Poly(Event, type="trip.poly"):
    item: Item


class Text(Event, type="trip.text"):
    first: str = ""
    second: str = ""


@pytest.mark.parametrize(
    ("event", "message"),
    [
        (Poly(item=Priced(name="n", price=Decimal("2.5"))), "item: a Priced comes back as an Item"),
        (Aliased(orderId="\ud83d"), "event Aliased cannot be published: order_id: .*surrogates not allowed"),
        (Text(second="\ud83d"), "event Text cannot be published: second: .*surrogates not allowed"),
        (Text.model_construct(**Unchecked(first=7)), "first: "),
        (Mixed.model_construct(**Unchecked(anything=Decimal("1.10"))), "anything: a Decimal comes back as a str"),
    ],
)
async def test_a_value_that_would_change_is_refused_in_tests(event: Event, message: str) -> None:
    """A look at every value is for tests; the error names the field and both types, and publishes nothing."""
    with pytest.raises(TypeError, match=message):
        metadata_of(event)
    async with in_memory(EventRouter()) as rehearsal:
        with pytest.raises(TypeError, match=message):
            await rehearsal.publish(event)
        assert rehearsal.published(type(event)) == []


async def test_a_text_that_json_cannot_hold_is_named_on_every_transport(sqlite_url: str) -> None:
    """The error says which field, and the publisher goes on."""
    events = EventRouter()
    app = App(
        DatabaseModule.for_root(DatabaseSettings(url=SecretStr(sqlite_url))),
        EventsModule.for_root(EventsSettings()),
        EventsModule.for_feature(events),
    )
    async with app:
        with pytest.raises(TypeError, match="event Text cannot be published: second: "):
            await events.publish(Text(second="\ud83d"))
        await events.publish(Text(second="fine"))


async def test_inf_and_nan_are_refused_where_they_would_become_null(sqlite_url: str) -> None:
    """On every transport, by the field's name; a null that is meant is written."""
    events = EventRouter()
    app = App(
        DatabaseModule.for_root(DatabaseSettings(url=SecretStr(sqlite_url))),
        EventsModule.for_root(EventsSettings()),
        EventsModule.for_feature(events),
    )
    nan = float("nan")
    async with app:
        with pytest.raises(TypeError, match=r"event Rated cannot be published: rate\.value: .*ser_json_inf_nan"):
            await events.publish(Rated(rate=Rate(value=nan)))
        with pytest.raises(TypeError, match=r"event Rated cannot be .*perhaps\[1\]\.value: .*ser_json_inf_nan"):
            await events.publish(Rated(perhaps=(MaybeRate(value=None), MaybeRate(value=-float("inf")))))
        await events.publish_batch([Rated(), Rated(rate=Rate(value=1.5), maybe=(nan, None))])


class ByColour(Event, type="trip.by-colour", key="colour"):
    colour: Colour


class ByLevel(Event, type="trip.by-level", key="level"):
    level: Level


class ByDay(Event, type="trip.by-day", key="at"):
    at: datetime | None


class ByFlag(Event, type="trip.by-flag", key="flag"):
    flag: bool


class ByMinute(Event, type="trip.by-minute", key="at"):
    at: datetime = Field(alias="when")

    @field_serializer("at")
    def _whole_minutes(self, value: datetime) -> str:
        return value.isoformat(timespec="minutes")


class BySelf(Event, type="trip.by-self", key="colour"):
    colour: Colour

    @model_validator(mode="before")
    @classmethod
    def _unpack(cls, value: Any) -> Any:
        return {"colour": value[0]} if isinstance(value, list) else value

    @model_serializer
    def _pack(self) -> list[str]:
        return [self.colour.value]


class ByPair(Event, type="trip.by-pair", key="pair"):
    pair: tuple[int, str]


@pytest.mark.parametrize(
    ("event", "key"),
    [
        (ByColour(colour=Colour.RED), "red"),
        (ByLevel(level=Level.HIGH), "3"),
        (ByDay(at=datetime(2026, 1, 2, tzinfo=UTC)), "2026-01-02T00:00:00Z"),
        (ByDay(at=None), None),
        (ByFlag(flag=True), "true"),
        (ByMinute(when=datetime(2026, 1, 2, tzinfo=UTC)), "2026-01-02T00:00+00:00"),
        (BySelf(colour=Colour.RED), "red"),
        (ByPair(pair=(1, "a")), '[1,"a"]'),
        (Aliased(orderId="7"), "7"),
    ],
)
def test_a_key_is_the_text_of_its_field_in_json(event: Event, key: str | None) -> None:
    """A producer in another language that writes the same JSON chooses the same partition."""
    assert metadata_of(event).key == key


async def test_a_class_that_is_complete_later_is_looked_at_by_the_app() -> None:
    """A field whose type is not known yet when the class is declared does not escape the look."""

    class Early(Event, type="trip.early"):
        later: "Later"

    class Later(BaseModel):
        value: Any

    Early.model_rebuild(_types_namespace={"Later": Later})
    events = EventRouter()

    @events.on(Early, group="g")
    async def handle(event: Early) -> None: ...

    root = EventsModule.for_root(EventsSettings(transport="memory"))
    with pytest.raises(ConfigurationError, match=r"event Early cannot be published: later\.value may be anything"):
        App(root, EventsModule.for_feature(events))


def test_a_handler_may_take_anything() -> None:
    """`Any` is an annotation like another, for one who handles many types."""

    async def handle(event: Any, meta: Metadata) -> None: ...

    EventRouter().on(ByFlag, ByPair, group="g")(handle)
