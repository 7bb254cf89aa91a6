"""Each invariant holds for an honest office, and fails for each way of tampering that it is there for."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from ticketing.invariants import INVARIANTS, STATE_CHANGES, Facts, judge

Row = dict[str, Any]


def line(item: str, quantity: int, price: str) -> Row:
    return {"item": item, "title": item, "quantity": quantity, "unit_price": price}


def honest() -> Facts:
    """A sold purchase (1), one whose charge was refunded (2), one that was sold out (3), and two lines that are bad."""
    file = {
        1: {
            "order_id": "1",
            "customer_id": "ada",
            "lines": [line("A", 2, "1.5"), line("B", 1, "4.00"), line("A", 1, "1")],
        },
        2: {"order_id": "2", "customer_id": "bob", "lines": [line("A", 1, "1.50")]},
        3: {"order_id": "3", "customer_id": "bob", "lines": [line("A", 9, "0.10")]},
        4: None,
        5: {"order_id": "5", "customer_id": None, "lines": [line("B", 1, "4.00"), line("B", -1, "4.00")]},
    }
    purchase = {
        "line": 1,
        "order_id": "1",
        "customer_id": "ada",
        "total_cents": 800,
        "state": "completed",
        "tickets_held": 4,
    }
    refunded = {
        "line": 2,
        "order_id": "2",
        "customer_id": "bob",
        "total_cents": 150,
        "state": "cancelled",
        "tickets_held": 1,
    }
    sold_out = {
        "line": 3,
        "order_id": "3",
        "customer_id": "bob",
        "total_cents": 90,
        "state": "cancelled",
        "tickets_held": 0,
    }
    free: Row = {"state": "free", "order_id": None, "price_cents": None}
    mine: Row = {"state": "issued", "order_id": "1"}
    money = [
        {"key": "k1", "kind": "charge", "order_id": "1", "amount_cents": 800},
        {"key": "k2", "kind": "charge", "order_id": "2", "amount_cents": 150},
        {"key": "k2", "kind": "refund", "order_id": "2", "amount_cents": 150},
    ]
    effects = [
        ("sales", "tickets.held", "1"),
        ("sales", "tickets.held", "2"),
        ("sales", "purchase.completed", "1"),
        ("customers", "purchase.completed", "1"),
        ("receipts", "purchase.completed", "1"),
        ("customers", "payment.captured", "1"),
        ("customers", "payment.captured", "2"),
        ("customers", "payment.refunded", "2"),
        ("customers", "purchase.cancelled", "2"),
        ("customers", "purchase.cancelled", "3"),
    ]
    audited = {
        "1": ("purchase.accepted", "tickets.held", "payment.captured", "tickets.issued", "purchase.completed"),
        "2": (
            *("purchase.accepted", "tickets.held", "payment.captured"),
            *("payment.refunded", "tickets.released", "purchase.cancelled"),
        ),
        "3": ("purchase.accepted", "purchase.cancelled"),
    }
    return Facts(
        file=file,
        answers={1: "1", 2: "2", 3: "3", 4: None, 5: None},
        items=[{"item": "A", "stock": 11, "free": 8}, {"item": "B", "stock": 1, "free": 0}],
        tickets=[
            *({"item": "A", "serial": n, "price_cents": 150} | mine for n in (1, 2)),
            {"item": "A", "serial": 3, "price_cents": 100} | mine,
            *({"item": "A", "serial": n} | free for n in range(4, 12)),
            {"item": "B", "serial": 1, "price_cents": 400} | mine,
        ],
        purchases=[purchase, refunded, sold_out],
        payments=[dict(row) for row in money],
        ledger=[dict(row) for row in money],
        sales=[
            {"item": "A", "held": 4, "sold": 3, "revenue_cents": 400},
            {"item": "B", "held": 1, "sold": 1, "revenue_cents": 400},
        ],
        customers=[
            {"customer_id": "ada", "completed": 1, "cancelled": 0, "paid_cents": 800, "refunded_cents": 0},
            {"customer_id": "bob", "completed": 0, "cancelled": 2, "paid_cents": 150, "refunded_cents": 150},
        ],
        receipts=[{"order_id": "1", "amount_cents": 800}],
        handled=[{"consumer": group, "event_type": event, "order_id": order} for group, event, order in effects],
        audit_entries=13,
        audited=Counter((action, f"purchase/{order}") for order, actions in audited.items() for action in actions),
    )


def test_an_honest_office_satisfies_every_invariant():
    """Nothing is said against books that are in order, so what is said below is due to the tampering."""
    assert [verdict for verdict in judge(honest()) if not verdict.holds] == []


def test_an_empty_file_satisfies_every_invariant():
    """Where nothing happened nothing is wrong."""
    nothing = Facts({}, {}, [], [], [], [], [], [], [], [], [])
    assert all(verdict.holds for verdict in judge(nothing))


RECEIPT: Row = {"order_id": "1", "amount_cents": 800}


def tickets(facts: Facts, number: int, **changes: Any) -> None:
    facts.tickets[number].update(changes)


def charge_nobody(facts: Facts) -> None:
    for rows in (facts.ledger, facts.payments):
        rows.append(facts.ledger[0] | {"key": "k9", "order_id": "77"})


LINES, TICKETS, STOCK, LEDGERS, HALF, ONCE, PROJECTIONS, AUDIT = INVARIANTS

TAMPERINGS: dict[str, tuple[str, Callable[[Facts], object]]] = {
    "a line that nobody answered": (LINES, lambda f: f.answers.pop(5)),
    "a purchase that was accepted and lost": (LINES, lambda f: f.purchases.pop(2)),
    "a purchase of a refused line": (LINES, lambda f: f.answers.update({3: None})),
    "a purchase that stopped on the way": (LINES, lambda f: f.purchases[0].update(state="issued")),
    "a second purchase of a line": (LINES, lambda f: f.purchases.insert(0, f.purchases[2] | {"order_id": "77"})),
    "a purchase with another total": (LINES, lambda f: f.purchases[2].update(total_cents=91)),
    "two tickets with one number": (TICKETS, lambda f: tickets(f, 1, serial=1)),
    "a ticket given to somebody else": (TICKETS, lambda f: tickets(f, 0, order_id="2")),
    "a ticket at another price": (TICKETS, lambda f: tickets(f, 2, price_cents=150)),
    "a ticket too many": (TICKETS, lambda f: tickets(f, 5, state="issued", order_id="1", price_cents=150)),
    "a ticket for a stranger": (TICKETS, lambda f: tickets(f, 5, state="issued", order_id="77", price_cents=150)),
    "a negative stock": (STOCK, lambda f: f.items[1].update(free=-1)),
    "a ticket printed on top": (
        STOCK,
        lambda f: f.tickets.append({"item": "B", "serial": 2, "state": "free", "order_id": None}),
    ),
    "more stock than nine tenths": (STOCK, lambda f: f.items[0].update(stock=12, free=9)),
    "a ticket that was not counted back": (STOCK, lambda f: f.items[0].update(free=7)),
    "an item that is not on sale": (STOCK, lambda f: f.items.pop(1)),
    "nothing on sale": (STOCK, lambda f: f.items.clear()),
    "an item that is on sale twice": (STOCK, lambda f: f.items.append(dict(f.items[1]))),
    "an item that nobody asked for": (STOCK, lambda f: f.items.append({"item": "C", "stock": 0, "free": 0})),
    "a cent too much in the office": (LEDGERS, lambda f: f.payments[0].update(amount_cents=801)),
    "a charge that the office does not know": (LEDGERS, lambda f: f.payments.pop(1)),
    "a refund that the provider never made": (LEDGERS, lambda f: f.ledger.pop(2)),
    "a charge booked to somebody else": (LEDGERS, lambda f: f.payments[0].update(order_id="2")),
    "a charge made twice": (LEDGERS, lambda f: f.ledger.append(dict(f.ledger[0]))),
    "a completed purchase that paid nothing": (HALF, lambda f: f.ledger.pop(0)),
    "a completed purchase that paid twice": (HALF, lambda f: f.ledger.append(f.ledger[0] | {"key": "k9"})),
    "a completed purchase with tickets only held": (HALF, lambda f: tickets(f, 0, state="held")),
    "a completed purchase without a receipt": (HALF, lambda f: f.receipts.clear()),
    "two receipts": (HALF, lambda f: f.receipts.append(f.receipts[0])),
    "a cancelled purchase with a receipt": (HALF, lambda f: f.receipts.append(RECEIPT | {"order_id": "2"})),
    "a receipt of another amount": (HALF, lambda f: f.receipts[0].update(amount_cents=799)),
    "a receipt of nobody's purchase": (HALF, lambda f: f.receipts.append(RECEIPT | {"order_id": "77"})),
    "a ticket held for nobody's purchase": (HALF, lambda f: tickets(f, 5, state="held", order_id="77")),
    "a charge of nobody's purchase": (HALF, charge_nobody),
    "a cancelled purchase that keeps a ticket": (HALF, lambda f: tickets(f, 5, state="held", order_id="2")),
    "a cancelled purchase that keeps the money": (HALF, lambda f: f.ledger.pop(2)),
    "an effect that never came": (ONCE, lambda f: f.handled.pop()),
    "an effect that came twice": (ONCE, lambda f: f.handled.append(f.handled[3])),
    "an effect of nothing": (ONCE, lambda f: f.handled.append(f.handled[3] | {"order_id": "3"})),
    "an item that was counted twice": (PROJECTIONS, lambda f: f.sales[0].update(sold=6, revenue_cents=800)),
    "an item that is not counted": (PROJECTIONS, lambda f: f.sales.pop(1)),
    "no item counted": (PROJECTIONS, lambda f: f.sales.clear()),
    "an item with two counts": (PROJECTIONS, lambda f: f.sales.append(dict(f.sales[0]))),
    "a count of an item that nobody sells": (PROJECTIONS, lambda f: f.sales.append(f.sales[0] | {"item": "C"})),
    "an item that was held once more": (PROJECTIONS, lambda f: f.sales[1].update(held=2)),
    "a customer who was counted twice": (PROJECTIONS, lambda f: f.customers[1].update(cancelled=3)),
    "a customer whose refund was lost": (PROJECTIONS, lambda f: f.customers[1].update(refunded_cents=0)),
    "a customer who is not counted": (PROJECTIONS, lambda f: f.customers.pop(0)),
    "no customer counted": (PROJECTIONS, lambda f: f.customers.clear()),
    "a customer with two counts": (PROJECTIONS, lambda f: f.customers.append(dict(f.customers[0]))),
    "a customer whom nobody named": (
        PROJECTIONS,
        lambda f: f.customers.append(dict.fromkeys(f.customers[0], 0) | {"customer_id": "eve"}),
    ),
    "an audit entry of nobody's purchase": (AUDIT, lambda f: f.audited.update([("tickets.issued", "purchase/77")])),
    "an audit entry that is gone": (AUDIT, lambda f: f.audited.subtract([("tickets.issued", "purchase/1")])),
    "an audit entry that is there twice": (AUDIT, lambda f: f.audited.update([("payment.refunded", "purchase/2")])),
    "an audit log that is empty": (AUDIT, lambda f: f.audited.clear()),
}


@pytest.mark.parametrize("tampering", TAMPERINGS)
def test_tampering_fails_its_invariant(tampering):
    """Each way of tampering is noticed by the invariant that is there for it, with words."""
    name, tamper = TAMPERINGS[tampering]
    facts = honest()
    tamper(facts)
    (verdict,) = [verdict for verdict in judge(facts) if verdict.name == name]
    assert not verdict.holds
    assert all(verdict.complaints)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        (AUDIT, {"audit_problems": ("entry 3 was changed",)}),
        (AUDIT, {"audit_entries": 0}),
        (AUDIT, {"unsealed": 2}),
        (ONCE, {"given_up": 1}),
    ],
)
def test_what_others_found_fails_its_invariant(name, changes):
    """A log that does not verify, entries outside of it and events that were given up are complaints, too."""
    verdicts = judge(replace(honest(), **changes))
    assert [verdict.name for verdict in verdicts if not verdict.holds] == [name]


def test_every_state_change_has_an_audited_action():
    """The audit invariant looks for exactly the actions that the saga audits."""
    import ast
    from pathlib import Path

    import ticketing

    source = (Path(ticketing.__file__).parent / "saga.py").read_text()
    recorded = {
        node.args[0].value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "record"
        and isinstance(node.args[0], ast.Constant)
    }
    assert recorded | {"payment.captured", "payment.refunded"} == set(STATE_CHANGES)
