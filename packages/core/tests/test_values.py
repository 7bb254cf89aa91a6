"""Values come back equal, or their type is refused where it is declared, or they are where they are first written."""

import json
from abc import ABC, abstractmethod
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum, IntEnum, StrEnum
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    Json,
    PlainSerializer,
    PrivateAttr,
    SecretStr,
    computed_field,
    field_validator,
    model_validator,
)
from pydantic_core import core_schema
from typing_extensions import TypedDict

from mainstay.core import Kept

T = TypeVar("T")
JSON_BYTES = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64", ser_json_inf_nan="constants")


class Color(Enum):
    """Members of two kinds."""

    RED = "red"
    BLUE = 2


class Word(StrEnum):
    """Text that is more than text."""

    A = "a"


class Number(IntEnum):
    """A number that is more than a number."""

    ONE = 1


class Shape(BaseModel):
    """A model with a subclass."""

    name: str


class Circle(Shape):
    """A model with a field of its own."""

    radius: int


class Page(BaseModel, Generic[T]):
    """A generic model."""

    items: list[T]


class Aliased(BaseModel):
    """Written for others by one name, read from others by another."""

    model_config = ConfigDict(serialize_by_alias=True, extra="forbid")

    id: int = Field(alias="ID")
    amount: int | None = Field(default=None, validation_alias="in", serialization_alias="out")
    parts: list["Aliased"] = []

    @computed_field  # type: ignore[prop-decorator]  # pydantic's own way
    @property
    def twice(self) -> int:
        """A field that is only written."""
        return self.id * 2


class Noted(BaseModel):
    """A model with a value that is no field."""

    text: Json[list[int]]
    _seen: int = PrivateAttr(default=0)


class Blob(BaseModel):
    """Bytes and floats, with a form of their own."""

    model_config = JSON_BYTES

    data: bytes
    rate: float


class Place(NamedTuple):
    """A tuple with names."""

    x: int
    when: datetime


@dataclass
class Base:
    """A dataclass with a subclass."""

    n: int
    total: int = field(init=False, default=0)


@dataclass
class Derived(Base):
    """A dataclass with a field of its own."""

    more: str = "x"


@dataclass
class Summed:
    """A dataclass with a field that follows from the others."""

    parts: list[int]
    total: int = field(init=False)

    def __post_init__(self) -> None:
        self.total = sum(self.parts)


class Bag(TypedDict):
    """A dict with names."""

    tags: set[str]
    when: date


class Text(str):
    """Text with behaviour of its own."""

    __slots__ = ()


class Plain:
    """A value without an equality of its own."""

    def __init__(self, text: str) -> None:
        self.text = text

    @classmethod
    def __get_pydantic_core_schema__(cls, _source: object, _handler: object) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(
            cls,
            core_schema.str_schema(),
            serialization=core_schema.plain_serializer_function_ser_schema(lambda value: value.text),
        )


class Hidden(BaseModel):
    """A model that does not write a field."""

    id: str
    total: int = Field(default=0, exclude=True)


class Login(BaseModel):
    """A model with a secret."""

    name: str
    password: SecretStr


class Raw(BaseModel):
    """Bytes that only UTF-8 can be."""

    data: bytes


class Cat(BaseModel):
    """Looks like the other."""

    name: str


class Dog(BaseModel):
    """Looks like the other."""

    name: str


class Tagged(BaseModel):
    """Looks like no other."""

    kind: Literal["tagged"] = "tagged"
    name: str


class Lost(ABC, BaseModel):
    """A model of which there is no value."""

    @abstractmethod
    def what(self) -> str:
        """What it is."""


numbered = Base(1)
numbered.total = 9
noted = Noted(text="[1]")
noted._seen = 1
fold = datetime(2026, 10, 25, 2, 30, tzinfo=ZoneInfo("Europe/Berlin"), fold=1)

