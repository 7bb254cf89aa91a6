"""What a digest takes for the same, and what it tells apart."""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from decimal import Decimal
from enum import Enum
from uuid import UUID, uuid4

import pytest
from pydantic import BaseModel, ConfigDict, Field

from mainstay.core import digest


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Line(BaseModel):
    """A model, as it is today."""

    item: str
    count: int = 1


class LaterLine(BaseModel):
    """The same in a later release."""

    item: str
    count: int = 1
    colour: Colour = Colour.RED
    tags: list[str] = []
    id: UUID = Field(default_factory=uuid4)
    at: datetime = Field(default_factory=lambda: datetime.now(UTC))


class Open(BaseModel):
    """A model that takes more than it names."""

    model_config = ConfigDict(extra="allow")


@dataclass
class Point:
    x: int
    more: list[int] = field(default_factory=list)
    name: str = "p"


@dataclass
class EarlierPoint:
    x: int


class Strange:
    """Nothing that JSON could hold."""


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ((1, 2), [1, 2]),
        ({1, 2, 3}, frozenset({3, 2, 1})),
        (Colour.RED, "red"),
        (Line(item="a"), Line(item="a", count=1)),
        (Line(item="a"), LaterLine(item="a")),
        ([{"lines": (Line(item="a", count=2),)}], [{"lines": [LaterLine(item="a", count=2)]}]),
        (EarlierPoint(1), Point(1, [])),
        (LaterLine.model_validate(LaterLine(item="a").model_dump(exclude={"id", "at"})), Line(item="a")),
        (Strange(), Strange()),
        (float("nan"), float("nan")),
    ],
)
def test_equal_values_have_one_digest(one, other):
    """Order, defaults and fields that nobody gave make no difference, also below the surface."""
    assert digest(one) == digest(other)
    assert len(digest(one)) == 32


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, "1"),
        (1, True),
        (None, ""),
        ([1, 2], [2, 1]),
        ([1], {1}),
        ({"a": 1}, {"a": 2}),
        ({"a": 1}, {"b": 1}),
        (["a", "b"], ["a,b"]),
        (Line(item="a"), Line(item="a", count=2)),
        (Line(item="a", count=2), LaterLine(item="a", count=2, colour=Colour.BLUE)),
        (Line(item="a"), LaterLine(item="a", tags=["x"])),
        (Open(a=1), Open(a=2)),
        (Open(a=1), Open()),
        (Point(1), Point(1, [2])),
        (Point(1), Point(1, name="q")),
        (Decimal(1), Decimal(2)),
        (date(2026, 1, 1), date(2026, 1, 2)),
        (b"\xff", b"\xfe"),
        (UUID(int=1), UUID(int=2)),
        (Strange(), None),
        ("\ud800", "\ud801"),
    ],
)
def test_others_are_told_apart(one, other):
    """Also where their texts would be alike."""
    assert digest(one) != digest(other)


def test_it_is_the_same_in_processes_that_hash_differently():
    """The order of a set is another one in each process."""
    program = "from mainstay.core import digest; print(digest({'set': {str(n) for n in range(50)}, 'a': 1}))"
    seen = {
        subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(seen) == 1
