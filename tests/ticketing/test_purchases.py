"""What a line of a purchases file may be, and how exactly a wrong one is refused."""

import json
from decimal import Decimal
from typing import Any

import httpx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ticketing.catalogue import read_catalogue
from ticketing.facts import read_file
from ticketing.invariants import Facts
from ticketing.purchases import MAX_BYTES, Purchase, PurchaseRejected, parse_purchase, read_lines

GOOD: dict[str, Any] = {
    "order_id": "1",
    "customer_id": "ada",
    "country": "Norway",
    "placed_at": "12/1/2010 8:26",
    "lines": [
        {"item": "A", "title": "POPPY'S ", "quantity": 2, "unit_price": "2.75"},
        {"item": "A", "title": "another title", "quantity": 1, "unit_price": "2.1"},
    ],
}


MONEY = "must be an amount of money from 0.01 to 9999999.99, such as 7.25"
DOTS = "must be 1 to 40 letters, digits, dots, dashes or underscores, and not dots alone"


def changed(**fields) -> bytes:
    return json.dumps(GOOD | fields).encode()


def with_line(**fields) -> bytes:
    return changed(lines=[GOOD["lines"][0], GOOD["lines"][1] | fields])


def parse(data: bytes, items=("A",)) -> Purchase:
    return parse_purchase(data, line=7, items=items, customers={"ada"})


def complaints(data: bytes, items=("A",)) -> list[tuple[str, str]]:
    with pytest.raises(PurchaseRejected) as caught:
        parse(data, items)
    assert {problem.line for problem in caught.value.problems} == {7}
    return [(problem.field, problem.message) for problem in caught.value.problems]


def test_a_good_line_is_a_purchase_with_each_lines_own_price():
    """The same item may appear twice under two prices, and the total is exact in cents."""
    purchase = parse(changed())
    assert [line.cents for line in purchase.lines] == [275, 210]
    assert purchase.total_cents == 760
    assert purchase.placed_at.isoformat() == "2010-12-01T08:26:00"


def test_a_purchase_survives_being_stored():
    """What the workflow records and reads again equals what the customer sent."""
    purchase = parse(changed())
    assert Purchase.model_validate_json(purchase.model_dump_json()) == purchase


@given(st.decimals(min_value=Decimal("0.01"), max_value=Decimal("99999.99"), places=2))
def test_every_price_in_cents_is_exact(price):
    """No price loses or gains a cent on its way through, whether JSON has it as text or as a number."""
    for text in (f'"{price}"', str(price)):
        data = changed().replace(b'"2.75"', text.encode())
        assert parse(data).lines[0].cents == price * 100


@pytest.mark.parametrize(
    ("data", "field", "message"),
    [
        (changed(customer_id=None), "customer_id", "is unknown (null)"),
        (changed(order_id=".."), "order_id", DOTS),
        (changed(order_id="a/b"), "order_id", DOTS),
        (changed(placed_at="31/12/2010"), "placed_at", "must be month/day/year hour:minute, such as 12/1/2010 8:26"),
        (changed(country="a\x00b"), "country", "must not contain control characters"),
        (changed(lines=[]), "lines", "must be a list of 1 to 1000 lines"),
        (changed(lines={}), "lines", "must be a list of 1 to 1000 lines"),
        (changed(lines=[3]), "lines[0]", "must be a JSON object"),
        (with_line(quantity=-3), "lines[1].quantity", "must be 1 or more, not -3"),
        (with_line(quantity=0), "lines[1].quantity", "must be 1 or more, not 0"),
        (with_line(quantity=1.5), "lines[1].quantity", "must be a whole number"),
        (with_line(quantity=True), "lines[1].quantity", "must be a whole number"),
        (with_line(quantity="1"), "lines[1].quantity", "must be a whole number"),
        (with_line(quantity=10_001), "lines[1].quantity", "must be 10000 or less, not 10001"),
        *(
            (with_line(unit_price=price), "lines[1].unit_price", MONEY)
            for price in (
                None,
                True,
                [1],
                "-1",
                "0.00",
                "1e2",
                "5.000",
                " 7.25 ",
                "+5",
                "1_0",
                "12345678.00",
                ".5",
                "7.",
            )
        ),
        *(
            (changed().replace(b'"2.1"', number), "lines[1].unit_price", MONEY)
            for number in (b"-1", b"0.0", b"1e2", b"5E-1", b"5.000", b"1e99999999999999999999")
        ),
        (with_line(title="\ud800"), "lines[1].title", "must not contain half of a surrogate pair"),
        (with_line(item=None), "lines[1].item", "is unknown (null)"),
    ],
)
def test_each_wrong_field_is_named(data, field, message):
    """One wrong value gives exactly one problem, which names its field and says what it must be."""
    assert complaints(data) == [(field, message)]