EQUAL: list[tuple[Any, Any]] = [
    (Shape, Shape(name="a")),
    (Page[Circle], Page[Circle](items=[Circle(name="c", radius=1)])),
    (Aliased, Aliased(ID=1, **{"in": 2}, parts=[Aliased(ID=3)])),
    (list[Aliased], [Aliased(ID=1)]),
    (Noted, Noted(text="[1, 2]")),
    (Blob, Blob(data=b"\x89\xff\x00", rate=float("inf"))),
    (Base, Base(1)),
    (Summed, Summed([1, 2])),
    (Place, Place(1, datetime(2026, 1, 1, tzinfo=UTC))),
    (Bag, {"tags": {"a", "b"}, "when": date(2026, 1, 1)}),
    (float, float("-inf")),
    (list[float | None], [1.0, float("nan"), None]),
    (dict[str, Any], {"rate": float("inf"), "deep": [{"a": None}, True, 1.5, "x"]}),
    (object, {"a": [1]}),
    (float, 3),
    (bytes, b"\x89PNG\xff\x00"),
    (dict[str, bytes], {"a": b"\xff"}),
    (Decimal, Decimal("1.10000000000000000000000000000")),
    (Decimal | float, Decimal("0.1")),
    (Decimal | float, 0.1),
    (int | str, "7"),
    (int | str, 7),
    (UUID | str, UUID(int=5)),
    (Cat | Tagged, Tagged(name="a")),
    (Annotated[Shape | Tagged, Field()], Shape(name="a")),
    (dict[Word, int], {Word.A: 1}),
    (dict[int, str], {1: "a"}),
    (dict[UUID, date], {UUID(int=5): date(2026, 1, 1)}),
    (Color, Color.BLUE),
    (set[tuple[int, str]], {(1, "a"), (2, "b")}),
    (frozenset[UUID], frozenset({UUID(int=1)})),
    (deque[int], deque([1, 2])),
    (OrderedDict[str, int], OrderedDict(b=1, a=2)),
    (datetime, datetime(2026, 1, 1)),  # noqa: DTZ001  a moment without a zone is what this is about
    (datetime, datetime(2026, 7, 1, tzinfo=timezone(timedelta(hours=5, minutes=30)))),
    (datetime, datetime(2026, 7, 1, tzinfo=ZoneInfo("Europe/Berlin"))),
    (time, time(1, 2, 3, 4)),
    (timedelta, timedelta(days=400, microseconds=1)),
    (int, 10**60),
    (str, "nul \0, umlaut ü, 😀"),
    (complex, 1 + 2j),
    (Plain, Plain("a")),
    (list[Plain], [Plain("a"), Plain("b")]),
    (None, None),
]


@pytest.mark.parametrize(("kind", "value"), EQUAL, ids=[f"{kind} {number}" for number, (kind, _) in enumerate(EQUAL)])
def test_a_value_comes_back_equal(kind, value):
    """The type is fine, the value is kept, and what is read is what was written."""
    kept = Kept(kind, "result")
    kept.check()
    text, back = kept.keep(value)
    assert kept.same(value, back)
    assert kept.same(back, kept.read(text))
    assert type(back) is type(value) or (kind is float and back == value)


def test_a_sum_that_follows_is_not_taken_for_a_loss():
    """A field that `__init__` does not take is fine where the others say what it is."""
    _, back = Kept(Summed, "result").keep(Summed([1, 2]))
    assert back.total == 3


CHANGED: list[tuple[Any, Any, str]] = [
    (Shape, Circle(name="c", radius=3), "a Circle comes back as a Shape"),
    (dict[str, list[Shape]], {"all": [Circle(name="c", radius=3)]}, r"all\[0\]: a Circle comes back as a Shape"),
    (Page[Shape], Page[Shape](items=[Circle(name="c", radius=3)]), r"items\[0\]: a Circle comes back as a Shape"),
    (Base, Derived(1, "y"), "a Derived comes back as a Base"),
    (Base, numbered, "total: an int comes back as another int"),
    (Noted, noted, "_seen: an int comes back as another int"),
    (Any, datetime(2026, 1, 1), "a datetime comes back as a str"),  # noqa: DTZ001  the same
    (dict[str, object], {"a": [Decimal("1.5")]}, r"a\[0\]: a Decimal comes back as a str"),
    (Any, (1, 2), "a tuple comes back as a list"),
    (Any, {1: "a"}, r"\[key\]: an int comes back as a str"),
    (Any, {1, 2}, "a set comes back as a list"),
    (Any, Shape(name="a"), "a Shape comes back as a dict"),
    (int, True, "a bool comes back as an int"),
    (int, Number.ONE, "a Number comes back as an int"),
    (str, Word.A, "a Word comes back as a str"),
    (str, Text("a"), "a Text comes back as a str"),
    (int, "5", "a str comes back as an int"),
    (str | date, date(2026, 1, 2), "a date comes back as a str"),
    (dict[str, int], defaultdict(int, a=1), "a defaultdict comes back as a dict"),
    (dict[str, int], {"secret words": True}, r"\[\*\]: a bool comes back as an int"),
    (list[int], (1, 2), "a tuple comes back as a list"),
    (datetime, fold, "a datetime comes back as another datetime"),
    (time, time(1, tzinfo=ZoneInfo("Europe/Berlin")), "a time comes back as another time"),
    (Bag, {"tags": ["a"], "when": date(2026, 1, 1)}, "tags: a list comes back as a set"),
    (Place, (1, datetime(2026, 1, 1, tzinfo=UTC)), "a tuple comes back as a Place"),
    (float, 10**17 + 1, "an int comes back as a float"),
]


