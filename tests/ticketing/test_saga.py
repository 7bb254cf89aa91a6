"""One purchase at a time, with a provider that does exactly one thing wrong: what the saga makes of it."""

import asyncio
import json
import sqlite3
import threading
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from ticketing.demo import DEFAULT_PURCHASES
from ticketing.processes import OfficeProcess, free_port, until_up
from ticketing.provider import Behaviour, Provider

WELL = Behaviour(declined=0, unanswered=0, lost=0, slow=0, late=0, burst_every=0, usual_seconds=0)


@dataclass
class Office:
    """API and worker as processes, and a provider whose behaviour a test chooses."""

    client: httpx.Client
    directory: Path
    provider: Provider

    def query(self, database: str, statement: str, *values: str) -> list[tuple[object, ...]]:
        with closing(sqlite3.connect(self.directory / database)) as connection, connection:
            return connection.execute(statement, values).fetchall()

    def buy(self, order_id: str, *, quantity: int = 2) -> None:
        lines = [{"item": "MUSEUM", "title": "Night at the museum", "quantity": quantity, "unit_price": "7.25"}]
        body = {"order_id": order_id, "customer_id": "ada", "country": "Norway", "placed_at": "6/2/2025 9:00"}
        answer = self.client.post("/purchases", content=json.dumps(body | {"lines": lines}))
        assert answer.status_code == 202, answer.text

    def end_of(self, order_id: str, seconds: float = 60.0) -> dict[str, str | None]:
        """The purchase, once its run has ended."""
        deadline = time.monotonic() + seconds
        while True:
            purchase: dict[str, str | None] = self.client.get(f"/purchases/{order_id}").json()
            if purchase["status"] in {"completed", "failed"}:
                return purchase
            assert time.monotonic() < deadline, purchase
            time.sleep(0.05)

    def booked(self, order_id: str) -> list[tuple[object, ...]]:
        """The movements of money in the provider's ledger, once it is seen that the office's has the same."""
        what = "SELECT kind, amount_cents FROM {} WHERE order_id = ? ORDER BY kind"
        ours = self.query("office.db", what.format("ticketing_payments"), order_id)
        theirs = self.query("ledger.sqlite3", what.format("ledger"), order_id)
        assert ours == theirs
        return theirs

    def tickets(self, order_id: str) -> list[tuple[object, ...]]:
        return self.query("office.db", "SELECT state FROM ticketing_tickets WHERE order_id = ?", order_id)


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """The office, started once for all tests of this file."""
    directory = tmp_path_factory.mktemp("saga")
    port = free_port()
    provider = Provider(directory / "ledger.sqlite3", WELL)
    serving = threading.Thread(target=provider.serve_forever, kwargs={"poll_interval": 0.01})
    serving.start()
    environment = {
        "MAINSTAY_DATABASE_URL": f"sqlite+aiosqlite:///{directory / 'office.db'}",
        "TICKETING_PROVIDER_URL": f"http://127.0.0.1:{provider.server_port}",
    }
    selling = environment | {"TICKETING_PURCHASES": str(DEFAULT_PURCHASES)}
    api = OfficeProcess("api", f"--port={port}", environment=selling, log=directory / "api.log")
    worker = OfficeProcess("worker", environment=environment, log=directory / "worker.log")
    try:
        api.start()
        worker.start()
        asyncio.run(until_up(api, f"http://127.0.0.1:{port}/health/ready"))
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            yield Office(client, directory, provider)
    finally:
        for process in (worker, api):
            process.end()
        provider.shutdown()
        serving.join()
        provider.server_close()


@pytest.fixture
def office(running):
    """The office with a provider that behaves."""
    running.provider.behaviour = WELL
    yield running
    running.provider.burst(requests=0, seconds=0)


def test_a_purchase_completes(office):
    """Two tickets are issued, both ledgers have the one charge, and the receipt follows the event."""
    office.buy("s1")
    assert office.end_of("s1")["state"] == "completed"
    assert office.booked("s1") == [("charge", 1450)]
    assert office.tickets("s1") == [("issued",), ("issued",)]


def test_a_sold_out_purchase_leaves_nothing(office):
    """More than there is cannot be held: no ticket, no money, and the reason is said."""
    office.buy("s2", quantity=1000)
    ended = office.end_of("s2")
    assert (ended["state"], ended["reason"]) == ("cancelled", "sold out")
    assert office.booked("s2") == []
    assert office.tickets("s2") == []


def test_a_declined_purchase_gives_its_tickets_back(office):
    """A decline is certain: nothing is refunded, because nothing was charged."""
    office.provider.behaviour = Behaviour(declined=1, burst_every=0)
    office.buy("s3")
    ended = office.end_of("s3")
    assert (ended["state"], ended["reason"]) == ("cancelled", "payment declined")
    assert office.booked("s3") == []
    assert office.tickets("s3") == []
    assert office.query("ledger.sqlite3", "SELECT state FROM charges WHERE order_id = 's3'") == [("declined",)]


def test_a_charge_without_an_answer_is_refunded(office):
    """The money moved and nobody ever said so: the refund finds it, and both ledgers tell the same story."""
    office.provider.behaviour = Behaviour(declined=0, unanswered=1, burst_every=0)
    office.buy("s4")
    ended = office.end_of("s4")
    assert (ended["state"], ended["reason"]) == ("cancelled", "charge unknown")
    assert office.booked("s4") == [("charge", 1450), ("refund", 1450)]
    assert office.tickets("s4") == []
    assert office.query("ledger.sqlite3", "SELECT state FROM charges WHERE order_id = 's4'") == [("refunded",)]


def test_a_charge_that_never_arrived_is_refunded_too(office):
    """Nothing but 503: whether a charge is still on its way is unknown, so its key is spent, and no money moves."""
    office.provider.burst(requests=1_000_000, seconds=1_000)
    office.buy("s5")
    deadline = time.monotonic() + 60
    while office.client.get("/purchases/s5").json()["reason"] != "charge unknown":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    office.provider.burst(requests=0, seconds=0)
    assert office.end_of("s5")["state"] == "cancelled"
    assert office.booked("s5") == []
    assert office.query("ledger.sqlite3", "SELECT state FROM charges WHERE order_id = 's5'") == [("refused",)]


def test_a_charge_that_is_done_is_undone_when_a_later_step_fails(office):
    """Where the tickets cannot be issued, the charge that succeeded is refunded, and the tickets are free again."""
    refuse = "CREATE TRIGGER refuse BEFORE UPDATE ON ticketing_tickets WHEN NEW.state = 'issued' BEGIN {} END"
    office.query("office.db", refuse.format("SELECT RAISE(ABORT, 'the printer is broken');"))
    try:
        office.buy("s6")
        ended = office.end_of("s6")
    finally:
        office.query("office.db", "DROP TRIGGER refuse")
    assert ended["state"] == "cancelled"
    assert str(ended["reason"]).startswith("issue ")
    assert office.booked("s6") == [("charge", 1450), ("refund", 1450)]
    assert office.tickets("s6") == []


def test_slow_answers_are_waited_for_once(office):
    """An answer that comes too late is a failed attempt, not a second charge."""
    office.provider.behaviour = Behaviour(declined=0, unanswered=0, lost=0, slow=1, late=0, burst_every=0)
    office.buy("s7")
    assert office.end_of("s7")["state"] == "completed"
    assert office.booked("s7") == [("charge", 1450)]
