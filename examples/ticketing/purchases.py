"""What a purchase is, and how one line of a purchases file becomes one, or an error that names line and field.

A line is one JSON object. Everything that is wrong with it is reported at once; one bad line of a purchase rejects the
whole purchase, because nobody wants half a family at the concert.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Never

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictInt,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from mainstay.core import FieldError, MainstayError

MAX_BYTES = 1 << 20
"""The longest line that is taken for a purchase."""
MAX_DEPTH = 20
"""How many objects and lists may be inside each other: Python's own limit depends on how deep its caller is."""
JSON_SPACE = b" \t\r\n"
"""What JSON takes for white space; `strip()` alone takes more."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: on which line of the file, in which field, and what."""

    line: int
    field: str
    message: str

    def __str__(self) -> str:
        where = f"line {self.line}, {self.field}" if self.field else f"line {self.line}"
        return f"{where}: {self.message}"


class PurchaseRejected(MainstayError):
    """A line that is no purchase; `problems` lists all that is wrong with it."""

    code = "VAL_PURCHASE"
    status = 422
    title = "Invalid purchase"
    no_effect = True

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        text = "; ".join(str(problem) for problem in self.problems)
        super().__init__(text, public_message=text)
        self.errors = tuple(
            FieldError((each.line, each.field) if each.field else (each.line,), each.message, "purchase")
            for each in self.problems
        )


class OrderTaken(PurchaseRejected):
    """A line that is a purchase, and whose order id belongs to another."""

    code = "RES_ORDER_TAKEN"
    status = 409
    title = "Order taken"


def _moment(value: object) -> object:
    if isinstance(value, datetime):
        return value
    for read in (_shop_time, datetime.fromisoformat):  # as the shop writes it, and as a purchase once read writes it
        try:
            return read(str(value))
        except ValueError:
            continue
    msg = "must be month/day/year hour:minute, such as 12/1/2010 8:26"
    raise ValueError(msg)


def _shop_time(value: str) -> datetime:
    return datetime.strptime(value, "%m/%d/%Y %H:%M")  # noqa: DTZ007  the shop's own local time has no zone


def _some(lines: tuple[PurchaseLine, ...]) -> tuple[PurchaseLine, ...]:
    if not 1 <= len(lines) <= 1000:
        msg = "must be a list of 1 to 1000 lines"
        raise ValueError(msg)
    return lines


def _known(value: object, inner: ValidatorFunctionWrapHandler) -> object:
    if value is None:
        msg = "is unknown (null)"
        raise ValueError(msg)
    return inner(value)


@dataclass(frozen=True, slots=True)
class Number:
    """A JSON number with a fraction or an exponent, as it was written, so that it is neither rounded nor text."""

    text: str

    def __str__(self) -> str:
        return self.text


def _price(value: object) -> Decimal:
    """Judged as it was written: 1e2, +5 or 5.000 are no prices, although they are numbers."""
    text = str(value)
    if re.fullmatch(r"[0-9]{1,7}(\.[0-9]{1,2})?", text) is None or not (price := Decimal(text)):
        msg = "must be an amount of money from 0.01 to 9999999.99, such as 7.25"
        raise ValueError(msg)
    return price


# An id ends up in URLs, run ids and audit resources: no separators, no spaces, and no "..", which is another page.
Id = Annotated[str, Field(pattern=re.compile(r"\A(?!\.+\Z)[A-Za-z0-9._-]{1,40}\Z")), WrapValidator(_known)]
# Titles are as untidy as people type them, but a receipt has no place for control characters, nor a database for NUL.
Text = Annotated[str, Field(min_length=1, max_length=200, pattern=re.compile(r"\A[^\x00-\x1f\x7f]*\Z"))]
Price = Annotated[Decimal, BeforeValidator(_price)]
Moment = Annotated[datetime, BeforeValidator(_moment)]


class PurchaseLine(BaseModel):
    """So many tickets of one type at one price; the title may be left out where the catalogue has it."""

    model_config = ConfigDict(frozen=True, hide_input_in_errors=True)

    item: Id
    title: Text | None = None
    quantity: Annotated[StrictInt, Field(ge=1, le=10_000)]
    unit_price: Price

    @property
    def cents(self) -> int:
        """The price of one ticket, in the smallest unit of the currency: money is counted in whole numbers."""
        return int(self.unit_price * 100)


