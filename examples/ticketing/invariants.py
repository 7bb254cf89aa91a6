"""What must hold at the end, whatever was killed on the way: recounted from raw rows, not as the office believes.

`Facts` are the rows of the office's database and of the provider's ledger, and the purchases file as it stands on disk.
Each invariant is a function from facts to complaints; no complaint means that it holds.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

Row = dict[str, Any]
STATE_CHANGES = (
    "purchase.accepted",
    "tickets.held",
    "tickets.issued",
    "tickets.released",
    "payment.captured",
    "payment.refunded",
    "purchase.completed",
    "purchase.cancelled",
)


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything the invariants look at.

    Attributes:
        file: the file's lines by number: the JSON object, with fractions as they were written, in bytes; or None.
        answers: what the API said to each line: the order it accepted, or None for a line it refused.
        items, tickets, purchases, payments, sales, customers, receipts, handled: rows of the office's tables.
        ledger: rows of the provider's ledger.
        audit_entries: how many audit entries the verifier has checked.
        audit_problems: what the verifier found wrong with the log.
        audited: how many entries there are by (action, resource).
        unsealed: audit entries that the log does not have yet.
        published: how many events are in the log, or in the topic.
        given_up: events that are dead letters, and keys that are parked behind one that failed.
    """

    file: dict[int, Row | None]
    answers: dict[int, str | None]
    items: list[Row]
    tickets: list[Row]
    purchases: list[Row]
    payments: list[Row]
    sales: list[Row]
    customers: list[Row]
    receipts: list[Row]
    handled: list[Row]
    ledger: list[Row]
    audit_entries: int = 0
    audit_problems: tuple[str, ...] = ()
    audited: Counter[tuple[str, str]] = field(default_factory=Counter)
    unsealed: int = 0
    published: int = 0
    given_up: int = 0

    def lines_of(self, purchase: Row) -> list[tuple[str, int, int]]:
        """(item, quantity, price in cents) of each line, as the file has them."""
        document = self.file.get(purchase["line"]) or {"lines": []}
        return [(entry["item"], entry["quantity"], _cents(entry["unit_price"])) for entry in document["lines"]]

    def demand(self) -> tuple[Counter[str], set[str]]:
        """How many of each item the file's good lines ask for, and the items to which one of them gives a title."""
        demand: Counter[str] = Counter()
        titled: set[str] = set()
        for document in self.file.values():
            for entry in _good_lines(document):
                demand[entry["item"]] += entry["quantity"]
                if entry.get("title") is not None:
                    titled.add(entry["item"])
        return demand, titled

    def named(self) -> set[str]:
        """The customers of the file, also of lines that were refused."""
        customers = (document.get("customer_id") for document in self.file.values() if document is not None)
        return {customer for customer in customers if _is_id(customer)}

    def in_state(self, state: str) -> list[Row]:
        return [purchase for purchase in self.purchases if purchase["state"] == state]


@dataclass(frozen=True, slots=True)
class Verdict:
    """One invariant, and everything that speaks against it."""

    name: str
    complaints: tuple[str, ...]

    @property
    def holds(self) -> bool:
        return not self.complaints


def every_line_accounted_for(facts: Facts) -> Iterator[str]:
    """Each line was answered; what was accepted is a purchase that came to an end, and nothing else is."""
    for line in facts.file:
        if line not in facts.answers:
            yield f"line {line} was never answered"
    accepted = Counter((line, order) for line, order in facts.answers.items() if order is not None)
    booked = Counter((purchase["line"], purchase["order_id"]) for purchase in facts.purchases)
    for line, order in accepted - booked:
        yield f"line {line} was accepted as order {order}, and there is no such purchase"
    for line, order in booked - accepted:
        yield f"order {order} is in the books, and line {line} was not accepted as it"
    for purchase in facts.purchases:
        if purchase["state"] not in {"completed", "cancelled"}:
            yield f"order {purchase['order_id']} has stopped at {purchase['state']}"
        total = sum(quantity * cents for _, quantity, cents in facts.lines_of(purchase))
        if total != purchase["total_cents"]:
            ours = _money(purchase["total_cents"])
            yield f"order {purchase['order_id']} is {ours} in the books and {_money(total)} in the file"


