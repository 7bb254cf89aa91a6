"""A payment provider that misbehaves: another company's HTTP service, and therefore built without a line of ours.

It keeps its own ledger in a file of its own, durable before every answer, and honours idempotency keys. On top of that
it follows a script, the same for the same seed: it declines, it is slow, it makes the charge and loses the answer, and
every so often it answers nothing but 503 for a while.

    POST /charges                   Idempotency-Key: K   {"order_id": "…", "amount_cents": 1250}
        201 charged · 200 the same again · 402 declined · 409 the key was refunded, perhaps before it was charged
        422 the key belongs to another charge
    POST /charges/K/refund          200 {"charged_cents": 1250, "refunded_cents": 1250}; also where nothing was charged,
                                    and then K is spent: a charge that comes late is refused
    GET  /charges/K                 200 what became of it · 404 never heard of it
    GET  /status                    what it is doing right now, for tests that strike at a bad moment
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import sys
import threading
import time
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

Mood = Literal["well", "declines", "late", "slow", "loses the answer", "loses every answer"]
Answer = tuple[HTTPStatus, dict[str, Any]]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS charges (
    key TEXT PRIMARY KEY,
    order_id TEXT NOT NULL,
    amount_cents INTEGER NOT NULL CHECK (amount_cents >= 0),
    state TEXT NOT NULL CHECK (state IN ('charged', 'declined', 'refunded', 'refused'))
);
CREATE TABLE IF NOT EXISTS ledger (
    entry INTEGER PRIMARY KEY AUTOINCREMENT,
    key TEXT NOT NULL,
    order_id TEXT NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('charge', 'refund')),
    amount_cents INTEGER NOT NULL CHECK (amount_cents > 0)
);
"""


@dataclass(frozen=True, slots=True)
class Behaviour:
    """How badly it behaves; shares are of orders, and the same seed gives the same orders the same fate.

    Args:
        declined: share that is always declined.
        unanswered: share that is made and never answered: the connection drops at every attempt.
        lost: share whose first answer is lost after the charge, or the refund, was made.
        slow: share whose first answer comes `slow_seconds` after the charge was made.
        late: share whose first attempt is made only `slow_seconds` after it was asked for.
        usual_seconds: what half of a charge takes where nothing is wrong.
        burst_every: after so many requests, the next `burst_requests` are answered with 503 (0: never), but no longer
            than `burst_seconds`.
    """

    seed: int = 1
    declined: float = 0.08
    unanswered: float = 0.05
    lost: float = 0.12
    slow: float = 0.08
    late: float = 0.07
    slow_seconds: float = 1.2
    usual_seconds: float = 0.05
    burst_every: int = 40
    burst_requests: int = 12
    burst_seconds: float = 2.0

    def mood(self, order_id: str, attempt: int) -> Mood:
        """What happens to the `attempt`-th request about an order."""
        digest = hashlib.sha256(f"{self.seed}:{order_id}".encode()).digest()
        point = int.from_bytes(digest[:8], "big") / 2**64
        shares: tuple[tuple[Mood, float, bool], ...] = (
            ("declines", self.declined, True),
            ("loses every answer", self.unanswered, True),
            ("loses the answer", self.lost, attempt == 1),
            ("slow", self.slow, attempt == 1),
            ("late", self.late, attempt == 1),
        )
        for mood, share, applies in shares:
            if point < share:
                return mood if applies else "well"
            point -= share
        return "well"