@pytest.mark.parametrize(("kind", "value", "said"), CHANGED, ids=[said for _, _, said in CHANGED])
def test_a_value_that_would_come_back_changed_is_refused(kind, value, said):
    """The message names the place and both types."""
    with pytest.raises(TypeError, match=f"^step f: its result cannot be kept as annotated: {said}; convert"):
        Kept(kind, "step f: its result").keep(value)


UNWRITTEN: list[tuple[Any, Any]] = [
    (Decimal, Decimal("NaN")),
    (int, "s3cret"),
    (dict[str, int], {"s3cret key": "s3cret"}),
    (Shape, {"name": 5}),
    (Circle, Shape(name="s3cret")),
    (str, "a\ud800b"),
    (Any, object()),
    (Raw, Raw(data=b"\xffs3cret")),
    (list[Any], __import__("functools").reduce(lambda inner, _: [inner], range(300), [])),
]


@pytest.mark.parametrize(("kind", "value"), UNWRITTEN, ids=[str(n) for n in range(len(UNWRITTEN))])
def test_what_cannot_be_written_or_read_is_refused_without_the_value(kind, value):
    """The message names the function, never what was in it."""
    with pytest.raises(TypeError, match=r"^step f: its result cannot be kept") as found:
        Kept(kind, "step f: its result").keep(value)
    assert "s3cret" not in str(found.value)


REFUSED: list[tuple[Any, str]] = [
    (Hidden, "total is never written"),
    (list[Hidden], r"\[\*\]\.total is never written"),
    (Login, "password holds a secret"),
    (SecretStr, "it holds a secret"),
    (Raw, "data is bytes"),
    (dict[str, Raw | None], "data is bytes"),
    (Iterable[int], "it is an iterator"),
    (Callable[[], int], "it is a function"),
    (type[Shape], "it is a class"),
    (dict[tuple[int, int], str], "it is a dict whose keys are of the kind tuple"),
    (dict[Color, int], "it is a dict whose keys are members of an enum that are no text"),
    (dict[Literal[1, 2], int], "it is a dict whose keys are literals that are no text"),
    (dict[int | None, int], "it is a dict whose keys are of the kind nullable"),
    (dict[str | tuple[int], int], "it is a dict whose keys are of the kind tuple"),
    (Cat | Dog, "it is a union in which a Dog comes back as a Cat"),
    (list[str | Decimal], r"\[\*\] is a union in which a Decimal comes back as a str"),
    (str | date, "it is a union in which a date comes back as a str"),
    (Color | str, "it is a union in which a Color comes back as a str"),
    (Lost, "it is of Lost, which is abstract"),
    (Exception, "as JSON: Unable to generate"),
]


