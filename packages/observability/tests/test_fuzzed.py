"""An API of all that can be wrong, asked by Schemathesis: each answer from 400 on is a problem without an echo."""

import json
from collections.abc import Iterator, Mapping
from datetime import date, datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal
from uuid import UUID

import pytest
import schemathesis
from fastapi import APIRouter, Cookie, Depends, FastAPI, Header, HTTPException, Query
from fastapi import Path as Place
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import AnyUrl, BaseModel, ConfigDict, Field, SecretStr, field_validator
from pydantic_core._pydantic_core import list_all_errors  # which pydantic's own documentation is made of
from schemathesis.checks import content_type_conformance, response_schema_conformance, status_code_conformance
from schemathesis.core.result import Ok

from mainstay.core import MainstayError, not_found
from mainstay.core import errors as core_errors
from mainstay.observability import errors
from mainstay.observability.fastapi import instrument

SHORTEST = 4
"""A shorter text may be in an answer by chance."""


class Full(MainstayError):
    """There is no room."""

    code = "BIZ_FULL"
    status = 409
    title = "Full"


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


class Seat(BaseModel):
    model_config = ConfigDict(extra="forbid")

    row: Annotated[int, Field(ge=1, le=9)]
    names: dict[str, int] = {}
    secret: SecretStr = SecretStr("")

    @field_validator("secret")
    @classmethod
    def long(cls, value: SecretStr) -> SecretStr:
        """Quote what it refuses."""
        if len(value.get_secret_value()) > SHORTEST:
            msg = f"{value.get_secret_value()} is too long"
            raise ValueError(msg)
        return value


class Card(BaseModel):
    kind: Literal["card"]
    number: Annotated[str, Field(pattern=r"^\d{4}$")]


class Cash(BaseModel):
    kind: Literal["cash"]
    amount: Decimal


class Booking(BaseModel):
    seats: Annotated[list[Seat], Field(max_length=3)]
    payment: Annotated[Card | Cash, Field(discriminator="kind")]
    on: date | None = None
    at: datetime | None = None
    within: timedelta | None = None
    site: AnyUrl | None = None
    number: UUID | int | None = None
    colour: Colour = Colour.RED
    nested: dict[str, dict[str, list[Seat]]] = {}


class Filters(BaseModel):
    model_config = ConfigDict(extra="forbid")

    limit: Annotated[int, Field(le=10)] = 1
    colour: Colour | None = None


async def who(x_who: Annotated[int, Header()], session: Annotated[int | None, Cookie()] = None) -> None:
    """A dependency of an included router."""


def api() -> FastAPI:
    made, router = FastAPI(), APIRouter()

    @router.post("/bookings/{place}")
    async def book(place: int, booking: Booking) -> None:
        if booking.seats:
            raise Full(booking.model_dump_json())

    @router.get("/bookings/{place}")
    async def find(place: Annotated[str, Place(max_length=8)], filters: Annotated[Filters, Query()]) -> None:
        error = not_found("booking", place)
        raise error

    made.include_router(router, prefix="/v1", dependencies=[Depends(who)])

    @made.delete("/places/{name}")
    async def close(name: str, *, really: bool) -> None:
        raise HTTPException(503 if really else 409, name if really else {"why": [1.5, None]})

    @made.put("/bugs/{name}")
    async def bug(name: str, form: dict[str, int]) -> None:
        raise RuntimeError(name, form)

    @made.get("/teapots/{name}", response_model=Card)
    async def teapot(name: str, texts: Annotated[list[int] | None, Query()] = None) -> Any:
        return {"kind": name, "number": name, name: name}

    instrument(made)
    return made


schema = schemathesis.openapi.from_asgi("/openapi.json", api())
# What is in an answer by right. Hypothesis also tries the texts that it finds in the sources.
sources = [*Path(errors.__file__).parent.glob("*.py"), Path(core_errors.__file__), Path(__file__)]
messages = [each["message_template_python"] for each in list_all_errors()]
words = "".join([json.dumps(schema.raw_schema), *(source.read_text() for source in sources), *messages])
operations = [found.ok() for found in schema.get_all_operations() if isinstance(found, Ok)]


@pytest.mark.parametrize("mode", schemathesis.GenerationMode, ids=lambda mode: mode.value)
@pytest.mark.parametrize("operation", operations, ids=lambda operation: operation.label)
@given(data=st.data())
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
def test_each_failure_is_a_problem_that_repeats_nothing(
    data: st.DataObject, operation: Any, mode: schemathesis.GenerationMode
) -> None:
    """For every request: the answer is as OpenAPI says, and no text of the request that is not the API's is in it."""
    case: schemathesis.Case[Any] = data.draw(operation.as_strategy(generation_mode=mode))
    answer = case.call(headers={**dict[str, Any](case.headers or {}), "x-correlation-id": "fuzzed"})
    case.validate_response(
        answer, checks=[content_type_conformance, response_schema_conformance, status_code_conformance]
    )
    if answer.status_code < 400:
        return
    assert answer.headers["content-type"] == ["application/problem+json"]
    problem = answer.json()
    assert problem["status"] == answer.status_code
    told = json.dumps(problem, ensure_ascii=False)
    for sent in (case.body, case.path_parameters, case.query, case.headers, case.cookies):
        for text in texts(sent):
            assert len(text) < SHORTEST or text in words or text not in told


def texts(value: object) -> Iterator[str]:
    """Every text in a value, keys included."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from texts(inner)
    elif isinstance(value, str):
        yield value
    elif isinstance(value, bytes):
        yield value.decode("latin-1")
