"""The misbehaving provider: it may be slow, rude and forgetful, but its books are always right."""

import http.client
import json
import sqlite3
import threading
import time

import pytest

from ticketing.provider import Behaviour, Provider

WELL = Behaviour(declined=0, unanswered=0, lost=0, slow=0, late=0, burst_every=0)


class Client:
    """The plainest client there is, so that nothing of ours smooths over what the provider does."""

    def __init__(self, provider: Provider) -> None:
        self.port = provider.server_port

    def ask(self, method: str, path: str, body=None, *, key: str | None = None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            headers = {} if key is None else {"Idempotency-Key": key}
            connection.request(method, path, body if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def charge(self, key: str, cents: int = 500, order_id: str = "1"):
        return self.ask("POST", "/charges", {"order_id": order_id, "amount_cents": cents}, key=key)

    def refund(self, key: str, order_id: str = "1"):
        return self.ask("POST", f"/charges/{key}/refund", {"order_id": order_id})


@pytest.fixture
def provider(tmp_path):
    """A function that starts a provider with a script, on the same ledger every time; all are stopped afterwards."""
    running: list[tuple[Provider, threading.Thread]] = []

    def start(behaviour: Behaviour = WELL) -> Client:
        server = Provider(tmp_path / "ledger.sqlite3", behaviour)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        running.append((server, thread))
        return Client(server)

    yield start
    for server, thread in running:
        server.shutdown()
        thread.join()
        server.server_close()


def booked(tmp_path) -> list[tuple[str, str, int]]:
    with sqlite3.connect(tmp_path / "ledger.sqlite3") as connection:
        rows = connection.execute("SELECT key, kind, amount_cents FROM ledger ORDER BY entry").fetchall()
    connection.close()
    return rows


def test_a_key_charges_once(provider, tmp_path):
    """The same key a second time gets the same answer and moves no money, also after a restart."""
    assert provider().charge("k")[0] == 201
    assert provider().charge("k") == (200, {"key": "k", "order_id": "1", "amount_cents": 500, "state": "charged"})
    assert booked(tmp_path) == [("k", "charge", 500)]


def test_a_key_belongs_to_one_charge(provider, tmp_path):
    """A key that comes back with another amount is a mistake of the caller, not a charge."""
    client = provider()
    client.charge("k", 500)
    assert client.charge("k", 501)[0] == 422
    assert booked(tmp_path) == [("k", "charge", 500)]


def test_a_refund_happens_once(provider, tmp_path):
    """Asking twice for a refund says the same twice and pays once; a later charge with that key is refused."""
    client = provider()
    client.charge("k")
    refunded = (200, {"key": "k", "charged_cents": 500, "refunded_cents": 500})
    assert [client.refund("k"), client.refund("k")] == [refunded, refunded]
    assert client.charge("k")[0] == 409
    assert booked(tmp_path) == [("k", "charge", 500), ("k", "refund", 500)]


def test_a_refund_before_the_charge_spends_the_key(provider, tmp_path):
    """Where nothing was charged a refund moves nothing, and a charge that was still on its way cannot land."""
    client = provider()
    assert client.refund("k") == (200, {"key": "k", "charged_cents": 0, "refunded_cents": 0})
    assert client.charge("k")[0] == 409
    assert booked(tmp_path) == []


def test_a_late_charge_loses_against_its_refund(provider, tmp_path):
    """The charge is asked for first and made later; the refund in between wins."""
    client = provider(Behaviour(late=1, declined=0, unanswered=0, lost=0, slow=0, slow_seconds=0.5, burst_every=0))
    answers = []
    charging = threading.Thread(target=lambda: answers.append(client.charge("k")))
    charging.start()
    wait_until(lambda: client.ask("GET", "/status")[1]["now"].get("charging") == 1)
    client.refund("k")
    charging.join()
    assert answers[0][0] == 409
    assert booked(tmp_path) == []


@pytest.mark.parametrize(("script", "lasting"), [({"lost": 1}, False), ({"unanswered": 1}, True)])
def test_a_lost_answer_is_a_charge_all_the_same(provider, tmp_path, script, lasting):
    """The connection drops after the money moved: once for a lost answer, every time for an unanswered charge."""
    client = provider(
        Behaviour(**({"declined": 0, "unanswered": 0, "lost": 0, "slow": 0, "late": 0} | script), burst_every=0)
    )
    with pytest.raises(http.client.RemoteDisconnected):
        client.charge("k")
    if lasting:
        with pytest.raises(http.client.RemoteDisconnected):
            client.charge("k")
    else:
        assert client.charge("k")[0] == 200
    assert client.ask("GET", "/charges/k") == (
        200,
        {"key": "k", "order_id": "1", "amount_cents": 500, "state": "charged"},
    )
    assert booked(tmp_path) == [("k", "charge", 500)]


def test_a_decline_stays_a_decline(provider, tmp_path):
    """A declined key is declined at every attempt, and its refund has nothing to give back."""
    client = provider(Behaviour(declined=1, burst_every=0))
    assert [client.charge("k")[0], client.charge("k")[0]] == [402, 402]
    assert client.refund("k")[1]["refunded_cents"] == 0
    assert booked(tmp_path) == []


def test_bursts_of_503_come_and_go(provider):
    """Every third request starts a burst of two; what was refused then moved no money and works afterwards."""
    client = provider(Behaviour(declined=0, unanswered=0, lost=0, slow=0, late=0, burst_every=3, burst_requests=2))
    assert [client.charge(f"k{number}")[0] for number in range(8)] == [201, 201, 201, 503, 503, 201, 201, 201]


def test_the_script_is_the_same_for_the_same_seed():
    """Moods depend on seed, order and attempt alone, and come in about the shares that were asked for."""
    script = Behaviour(seed=5)
    first = [script.mood(str(order), 1) for order in range(4000)]
    assert first == [Behaviour(seed=5).mood(str(order), 1) for order in range(4000)]
    assert first != [Behaviour(seed=6).mood(str(order), 1) for order in range(4000)]
    assert abs(first.count("declines") / 4000 - script.declined) < 0.02
    assert abs(first.count("loses the answer") / 4000 - script.lost) < 0.02
    second = {script.mood(str(order), 2) for order in range(4000)}
    assert second == {"well", "declines", "loses every answer"}


@pytest.mark.parametrize(
    ("path", "body", "key"),
    [
        ("/charges", {"order_id": "1", "amount_cents": 5}, None),
        ("/charges", {"order_id": "1", "amount_cents": -5}, "k"),
        ("/charges", {"order_id": "1", "amount_cents": True}, "k"),
        ("/charges", {"amount_cents": 5}, "k"),
        ("/charges", [], "k"),
        ("/nonsense", {"order_id": "1"}, "k"),
    ],
)
def test_nonsense_is_refused(provider, tmp_path, path, body, key):
    """A request without key, order or positive amount is answered with 400 and moves nothing."""
    assert provider().ask("POST", path, body, key=key)[0] == 400
    assert booked(tmp_path) == []


def wait_until(condition, seconds: float = 60.0) -> None:
    """Poll until the condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not come true"
        time.sleep(0.005)
