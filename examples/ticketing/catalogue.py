"""What there is to sell and to whom, found in the purchases file itself.

Stock is nine tenths of what all together will ask for, so that some purchases sell out.
"""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ticketing.purchases import Id, PurchaseLine, PurchaseRejected, parse_json, read_lines

_ID: TypeAdapter[str] = TypeAdapter(Id)


@dataclass(frozen=True, slots=True)
class Item:
    """A ticket type."""

    item: str
    title: str
    stock: int


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Every item by its id, and every customer whom the file names."""

    items: dict[str, Item]
    customers: frozenset[str]


def read_catalogue(path: Path) -> Catalogue:
    """The catalogue of a purchases file.

    Every well-formed line counts as demand, also in a purchase that will be rejected for another reason. An item's
    title is the first that any line gives it; an item to which no line gives a title is unknown.
    """
    demand: Counter[str] = Counter()
    titles: dict[str, str] = {}
    customers: set[str] = set()
    for number, data in read_lines(path):
        try:
            document = parse_json(data, line=number)
        except PurchaseRejected:
            continue
        with suppress(ValidationError):  # unknown to us, as to the shop
            customers.add(_ID.validate_python(document.get("customer_id")))
        for line in _well_formed(document.get("lines")):
            demand[line.item] += line.quantity
            if line.title is not None:
                titles.setdefault(line.item, line.title)
    items = {item: Item(item, title, demand[item] * 9 // 10) for item, title in sorted(titles.items())}
    return Catalogue(items, frozenset(customers))


def _well_formed(entries: Any) -> list[PurchaseLine]:
    lines: list[PurchaseLine] = []
    for entry in entries if isinstance(entries, list) else ():
        try:
            lines.append(PurchaseLine.model_validate(entry))
        except ValidationError:
            continue
    return lines