def test_a_missing_field_is_named():
    """A misspelt field shows as the one that is missing."""
    data = changed().replace(b'"unit_price": "2.75"', b'"unitprice": "2.75"')
    assert complaints(data) == [("lines[0].unit_price", "is missing")]


def test_all_problems_come_at_once():
    """Whoever mends a file wants the whole list, the unknown item beside the negative quantity."""
    data = changed(customer_id=None, lines=[GOOD["lines"][0] | {"item": "Z", "quantity": -1}])
    assert complaints(data) == [
        ("customer_id", "is unknown (null)"),
        ("lines[0].quantity", "must be 1 or more, not -1"),
        ("lines[0].item", "the catalogue has no item 'Z'"),
    ]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"order_id": "1"', "broken JSON at column 17: Expecting ',' delimiter"),
        (b"[1]", "a purchase is a JSON object, not list"),
        (b'{"a": "\xff"}', "not UTF-8 at byte 8"),
        (b'{"a": NaN}', "broken JSON: NaN is not a JSON number"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a": ' + b"[" * 20 + b"]" * 20 + b"}", "nested too deeply"),
        (b" " * (MAX_BYTES + 1), f"a purchase has at most {MAX_BYTES:,} bytes, not {MAX_BYTES + 1:,}"),
    ],
    ids=["broken", "list", "bytes", "nan", "very deep", "deep", "long"],
)
def test_what_is_no_json_object_is_refused(data, message):
    """Whatever the bytes are, the answer is a problem with the line's number and never another exception."""
    assert complaints(data) == [("", message)]


def test_a_field_named_twice_is_refused():
    """Python's parser would keep the last of two quantities; nobody knows which one was meant."""
    data = changed().replace(b'"quantity": 2', b'"quantity": 2, "quantity": 200')
    assert complaints(data) == [("quantity", "appears twice")]


@given(st.binary(max_size=300))
def test_no_bytes_break_the_reader(data):
    """Any bytes at all are either a purchase or rejected."""
    with pytest.raises(PurchaseRejected):
        parse(data)


def test_customers_are_those_whom_the_file_names(tmp_path):
    """Whoever appears on any readable line is a customer; nobody else is, and null is nobody."""
    path = tmp_path / "purchases.jsonl"
    path.write_bytes(b"\n".join([changed(), changed(customer_id="bob", lines=[]), changed(customer_id=None), b"{"]))
    assert read_catalogue(path).customers == {"ada", "bob"}
    assert complaints(changed(customer_id="eve")) == [("customer_id", "there is no customer 'eve'")]


def test_lines_keep_their_numbers(tmp_path):
    """Blank lines are no purchases, and yet they count; a byte order mark and Windows line ends do no harm."""
    path = tmp_path / "purchases.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + changed() + b"\r\n\r\n" + changed(order_id="2"))
    assert [(number, parse(data).order_id) for number, data in read_lines(path)] == [
        (1, "1"),
        (3, "2"),
    ]


def test_stock_is_nine_tenths_of_all_demand(tmp_path):
    """Stock rounds down, every well-formed line counts, and the first title given is the item's."""
    path = tmp_path / "purchases.jsonl"
    refused = changed(order_id="3", customer_id=None)
    path.write_bytes(b"\n".join([changed(), changed(order_id="2"), refused, with_line(quantity=-5), b"{broken"]))
    (item,) = read_catalogue(path).items.values()
    assert (item.item, item.title) == ("A", "POPPY'S ")
    assert item.stock == (3 * 3 + 2) * 9 // 10


def test_an_item_without_any_title_is_unknown(tmp_path):
    """A line may leave the title out where another line has it; an item that nobody can name is not sold."""
    path = tmp_path / "purchases.jsonl"
    path.write_bytes(b"\n".join([with_line(title=None), with_line(item="Z", title=None)]))
    items = read_catalogue(path).items
    assert list(items) == ["A"]
    (_, first), (_, second) = read_lines(path)
    assert parse(first, items).lines[1].title is None
    assert complaints(second, items) == [("lines[1].item", "the catalogue has no item 'Z'")]


def test_the_shipped_file_has_something_of_everything():
    """The default file shows good lines, items that sell out, and each kind of bad input."""
    from ticketing.demo import DEFAULT_PURCHASES

    catalogue = read_catalogue(DEFAULT_PURCHASES)
    reasons, taken = [], []
    for number, data in read_lines(DEFAULT_PURCHASES):
        try:
            taken.append(parse_purchase(data, line=number, items=catalogue.items, customers=catalogue.customers))
        except PurchaseRejected as rejected:
            reasons.append(str(rejected))
    assert len(taken) == 26
    assert [reason.split(": ")[0] for reason in reasons] == [
        "line 3, customer_id",
        "line 7, lines[0].quantity",
        "line 12",
        "line 14, lines[0].item",
        "line 21, lines[0].unit_price",
        "line 27, lines",
    ]
    assert len({purchase.order_id for purchase in taken}) == 25
    assert any(item.stock == 0 for item in catalogue.items.values())