@pytest.mark.parametrize(("kind", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_a_type_whose_values_never_come_back_is_refused(kind, said):
    """Where it is declared, by name."""
    with pytest.raises(TypeError, match=f"^step f: its result cannot be kept:? {said}"):
        Kept(kind, "step f: its result").check()


def test_what_is_written_by_code_of_its_own_is_judged_by_its_values():
    """A serializer that its validator can read is fine; one that loses something is noticed."""

    class Twice(BaseModel):
        n: Annotated[int, PlainSerializer(lambda value: value * 2)]

    class Strange(BaseModel):
        n: int

        @field_validator("n")
        @classmethod
        def _picky(cls, value: int) -> int:
            if value == 7:
                msg = "not seven"
                raise ValueError(msg)
            return value

    Kept(Twice, "result").check()
    with pytest.raises(TypeError, match="n: an int comes back as another int"):
        Kept(Twice, "result").keep(Twice(n=1))
    either: Any = Strange | int
    Kept(either, "result").check()  # no sample is at hand


def test_sets_and_mappings_are_equal_whatever_their_order():
    """So are values without an equality of their own that are written alike, and no others."""
    kept: Kept[Any] = Kept(dict[str, set[int]], "input")
    assert kept.same({"a": {1, 2}, "b": {3}}, {"b": {3}, "a": {2, 1}})
    assert not kept.same({"a": {1, 2}}, {"a": {1, 3}})
    assert not kept.same({"a": {1, 2}}, {"b": {1, 2}})
    assert not kept.same({"a": {1}}, {})
    plain: Kept[Any] = Kept(list[Plain], "input")
    assert plain.same([Plain("a")], [Plain("a")])
    assert not plain.same([Plain("a")], [Plain("b")])


class Everything(BaseModel):
    """A field of each kind that people use."""

    number: int
    rate: float
    money: Decimal
    text: str
    moment: datetime
    day: date
    span: timedelta
    id: UUID
    color: Color
    maybe: int | None
    words: set[str]
    pairs: list[tuple[int, str]]
    by_name: dict[str, Decimal]


texts = st.text(st.characters(codec="utf-8"), max_size=8)
moneys = st.decimals(allow_nan=False, allow_infinity=False)
everything = st.builds(
    Everything,
    number=st.integers(),
    rate=st.floats(allow_nan=False, allow_infinity=False),
    money=moneys,
    text=texts,
    moment=st.datetimes(timezones=st.sampled_from([None, UTC, timezone(timedelta(hours=-3))])),
    day=st.dates(),
    span=st.timedeltas(timedelta(days=-900), timedelta(days=900)),
    id=st.uuids(),
    color=st.sampled_from(Color),
    maybe=st.none() | st.integers(),
    words=st.sets(texts, max_size=4),
    pairs=st.lists(st.tuples(st.integers(), texts), max_size=3),
    by_name=st.dictionaries(texts, moneys, max_size=3),
)
of_everything: Kept[Everything] = Kept(Everything, "result")


@given(everything)
def test_any_value_of_the_usual_kinds_comes_back_equal(value):
    """Equal by Python's own equality, too."""
    text, back = of_everything.keep(value)
    assert back == value
    assert of_everything.read(text) == value


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts | moneys | st.datetimes() | st.binary(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner)
        | st.dictionaries(texts | st.integers(), inner, max_size=3)
        | st.sets(st.integers(), max_size=2)
    ),
    max_leaves=6,
)


@given(anything)
def test_anything_is_kept_equal_or_refused(value):
    """`Any` takes what JSON has, and refuses the rest instead of changing it."""
    kept: Kept[Any] = Kept(Any, "result")
    try:
        text, back = kept.keep(value)
    except TypeError:
        return
    assert repr(back) == repr(value)
    assert repr(json.loads(text)) == repr(value)


def test_what_cannot_be_read_is_named_without_its_value() -> None:
    """The message ends up in logs and notes: it has the fields, and none of what was in them."""
    kept: Kept[dict[str, Place]] = Kept(dict[str, Place], "the places")
    for text in ('{"alice": ["secret", "secret"]}', '{"alice": "secret"}', "secret"):
        with pytest.raises(ValueError, match=r"Input|JSON") as refused:
            kept.read(text)
        assert "secret" not in str(refused.value)
        assert refused.value.__cause__ is None


def test_code_of_a_type_may_raise_anything() -> None:
    """A validator that meets what an older release wrote is no less a value that does not fit."""

    class Parcel(BaseModel):
        grams: int

        @model_validator(mode="before")
        @classmethod
        def weigh(cls, found: dict[str, int]) -> dict[str, int]:
            return {"grams": 1000 * found["kilos"]}

    kept: Kept[Parcel] = Kept(Parcel, "the parcel")
    with pytest.raises(ValueError, match=r"Parcel\.weigh raised KeyError$"):
        kept.read('{"grams": 5}')
    with pytest.raises(TypeError, match=r"the parcel cannot be kept: .*weigh raised KeyError"):
        kept.write(Parcel.model_construct(grams=5))