def no_ticket_sold_twice(facts: Facts) -> Iterator[str]:
    """Every ticket exists once and has one owner, and every buyer has exactly the tickets that were asked for."""
    numbers = Counter((ticket["item"], ticket["serial"]) for ticket in facts.tickets)
    for (item, serial), count in numbers.items():
        if count > 1:
            yield f"ticket {serial} of {item} is there {count} times"
    owned: dict[str, Counter[tuple[str, int]]] = defaultdict(Counter)
    for ticket in facts.tickets:
        if ticket["state"] == "issued":
            owned[ticket["order_id"]][ticket["item"], ticket["price_cents"]] += 1
    for purchase in facts.in_state("completed"):
        wanted: Counter[tuple[str, int]] = Counter()
        for item, quantity, cents in facts.lines_of(purchase):
            wanted[item, cents] += quantity
        if owned.pop(purchase["order_id"], Counter()) != wanted:
            yield f"order {purchase['order_id']} does not have exactly the tickets it bought"
    for order, tickets in owned.items():
        yield f"order {order} did not complete and has {tickets.total()} tickets"


def stock_never_negative(facts: Facts) -> Iterator[str]:
    """Stock is nine tenths of the file's demand, and what is left plus what is taken is the stock, item by item."""
    demand, titled = facts.demand()
    stock = {item: demand[item] * 9 // 10 for item in titled}
    yield from _differences("the stock of", [(item["item"], item["stock"]) for item in facts.items], stock)
    taken = Counter(ticket["item"] for ticket in facts.tickets if ticket["state"] != "free")
    printed = Counter(ticket["item"] for ticket in facts.tickets)
    for item in facts.items:
        name = item["item"]
        if item["free"] < 0 or taken[name] > item["stock"]:
            yield f"{name} is oversold: {taken[name]} of {item['stock']}, {item['free']} left"
        if printed[name] != item["stock"] or item["free"] + taken[name] != item["stock"]:
            yield f"{name}: {item['free']} left and {taken[name]} taken do not make {item['stock']}"


def ledgers_agree(facts: Facts) -> Iterator[str]:
    """Every movement of money is in both ledgers, once, with the same amount."""
    ours = Counter((row["key"], row["order_id"], row["kind"], row["amount_cents"]) for row in facts.payments)
    theirs = Counter((row["key"], row["order_id"], row["kind"], row["amount_cents"]) for row in facts.ledger)
    for key, order, kind, cents in (theirs - ours).elements():
        yield f"the provider has a {kind} of {_money(cents)} for order {order}, {key}, that the office does not know"
    for key, order, kind, cents in (ours - theirs).elements():
        yield f"the office has a {kind} of {_money(cents)} for order {order}, {key}, that the provider does not know"


def no_purchase_half_done(facts: Facts) -> Iterator[str]:
    """Completed: held, charged once, issued, one receipt. Cancelled, or nobody's: no tickets, no money, no receipt."""
    paid: Counter[str] = Counter()
    charges: Counter[str] = Counter()
    for row in facts.ledger:
        paid[row["order_id"]] += row["amount_cents"] if row["kind"] == "charge" else -row["amount_cents"]
        charges[row["order_id"]] += row["kind"] == "charge"
    receipts = defaultdict[str, list[int]](list)
    for row in facts.receipts:
        receipts[row["order_id"]].append(row["amount_cents"])
    tickets: dict[str, Counter[str]] = defaultdict(Counter)
    for ticket in facts.tickets:
        if ticket["order_id"] is not None:
            tickets[ticket["order_id"]][ticket["state"]] += 1
    strangers = {*paid, *receipts, *tickets} - {purchase["order_id"] for purchase in facts.purchases}
    for purchase in [*facts.purchases, *({"order_id": order, "state": "unknown"} for order in sorted(strangers))]:
        order = purchase["order_id"]
        if purchase["state"] == "completed":
            quantity = sum(quantity for _, quantity, _ in facts.lines_of(purchase))
            if tickets[order] != Counter({"issued": quantity}):
                yield f"order {order} completed with {dict(tickets[order])} tickets of {quantity}"
            if paid[order] != purchase["total_cents"] or charges[order] != 1:
                yield f"order {order} completed and paid {_money(paid[order])} of {_money(purchase['total_cents'])}"
            if receipts[order] != [purchase["total_cents"]]:
                amounts = ", ".join(map(_money, receipts[order]))
                yield f"order {order} of {_money(purchase['total_cents'])} has receipts of: {amounts or 'nothing'}"
        else:
            if tickets[order]:
                yield f"order {order} is {purchase['state']} and keeps {tickets[order].total()} tickets"
            if paid[order]:
                yield f"order {order} is {purchase['state']} and paid {_money(paid[order])}"
            if receipts[order]:
                yield f"order {order} is {purchase['state']} and has a receipt"


def effects_exactly_once(facts: Facts) -> Iterator[str]:
    """Every event that must have been, as told by the books, had its effect in each group that listens, once."""
    expected: Counter[tuple[str, str, str]] = Counter()
    for purchase in facts.purchases:
        order = purchase["order_id"]
        if purchase["tickets_held"]:
            expected["sales", "tickets.held", order] += 1
        if purchase["state"] == "completed":
            for group in ("sales", "customers", "receipts"):
                expected[group, "purchase.completed", order] += 1
        if purchase["state"] == "cancelled":
            expected["customers", "purchase.cancelled", order] += 1
    for row in facts.payments:
        event = {"charge": "payment.captured", "refund": "payment.refunded"}[row["kind"]]
        expected["customers", event, row["order_id"]] += 1
    happened = Counter((row["consumer"], row["event_type"], row["order_id"]) for row in facts.handled)
    for key in expected.keys() | happened.keys():
        if happened[key] != expected[key]:
            group, event, order = key
            yield f"{event} of order {order} had its effect in {group} {happened[key]} times, not {expected[key]}"
    if facts.given_up:
        yield f"{facts.given_up} events were given up, as dead letters or parked"


def projections_equal_recount(facts: Facts) -> Iterator[str]:
    """Sales per item and purchases per customer, each once, are what a count of the rows themselves gives."""
    held: Counter[str] = Counter()
    sold: Counter[str] = Counter()
    revenue: Counter[str] = Counter()
    for purchase in facts.purchases:
        for item, quantity, cents in facts.lines_of(purchase):
            held[item] += quantity if purchase["tickets_held"] else 0
            if purchase["state"] == "completed":
                sold[item] += quantity
                revenue[item] += quantity * cents
    yield from _differences(
        "held, sold and cents of",
        [(row["item"], (row["held"], row["sold"], row["revenue_cents"])) for row in facts.sales],
        {item: (held[item], sold[item], revenue[item]) for item in facts.demand()[1] | held.keys()},
    )
    customer_of = {purchase["order_id"]: purchase["customer_id"] for purchase in facts.purchases}
    ended = Counter((purchase["customer_id"], purchase["state"]) for purchase in facts.purchases)
    moved: Counter[tuple[str | None, str]] = Counter()
    for row in facts.ledger:
        moved[customer_of.get(row["order_id"]), row["kind"]] += row["amount_cents"]
    columns = ("completed", "cancelled", "paid_cents", "refunded_cents")
    yield from _differences(
        "completed, cancelled, paid and refunded of customer",
        [(row["customer_id"], tuple(row[column] for column in columns)) for row in facts.customers],
        {
            who: (ended[who, "completed"], ended[who, "cancelled"], moved[who, "charge"], moved[who, "refund"])
            for who in facts.named() | set(customer_of.values())
        },
    )


def audit_chain_intact(facts: Facts) -> Iterator[str]:
    """The log verifies, and every change of a purchase's state is in it exactly once, and no other."""
    yield from facts.audit_problems
    if facts.purchases and not facts.audit_entries:
        yield "the audit log is empty"
    if facts.unsealed:
        yield f"{facts.unsealed} audit entries are not in the log yet"
    expected: Counter[tuple[str, str]] = Counter()
    for purchase in facts.purchases:
        actions = ["purchase.accepted", f"purchase.{purchase['state']}"]
        if purchase["tickets_held"]:
            actions.append("tickets.held")
        if purchase["state"] == "completed":
            actions.append("tickets.issued")
        elif purchase["tickets_held"]:
            actions.append("tickets.released")
        expected.update((action, f"purchase/{purchase['order_id']}") for action in actions)
    for row in facts.payments:
        action = {"charge": "payment.captured", "refund": "payment.refunded"}[row["kind"]]
        expected[action, f"purchase/{row['order_id']}"] += 1
    changes = {key for key in facts.audited if key[0] in STATE_CHANGES}
    for action, resource in sorted(expected.keys() | changes):
        if (times := facts.audited[action, resource]) != (wanted := expected[action, resource]):
            yield f"{action} of {resource} was audited {times} times, not {wanted}"


INVARIANTS: dict[str, Callable[[Facts], Iterator[str]]] = {
    "every line of the file accounted for": every_line_accounted_for,
    "no ticket sold twice": no_ticket_sold_twice,
    "stock never negative": stock_never_negative,
    "office and provider ledgers agree to the cent": ledgers_agree,
    "no purchase half done": no_purchase_half_done,
    "each event's effect exactly once": effects_exactly_once,
    "projections equal a recount": projections_equal_recount,
    "audit chain intact, every state change in it": audit_chain_intact,
}


def judge(facts: Facts) -> list[Verdict]:
    """The verdict on every invariant."""
    return [Verdict(name, tuple(check(facts))) for name, check in INVARIANTS.items()]


def _differences(what: str, rows: list[tuple[str, Hashable]], counted: Mapping[str, Hashable]) -> Iterator[str]:
    """A complaint about each key whose rows are not exactly one, with what was counted; also where there is no row."""
    there, wanted = Counter(rows), Counter(counted.items())
    for key in sorted({key for key, _ in (there - wanted) | (wanted - there)}):
        found = " and ".join(str(value) for name, value in rows if name == key) or "nowhere"
        yield f"{what} {key}: {found} in the books, {counted.get(key, 'nowhere')} by the recount"


def _good_lines(document: Row | None) -> Iterator[Row]:
    """The lines of an object from the file that ask for something; a second, plainer reading than the office's own."""
    lines = document.get("lines") if document is not None else None
    for entry in lines if isinstance(lines, list) else ():
        if isinstance(entry, dict) and _is_id(entry.get("item")) and _is_title(entry.get("title")):
            quantity = entry.get("quantity")
            if type(quantity) is int and 0 < quantity <= 10_000 and _cents(entry.get("unit_price")) > 0:
                yield entry


def _is_id(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and bool(re.fullmatch(r"[\w.-]{1,40}", value, re.ASCII)) and bool(value.strip("."))


def _is_title(value: object) -> bool:
    if value is None:
        return True
    return isinstance(value, str) and bool(re.fullmatch(r"[^\x00-\x1f\x7f\ud800-\udfff]{1,200}", value))


def _cents(price: object) -> int:
    """0 for what is no price."""
    written = price.decode() if isinstance(price, bytes) else str(price)
    if not re.fullmatch(r"\d{1,7}(\.\d{1,2})?", written, re.ASCII):
        return 0
    whole, _, cents = written.partition(".")
    return int(f"{whole}{cents:0<2}")


def _money(cents: int) -> str:
    return f"{cents // 100:,}.{cents % 100:02}" if cents >= 0 else f"-{_money(-cents)}"