ANY_TEXT = st.text(st.characters(codec=None), max_size=8).map(json.dumps)  # with lone surrogates, escaped
NUMBER = st.from_regex(r"-?(0|[1-9][0-9]{0,8})(\.[0-9]{1,3})?([eE][+-]?[0-9]{1,22})?", fullmatch=True)
ANYTHING = st.one_of(NUMBER, NUMBER.map(json.dumps), ANY_TEXT, st.sampled_from(["null", "true", "[1]", "{}", '""']))
TOO_LONG = st.integers(39, 202).map(lambda length: json.dumps("x" * length))


DOTTED = st.from_regex(r"[a.]{1,3}", fullmatch=True).map(json.dumps)
PRICE_LIKE = st.from_regex(r"[ +]?[0-9_]{0,8}\.?[0-9٣]{0,3} ?", fullmatch=True).map(json.dumps)
FIELDS: dict[str, tuple[list[str], st.SearchStrategy[str]]] = {  # good values, and all others
    "order_id": (['"1"', '"2"', '"3"', '".1"'], ANYTHING | DOTTED),
    "customer_id": (['"ada"', '"bob"'], ANYTHING | DOTTED),
    "item": (['"A"', '"B"', '"..C"'], ANYTHING | TOO_LONG | DOTTED),
    "title": (['"t"', '"u"', "null"], ANYTHING | TOO_LONG),
    "quantity": (["1", "20", "10000"], ANYTHING | st.integers(-1, 10_001).map(str)),
    "unit_price": (["7.25", '"7.95"', "2.1", '"1"', "9999999.99"], ANYTHING | PRICE_LIKE),
    "more": (["0"], st.sampled_from([18, 19, 940, 970]).map(lambda depth: "[" * depth + '"[\\"["' + "]" * depth)),
}
AROUND = ["", "", "", " ", "\t", "\r", "\x0b", "\x0c", "\xa0", "\ufeff"]


@st.composite
def lines_of_a_file(draw: st.DrawFn) -> bytes:
    """A line that may be good, with at most one field that is anything at all."""
    fields = {name: draw(st.sampled_from(good)) for name, (good, _) in FIELDS.items()}
    wild = draw(st.sampled_from([None, *FIELDS]))
    if wild is not None:
        fields[wild] = draw(FIELDS[wild][1])
    one = ", ".join(f'"{name}": {fields[name]}' for name in ("item", "title", "quantity", "unit_price"))
    text = (
        f'{{"order_id": {fields["order_id"]}, "customer_id": {fields["customer_id"]}, "country": "x", '
        f'"placed_at": "1/1/2025 9:00", "lines": [{{{one}}}], "more": {fields["more"]}}}'
    )
    return (draw(st.sampled_from(AROUND)) + text + draw(st.sampled_from(AROUND))).encode()


@given(st.lists(st.one_of(lines_of_a_file(), st.sampled_from([b"", b"\x0b", b"[]"])), min_size=1, max_size=3))
@example([b'{"\\ud800": 1, "\\ud800": 2}'])
@settings(max_examples=400)
def test_office_and_judge_read_every_line_alike(tmp_path_factory, lines):
    """What the office makes of any line is what the recount makes of it: customers, stock, titles, quantities, prices.

    And every answer can be told: a problem as JSON, an order as one segment of a URL.
    """
    path = tmp_path_factory.getbasetemp() / "alike.jsonl"
    path.write_bytes(b"\n".join(lines))
    catalogue = read_catalogue(path)
    facts = Facts(read_file(path), {}, [], [], [], [], [], [], [], [], [])
    demand, titled = facts.demand()
    assert {item: entry.stock for item, entry in catalogue.items.items()} == {i: demand[i] * 9 // 10 for i in titled}
    assert catalogue.customers == facts.named()
    assert [number for number, _ in read_lines(path)] == list(facts.file)
    for number, data in read_lines(path):
        try:
            purchase = parse_purchase(data, line=number, items=catalogue.items, customers=catalogue.customers)
        except PurchaseRejected as rejected:
            "".join(f"{problem.field}{problem}" for problem in rejected.problems).encode()
        else:
            bought = [(line.item, line.quantity, line.cents) for line in purchase.lines]
            assert facts.lines_of({"line": number}) == bought
            page = f"/purchases/{purchase.order_id}"
            assert httpx.URL(f"http://office{page}").path == page


def test_white_space_around_a_line_is_no_part_of_it(tmp_path):
    """A line is as long as what it says, for office and judge alike."""
    path = tmp_path / "purchases.jsonl"
    path.write_bytes(b" " * MAX_BYTES + changed() + b"\r\n")
    assert [parse(data).order_id for _, data in read_lines(path)] == ["1"]
    assert read_file(path) == {1: GOOD}
