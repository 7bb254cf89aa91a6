"""What there is to sell, found in the purchases file itself: nine tenths of what everybody together will ask for."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from ticketing.purchases import PurchaseLine, PurchaseRejected, parse_json, read_lines


@dataclass(frozen=True, slots=True)
class Item:
    """A ticket type."""

    item: str
    title: str
    stock: int


def read_catalogue(path: Path) -> dict[str, Item]:
    """The items of a purchases file, by id.

    Every well-formed line counts as demand, also in a purchase that will be rejected for another reason. An item's
    title is the first that any line gives it; an item to which no line gives a title is unknown.
    """
    demand: Counter[str] = Counter()
    titles: dict[str, str] = {}
    for number, data in read_lines(path):
        try:
            entries = parse_json(data, line=number).get("lines")
        except PurchaseRejected:
            continue
        for entry in entries if isinstance(entries, list) else ():
            try:
                line = PurchaseLine.model_validate(entry)
            except ValidationError:
                continue
            demand[line.item] += line.quantity
            if line.title is not None:
                titles.setdefault(line.item, line.title)
    return {item: Item(item, title, demand[item] * 9 // 10) for item, title in sorted(titles.items())}