class Purchase(BaseModel):
    """A customer's whole order. `total_cents` is what the provider is asked to charge."""

    model_config = ConfigDict(frozen=True, hide_input_in_errors=True)

    order_id: Id
    customer_id: Id
    country: Text
    placed_at: Moment
    lines: Annotated[tuple[PurchaseLine, ...], AfterValidator(_some)]

    @property
    def total_cents(self) -> int:
        return sum(line.quantity * line.cents for line in self.lines)


def parse_purchase(data: bytes, *, line: int, items: Container[str], customers: Container[str]) -> Purchase:
    """The purchase that one line of the file describes.

    Args:
        data: the line's bytes, UTF-8.
        line: its number in the file, from 1, for the errors.
        items, customers: those that the catalogue knows.

    Raises:
        PurchaseRejected: with every problem there is.
    """
    document = parse_json(data, line=line)
    problems: list[Problem] = []
    purchase: Purchase | None = None
    try:
        purchase = Purchase.model_validate(document)
    except ValidationError as error:
        problems = [Problem(line, _field(problem["loc"]), _message(dict(problem))) for problem in error.errors()]
    customer = document.get("customer_id")
    if isinstance(customer, str) and customer not in customers:
        problems.append(Problem(line, "customer_id", f"there is no customer {customer!r}"))
    problems += [
        Problem(line, f"lines[{index}].item", f"the catalogue has no item {item!r}")
        for index, item in _items(document)
        if item not in items
    ]
    if purchase is None or problems:
        raise PurchaseRejected(problems)
    return purchase


def parse_json(data: bytes, *, line: int) -> dict[str, Any]:
    """The JSON object on a line, with its fractions as they were written.

    Raises:
        PurchaseRejected: it is too long or too deep, not UTF-8, not JSON, no object, or names a field twice.
    """

    def reject(message: str, field: str = "") -> Never:
        raise PurchaseRejected([Problem(line, field, message)])

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen = dict(pairs)
        if len(seen) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            reject("appears twice", twice.encode(errors="backslashreplace").decode())  # a lone surrogate cannot be told
        return seen

    if len(data) > MAX_BYTES:
        reject(f"a purchase has at most {MAX_BYTES:,} bytes, not {len(data):,}")
    try:
        document = json.loads(data.decode(), parse_float=Number, parse_constant=_no_constant, object_pairs_hook=unique)
    except UnicodeDecodeError as error:
        reject(f"not UTF-8 at byte {error.start + 1}")
    except json.JSONDecodeError as error:
        reject(f"broken JSON at column {error.colno}: {error.msg}")
    except RecursionError:
        reject("nested too deeply")
    except ValueError as error:
        reject(f"broken JSON: {error}")
    if not isinstance(document, dict):
        reject(f"a purchase is a JSON object, not {type(document).__name__}")
    if _too_deep(document):
        reject("nested too deeply")
    return document


def _too_deep(document: Any) -> bool:
    level = [document]
    for _ in range(MAX_DEPTH):
        inside = (node.values() if isinstance(node, dict) else node for node in level)
        level = [child for children in inside for child in children if isinstance(child, dict | list)]
    return bool(level)


def _no_constant(name: str) -> Never:
    """NaN and Infinity are Python's idea, not JSON's."""
    msg = f"{name} is not a JSON number"
    raise ValueError(msg)


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a purchases file that are not blank, with their numbers from 1; bytes, as any may be broken."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if stripped := text.strip(JSON_SPACE):
                yield number, stripped


def _items(document: dict[str, Any]) -> Iterator[tuple[int, str]]:
    lines = document.get("lines")
    for index, entry in enumerate(lines if isinstance(lines, list) else ()):
        if isinstance(entry, dict) and isinstance(entry.get("item"), str):
            yield index, entry["item"]


def _field(path: tuple[int | str, ...]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def _message(problem: dict[str, Any]) -> str:
    context = problem.get("ctx", {})
    match problem["type"]:
        case "value_error":
            return str(context["error"])
        case "missing":
            return "is missing"
        case "greater_than_equal":
            return f"must be {context['ge']} or more, not {problem['input']}"
        case "less_than_equal":
            return f"must be {context['le']} or less, not {problem['input']}"
        case "string_unicode":
            return "must not contain half of a surrogate pair"
        case "string_pattern_mismatch" if problem["loc"][-1] in {"title", "country"}:
            return "must not contain control characters"
        case "string_pattern_mismatch":
            return "must be 1 to 40 letters, digits, dots, dashes or underscores, and not dots alone"
        case "tuple_type":
            return "must be a list of 1 to 1000 lines"
        case "model_type":
            return "must be a JSON object"
        case "int_type":
            return "must be a whole number"
        case _:
            message: str = problem["msg"]
            return message[:1].lower() + message[1:]
