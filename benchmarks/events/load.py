"""The event and the payload that every subject and peer moves; standard library and pydantic only."""

import random
import time
import uuid
from collections.abc import Awaitable, Callable
from decimal import Decimal

from pydantic import BaseModel

SEED = 1
KEYS = 10_000
HEADERS = [
    ("ce_type", b"bench.paid"),
    ("ce_id", b"0199c5a3-7a04-7c0e-9d4b-2d0f6a1b8e77"),
    ("ce_specversion", b"1.0"),
    ("ce_dataversion", b"1.0"),
    ("ce_source", b"bench"),
    ("ce_time", b"2026-01-01T00:00:00.000000+00:00"),
    ("content-type", b"application/json"),
    ("ce_correlationid", b"0199c5a3-7a04-7c0e-9d4b-2d0f6a1b8e77"),
]


class Line(BaseModel):
    sku: str
    quantity: int


class Fields(BaseModel):
    order: uuid.UUID
    customer: str
    amount: Decimal
    currency: str
    lines: list[Line]


def orders(count: int) -> list[Fields]:
    """The same orders every time."""
    chance = random.Random(SEED)  # noqa: S311  a load, no secret
    lines = [Line(sku="abc", quantity=1), Line(sku="defgh", quantity=2)]
    return [
        Fields(
            order=uuid.UUID(int=chance.randrange(KEYS)),
            customer="c" * 40,
            amount=Decimal("12.50"),
            currency="EUR",
            lines=lines,
        )
        for _ in range(count)
    ]


def values(count: int) -> list[tuple[bytes, bytes]]:
    """Keys and JSON values of the same orders."""
    return [(str(order.order).encode(), order.model_dump_json().encode()) for order in orders(count)]


async def per_second(count: int, work: Callable[[], Awaitable[None]]) -> float:
    """How many a second, when `work` does them all."""
    started = time.perf_counter()
    await work()
    return count / (time.perf_counter() - started)