class Ledger:
    """The provider's books: what became of each key, and every movement of money, committed before it is told."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = FULL")
        self._connection.executescript(_SCHEMA)

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def charge(self, key: str, order_id: str, amount_cents: int, *, decline: bool) -> Answer:
        with self._lock, self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            known = self._find(key)
            if known is None:
                state = "declined" if decline else "charged"
                self._connection.execute(
                    "INSERT INTO charges VALUES (?, ?, ?, ?)", (key, order_id, amount_cents, state)
                )
                if not decline:
                    self._book(key, order_id, "charge", amount_cents)
                return _charged(HTTPStatus.CREATED, key, order_id, amount_cents, state)
            if known[1] in {"refused", "refunded"}:
                return HTTPStatus.CONFLICT, {"error": "refunded: this key is spent"}
            if known[:1] + known[2:] != (order_id, amount_cents):
                return HTTPStatus.UNPROCESSABLE_ENTITY, {"error": "the idempotency key belongs to another charge"}
            return _charged(HTTPStatus.OK, key, order_id, amount_cents, known[1])

    def refund(self, key: str, order_id: str) -> Answer:
        with self._lock, self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            known = self._find(key)
            if known is None:
                self._connection.execute("INSERT INTO charges VALUES (?, ?, 0, 'refused')", (key, order_id))
            elif known[1] == "charged":
                self._connection.execute("UPDATE charges SET state = 'refunded' WHERE key = ?", (key,))
                self._book(key, known[0], "refund", known[2])
            charged = known[2] if known is not None and known[1] in {"charged", "refunded"} else 0
            return HTTPStatus.OK, {"key": key, "charged_cents": charged, "refunded_cents": charged}

    def look_up(self, key: str) -> Answer:
        with self._lock:
            known = self._find(key)
        if known is None:
            return HTTPStatus.NOT_FOUND, {"error": "no such charge"}
        return HTTPStatus.OK, {"key": key, "order_id": known[0], "state": known[1], "amount_cents": known[2]}

    def _find(self, key: str) -> tuple[str, str, int] | None:
        row: tuple[str, str, int] | None = self._connection.execute(
            "SELECT order_id, state, amount_cents FROM charges WHERE key = ?", (key,)
        ).fetchone()
        return row

    def _book(self, key: str, order_id: str, kind: str, amount_cents: int) -> None:
        self._connection.execute(
            "INSERT INTO ledger (key, order_id, kind, amount_cents) VALUES (?, ?, ?, ?)",
            (key, order_id, kind, amount_cents),
        )


def _charged(status: HTTPStatus, key: str, order_id: str, amount_cents: int, state: str) -> Answer:
    if state == "declined":
        return HTTPStatus.PAYMENT_REQUIRED, {"error": "declined: the card has had enough"}
    return status, {"key": key, "order_id": order_id, "amount_cents": amount_cents, "state": state}


class Provider(ThreadingHTTPServer):
    """The server, listening as soon as it exists; `serve_forever` answers.

    Args:
        path: the ledger's file; what it holds survives a restart.
        behaviour: how badly to behave.
        port: on 127.0.0.1; 0 takes a free one, `server_address` tells.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, path: Path, behaviour: Behaviour, *, port: int = 0) -> None:
        self.ledger = Ledger(path)
        self.behaviour = behaviour
        self._lock = threading.Lock()
        self._attempts: Counter[str] = Counter()
        self._requests = 0
        self._burst_left = 0
        self._burst_until = 0.0
        self.now: Counter[str] = Counter()  # what it is in the middle of
        self.deeds: Counter[str] = Counter()  # what it has done, by mood
        super().__init__(("127.0.0.1", port), _Handler)

    def server_close(self) -> None:
        super().server_close()
        self.ledger.close()

    @contextmanager
    def busy(self, what: str) -> Generator[None, None, None]:
        """Say in the status that this is going on, for the length of the block."""
        with self._lock:
            self.now[what] += 1
        try:
            yield
        finally:
            with self._lock:
                self.now[what] -= 1

    def did(self, what: str) -> None:
        with self._lock:
            self.deeds[what] += 1

    def attempt(self, order_id: str) -> int:
        """The number of this request about an order, from 1."""
        with self._lock:
            self._attempts[order_id] += 1
            return self._attempts[order_id]

    def overloaded(self) -> bool:
        """Whether this request falls into a burst of 503."""
        with self._lock:
            if self._burst_left and time.monotonic() < self._burst_until:
                self._burst_left -= 1
                return True
            self._requests += 1
            if self.behaviour.burst_every and self._requests % self.behaviour.burst_every == 0:
                self.burst(self.behaviour.burst_requests, self.behaviour.burst_seconds)
            return False

    def burst(self, requests: int, seconds: float) -> None:
        """Answer the next requests with 503, but no longer than this; 0 ends a burst that is under way."""
        self._burst_left, self._burst_until = requests, time.monotonic() + seconds

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed in the middle of its request is no news here; anything else is."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body leave in one packet
    server: Provider

    def do_GET(self) -> None:
        if self.path == "/status":
            self._answer(HTTPStatus.OK, {"now": dict(self.server.now), "deeds": dict(self.server.deeds)})
        else:
            match self.path.split("/"):
                case ["", "charges", key]:
                    self._answer(*self.server.ledger.look_up(unquote(key)))
                case _:
                    self._answer(HTTPStatus.NOT_FOUND, {"error": "no such page"})

    def do_POST(self) -> None:
        try:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
            order_id, amount, key = str(body["order_id"]), body.get("amount_cents"), self.headers.get("Idempotency-Key")
        except (ValueError, LookupError, TypeError, AttributeError):
            self._answer(HTTPStatus.BAD_REQUEST, {"error": "a JSON object with order_id is expected"})
            return
        if self.server.overloaded():
            self.server.did("overloaded")
            self._answer(HTTPStatus.SERVICE_UNAVAILABLE, {"error": "too busy"})
            return
        match self.path.split("/"):
            case ["", "charges"] if key and type(amount) is int and amount > 0:
                self._charge(key, order_id, amount)
            case ["", "charges", key, "refund"]:
                self._refund(unquote(key), order_id)
            case _:
                self._answer(
                    HTTPStatus.BAD_REQUEST, {"error": "no such operation, no Idempotency-Key, or no amount_cents"}
                )

    def _charge(self, key: str, order_id: str, amount_cents: int) -> None:
        provider = self.server
        mood = provider.behaviour.mood(order_id, provider.attempt(order_id))
        with provider.busy("charging"):
            time.sleep(provider.behaviour.slow_seconds if mood == "late" else provider.behaviour.usual_seconds)
            answer = provider.ledger.charge(key, order_id, amount_cents, decline=mood == "declines")
        with provider.busy("unanswered"):  # the money has moved and the answer has not
            time.sleep(provider.behaviour.slow_seconds if mood == "slow" else provider.behaviour.usual_seconds)
        self._end(mood, answer)

    def _refund(self, key: str, order_id: str) -> None:
        provider = self.server
        mood = provider.behaviour.mood(f"{order_id}'s refund", provider.attempt(f"{order_id}'s refund"))
        with provider.busy("refunding"):
            time.sleep(2 * provider.behaviour.usual_seconds)
            answer = provider.ledger.refund(key, order_id)
            time.sleep(provider.behaviour.slow_seconds if mood == "slow" else provider.behaviour.usual_seconds)
        # It has to succeed in the end: what for a charge is for ever, is not for a refund.
        self._end("loses the answer" if mood == "loses the answer" else "well", answer)

    def _end(self, mood: Mood, answer: Answer) -> None:
        self.server.did(mood)
        if mood in {"loses the answer", "loses every answer"}:
            self.close_connection = True
        else:
            self._answer(*answer)

    def _answer(self, status: HTTPStatus, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """It has nothing to say to our terminal."""
