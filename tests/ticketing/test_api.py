"""The HTTP API as a process of its own: what it accepts, how it refuses, and what it tells."""

import asyncio
import json

import httpx
import pytest

from ticketing.demo import DEFAULT_PURCHASES
from ticketing.processes import OfficeProcess, free_port, until_up

TOKEN = "for-the-scrapes-of-this-test"


@pytest.fixture(scope="module")
def office(tmp_path_factory):
    """A client of an API with the default catalogue; no worker and no provider run."""
    directory = tmp_path_factory.mktemp("api")
    port = free_port()
    environment = {
        "MAINSTAY_DATABASE_URL": f"sqlite+aiosqlite:///{directory / 'office.db'}",
        "TICKETING_PURCHASES": str(DEFAULT_PURCHASES),
        "MAINSTAY_OBSERVABILITY_ACCESS_TOKEN": TOKEN,
    }
    api = OfficeProcess("api", f"--port={port}", environment=environment, log=directory / "api.log")
    api.start()
    try:
        asyncio.run(until_up(api, f"http://127.0.0.1:{port}/health/ready"))
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            yield client
    finally:
        stopped = asyncio.run(api.stop())
    assert stopped == 0, "an API that is asked to stop stops in order"


def purchase(order_id: str, **fields) -> bytes:
    lines = [{"item": "MUSEUM", "title": "Night at the museum", "quantity": 1, "unit_price": "7.25"}]
    base = {"customer_id": "ada", "country": "Norway", "placed_at": "6/2/2025 9:00", "lines": lines}
    return json.dumps(base | {"order_id": order_id} | fields).encode()


def test_a_purchase_is_accepted(office):
    """The answer is 202 with the id of a run, which is queued as long as no worker is there."""
    accepted = office.post("/purchases", params={"line": 3}, content=purchase("a1"))
    assert (accepted.status_code, accepted.json()) == (202, {"order_id": "a1", "run_id": "purchase-a1"})
    assert office.get("/purchases/a1").json() == {
        "order_id": "a1",
        "run_id": "purchase-a1",
        "status": "queued",
        "state": "accepted",
        "reason": None,
    }


def test_the_same_line_again_is_the_same_purchase(office):
    """A client that never saw its answer may ask again, and gets the same run."""
    first = office.post("/purchases", params={"line": 3}, content=purchase("a2"))
    again = office.post("/purchases", params={"line": 3}, content=purchase("a2"))
    assert (first.status_code, again.status_code) == (202, 202)
    assert first.json() == again.json()


@pytest.mark.parametrize(("line", "fields"), [(4, {}), (3, {"country": "Sweden"})], ids=["line", "content"])
def test_an_order_id_is_of_one_purchase(office, line, fields):
    """The same order id from another line, or with another content, is a conflict that names line and field."""
    office.post("/purchases", params={"line": 3}, content=purchase("a3"))
    refused = office.post("/purchases", params={"line": line}, content=purchase("a3", **fields))
    assert refused.status_code == 409
    assert refused.json()["code"] == "RES_ORDER_TAKEN"
    (problem,) = refused.json()["errors"]
    assert problem["location"] == [line, "order_id"]


@pytest.mark.parametrize(
    ("body", "field", "message"),
    [
        (b'{"order_id": "b1"', None, "broken JSON at column 18: Expecting ',' delimiter"),
        (purchase("b1", customer_id=None), "customer_id", "is unknown (null)"),
        (purchase("b1", customer_id="mallory"), "customer_id", "there is no customer 'mallory'"),
        (purchase("b1", lines=[]), "lines", "must be a list of 1 to 1000 lines"),
        (b"x" * 5_000_000, None, "a purchase has at most 1,048,576 bytes"),
    ],
    ids=["json", "null", "stranger", "empty", "huge"],
)
def test_a_bad_line_is_refused_by_line_and_field(office, body, field, message):
    """The body of a 422 has the code, the sentence, the correlation id, and each mistake with its line and field."""
    refused = office.post("/purchases", params={"line": 17}, content=body)
    assert refused.status_code == 422
    error = refused.json()
    assert error["code"] == "VAL_PURCHASE"
    assert error["correlation_id"] == refused.headers["x-correlation-id"]
    (problem,) = error["errors"]
    assert problem["location"] == [17, *([field] if field else [])]
    assert problem["message"].startswith(message)
    assert error["detail"].startswith("line 17")


def test_all_that_is_wrong_is_said_at_once(office):
    """Two bad lines are two problems, each under its own field."""
    lines = [
        {"item": "MUSEUM", "title": "x", "quantity": -1, "unit_price": "7.25"},
        {"item": "OPERA", "title": "x", "quantity": 1, "unit_price": "7.25"},
    ]
    refused = office.post("/purchases", content=purchase("b2", lines=lines))
    assert [(problem["location"][1], problem["message"]) for problem in refused.json()["errors"]] == [
        ("lines[0].quantity", "must be 1 or more, not -1"),
        ("lines[1].item", "the catalogue has no item 'OPERA'"),
    ]


def test_nothing_of_a_refused_purchase_is_kept(office):
    """A refused order is unknown afterwards, and its id is free for the one that is right."""
    office.post("/purchases", content=purchase("b3", customer_id=None))
    assert office.get("/purchases/b3").status_code == 404
    assert office.post("/purchases", content=purchase("b3")).status_code == 202


def test_health_and_metrics_are_served(office):
    """Probes and Prometheus find what they look for, with the route's template and not its value."""
    assert office.get("/health/live").status_code == 200
    office.get("/purchases/nobody")
    assert office.get("/metrics").status_code == 404  # it names what the office depends on
    metrics = office.get("/metrics", headers={"authorization": f"Bearer {TOKEN}"}).text
    assert 'mainstay_http_requests_total{method="GET",route="/purchases/{order_id}",status="404"}' in metrics
    assert "nobody" not in metrics
