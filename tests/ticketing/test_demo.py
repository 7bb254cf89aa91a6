"""The demo itself: on both engines, with bad input, and with books that somebody has cooked afterwards."""

import asyncio
import io
import os
import socket
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from rich.console import Console

import mainstay_servers
from mainstay_servers import Pair
from tests.ticketing.forked import restarts_forked
from ticketing import demo
from ticketing.demo import MOMENTS, NOTHING_GOING_ON, Outcome, Script, perform, play
from ticketing.facts import Sources, read_facts
from ticketing.invariants import INVARIANTS, judge
from ticketing.processes import OfficeProcess, ProcessFailed, free_port, until_up

LINES, TICKETS, STOCK, LEDGERS, HALF, ONCE, PROJECTIONS, AUDIT = INVARIANTS


def quiet() -> Console:
    return Console(file=io.StringIO(), width=100)


def complaints(outcome: Outcome) -> list[str]:
    return [f"{verdict.name}: {text}" for verdict in outcome.verdicts for text in verdict.complaints]


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """The demo with its own purchases on SQLite, the worker killed twenty times, and everything it left on disk."""
    with restarts_forked():
        return asyncio.run(perform(Script(kills=20), tmp_path_factory.mktemp("embedded"), quiet()))


def test_every_invariant_holds_embedded(embedded):
    """Nothing is lost, doubled or left half done by a kill almost once a purchase, as the rows that are left tell."""
    assert complaints(embedded) == []


def test_every_line_came_to_its_end(embedded):
    """25 purchases were accepted and came to an end; each bad line was refused, and for its own reason."""
    assert len(embedded.story.accepted) == 25
    assert len(embedded.facts.in_state("completed")) + len(embedded.facts.in_state("cancelled")) == 25
    assert embedded.story.reasons == {
        "unknown customer": 1,
        "bad quantity": 1,
        "broken JSON": 1,
        "unknown item": 1,
        "order id taken": 1,
        "bad unit_price": 1,
        "bad lines": 1,
    }


def test_the_worker_was_killed_at_bad_moments(embedded):
    """Twenty kills, and at least twelve of them while something was certainly going on."""
    kills = embedded.story.kills
    assert kills.total() == 20
    assert kills.keys() <= {name for name, *_ in MOMENTS} | {NOTHING_GOING_ON}
    assert kills.total() - kills[NOTHING_GOING_ON] >= 12


def test_the_story_had_all_that_it_is_about(embedded):
    """Sold out, declined and unknown charges, refunds, bursts: a demo in which nothing goes wrong shows nothing."""
    reasons = Counter(purchase["reason"] for purchase in embedded.facts.in_state("cancelled"))
    assert reasons.keys() <= {"sold out", "payment declined", "charge unknown"}
    assert reasons["sold out"] >= 3
    assert reasons["payment declined"] + reasons["charge unknown"] >= 2
    assert sum(count for deed, count in embedded.story.provider.items() if deed != "well") >= 5
    assert embedded.facts.audit_entries > 100


def test_events_are_published_once(embedded):
    """Where events are rows of the same database, the log has each exactly once, however often a step was attempted."""
    handled = {(row["event_type"], row["order_id"]) for row in embedded.facts.handled}
    assert embedded.facts.published == len(handled)


# What somebody might do to the office's database or to the provider's ledger, and the invariant that must say so.
TAMPERINGS = {
    "sell a ticket a second time": (
        TICKETS,
        (
            "UPDATE ticketing_tickets "
            "SET order_id = (SELECT max(order_id) FROM ticketing_purchases WHERE state = 'completed') "
            "WHERE (item, serial) = (SELECT item, serial FROM ticketing_tickets WHERE state = 'issued' "
            "AND order_id = (SELECT min(order_id) FROM ticketing_purchases WHERE state = 'completed') LIMIT 1)"
        ),
    ),
    "lose a ticket": (STOCK, "DELETE FROM ticketing_tickets WHERE item = 'MUSEUM' AND serial = 66"),
    "print more stock": (STOCK, "UPDATE ticketing_items SET stock = stock + 1, free = free + 1 WHERE item = 'MUSEUM'"),
    "pocket a cent": (LEDGERS, "UPDATE ticketing_payments SET amount_cents = amount_cents - 1 WHERE kind = 'charge'"),
    "forget a refund": (LEDGERS, "DELETE FROM ticketing_payments WHERE kind = 'refund'"),
    "complete a cancelled purchase": (
        HALF,
        (
            "UPDATE ticketing_purchases SET state = 'completed' WHERE order_id = "
            "(SELECT min(order_id) FROM ticketing_purchases WHERE reason = 'sold out')"
        ),
    ),
    "leave a purchase half done": (
        LINES,
        (
            "UPDATE ticketing_purchases SET state = 'charged' WHERE order_id = "
            "(SELECT min(order_id) FROM ticketing_purchases WHERE state = 'completed')"
        ),
    ),
    "lose a purchase": (LINES, "DELETE FROM ticketing_purchases WHERE state = 'cancelled'"),
    "send a receipt twice": (
        HALF,
        (
            "INSERT INTO ticketing_receipts (order_id, amount_cents, text) "
            "SELECT order_id, amount_cents, text FROM ticketing_receipts LIMIT 1"
        ),
    ),
    "handle an event twice": (
        ONCE,
        (
            "INSERT INTO ticketing_handled (consumer, event_type, order_id) "
            "SELECT consumer, event_type, order_id FROM ticketing_handled LIMIT 1"
        ),
    ),
    "give an event up": (
        ONCE,
        "DELETE FROM ticketing_handled WHERE consumer = 'sales' AND event_type = 'tickets.held'",
    ),
    "count a sale twice": (PROJECTIONS, "UPDATE ticketing_sales SET sold = 2 * sold WHERE item = 'MUSEUM'"),
    "mix up customers": (
        PROJECTIONS,
        "UPDATE ticketing_customers SET completed = completed + 1 WHERE customer_id = 'ada'",
    ),
    "change an audit entry": (
        AUDIT,
        (
            "UPDATE mainstay_audit_log SET data = CAST(replace(CAST(data AS TEXT), 'succeeded', 'succeedeD') AS BLOB) "
            "WHERE leaf = 3"
        ),
    ),
    "delete an audit entry": (AUDIT, "DELETE FROM mainstay_audit_log WHERE leaf = 3"),
    "cut the audit log short": (AUDIT, "DELETE FROM mainstay_audit_log WHERE leaf > 50"),
}


async def judged(sources: Sources, answers: dict[int, str | None]) -> set[str]:
    return {verdict.name for verdict in judge(await read_facts(sources, answers)) if not verdict.holds}


def copied(embedded: Outcome, directory: Path) -> Sources:
    """The databases of the demo once more, to be spoilt."""
    original = embedded.sources
    home = original.ledger.parent
    for name in ("office.db", original.ledger.name):
        with closing(sqlite3.connect(home / name)) as source, closing(sqlite3.connect(directory / name)) as target:
            source.backup(target)
    url = original.engine.database_url.replace(str(home), str(directory))
    return replace(original, engine=replace(original.engine, database_url=url), ledger=directory / original.ledger.name)


@pytest.mark.parametrize("tampering", TAMPERINGS)
async def test_cooked_books_are_noticed(embedded, tmp_path, tampering):
    """The same rows as in the demo that held, with one statement of tampering, fail the invariant it is against."""
    name, statement = TAMPERINGS[tampering]
    sources = copied(embedded, tmp_path)
    with closing(sqlite3.connect(tmp_path / "office.db")) as connection, connection:
        assert connection.execute(statement).rowcount > 0
    assert name in await judged(sources, embedded.story.answers)


async def test_an_honest_copy_is_not_accused(embedded, tmp_path):
    """What fails above is the tampering, not the copying."""
    assert await judged(copied(embedded, tmp_path), embedded.story.answers) == set()


async def test_a_charge_behind_the_offices_back_is_noticed(embedded, tmp_path):
    """The provider's ledger is a witness of its own: a charge that only it knows breaks the agreement."""
    sources = copied(embedded, tmp_path)
    with closing(sqlite3.connect(sources.ledger)) as connection, connection:
        connection.execute("INSERT INTO ledger (key, order_id, kind, amount_cents) VALUES ('k', '5001', 'charge', 1)")
    assert LEDGERS in await judged(sources, embedded.story.answers)


async def test_every_invariant_holds_on_real_servers(tmp_path, monkeypatch, kafka, postgres):
    """The very same application on Kafka and PostgreSQL, its worker killed twenty times, too."""
    monkeypatch.setenv("MAINSTAY_TEST_KAFKA", kafka)
    monkeypatch.setenv("MAINSTAY_TEST_POSTGRES", postgres)
    with restarts_forked():
        outcome = await perform(Script(engine="full", kills=20), tmp_path, quiet())
    assert complaints(outcome) == []
    assert outcome.story.kills.total() == 20
    assert len(outcome.story.accepted) == 25
    # A relay that was killed may have sent some events twice, never one less.
    assert outcome.facts.published >= len({(row["event_type"], row["order_id"]) for row in outcome.facts.handled})


async def test_every_invariant_holds_over_a_promotion(tmp_path, monkeypatch, kafka):
    """The database's primary is lost in the middle of the sale, and its standby takes over, behind the same address."""
    try:
        pair = await asyncio.to_thread(Pair().__enter__)
    except mainstay_servers.MissingServer as error:
        pytest.skip(str(error))
    monkeypatch.setenv("MAINSTAY_TEST_KAFKA", kafka)
    monkeypatch.setenv("MAINSTAY_TEST_POSTGRES", pair.url)
    buy = demo._Office._buy

    async def promoting(office: demo._Office, number: int, data: bytes) -> None:
        if number == 17:
            await asyncio.to_thread(pair.promote)
        await buy(office, number, data)

    monkeypatch.setattr(demo._Office, "_buy", promoting)
    try:
        outcome = await perform(Script(engine="full", kills=1), tmp_path, quiet())
        assert complaints(outcome) == []
        assert not pair.primary.running
        assert len(outcome.story.accepted) == 25
        assert outcome.facts.published >= len({(row["event_type"], row["order_id"]) for row in outcome.facts.handled})
    finally:
        await asyncio.to_thread(pair.__exit__)


def test_bad_input_stops_nothing(tmp_path):
    """The command ends with 0 and plain lines where most of a file is rubbish, and the table says what kinds."""
    good = (
        '{{"order_id": "{}", "customer_id": "c", "country": "x", "placed_at": "1/1/2025 9:00", '
        '"lines": [{{"item": "A", "title": "t", "quantity": {}, "unit_price": "1.00"}}]}}'
    )
    path = tmp_path / "rubbish.jsonl"
    lines = [
        good.format(1, 9),
        good.format(2, -9),
        good.format(3, 1).replace('"c"', "null"),
        good.format(4, 1)[:-2],
        "",
        "[]",
        "\ufeff?",
        good.format(5, 1).replace('"t"', "null").replace('"A"', '"B"'),
        good.format(1, 9),
        good.format("..", 1),
        good.format(6, 1).replace('"1.00"', "1e2"),
        good.format(7, 1).replace('"t"', '"\\ud800"'),
        good.format(8, 1_000_000),
        good.format(8, 1).replace("}]", "}, 3]"),
        '{"\\ud800": 1, "\\ud800": 2}',
        '{"[/x]": 1, "[/x]": 2}',
        good.format(9, 1)[:-1] + ', "x": ' + "[" * 960 + "]" * 960 + "}",
    ]
    path.write_text("\n".join(lines))
    command = [sys.executable, "-m", "ticketing", "demo", "--kills=0"]
    asked = {"PURCHASES": str(path), "ENGINE": "embedded", "COLUMNS": "100"}
    run = subprocess.run(
        command, env=environment_with(**asked), capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "Every invariant holds." in run.stdout
    words = " ".join(run.stdout.split())
    assert "lines in the file 16" in words
    assert "purchases accepted 1" in words
    assert "purchases rejected 15 broken JSON 4" in words
    once = (
        "unknown customer",
        "unknown item",
        "order id taken",
        "bad order_id",
        "bad unit_price",
        "bad title",
        "bad lines",
    )
    for reason in ("bad quantity 2", "a field twice 2", *(f"{reason} 1" for reason in once)):
        assert reason in words
    assert "\x1b" not in run.stdout


async def test_a_broken_invariant_is_an_exit_status(embedded, monkeypatch):
    """The demo ends with 1 and says what is broken, so that whoever runs it cannot overlook it."""
    broken = replace(embedded, verdicts=judge(replace(embedded.facts, given_up=3)))

    async def performed(*_args):
        return broken

    monkeypatch.setattr(demo, "perform", performed)
    console = quiet()
    assert await play(Script(), console=console) == 1
    assert isinstance(console.file, io.StringIO)
    assert "3 events were given up" in console.file.getvalue()
    assert "1 of 8 invariants do not hold." in console.file.getvalue()


async def test_a_server_that_cannot_be_started_ends_the_demo(monkeypatch):
    """Where Kafka is not to be had, the full demo ends with 1 and the remedy, before it starts anything else."""

    class Absent(mainstay_servers.Kafka):
        def prepare(self) -> None:
            msg = "no java: install it with …"
            raise mainstay_servers.MissingServer(msg)

    monkeypatch.setattr(mainstay_servers, "Kafka", Absent)
    monkeypatch.delenv("MAINSTAY_TEST_KAFKA", raising=False)
    monkeypatch.setenv("MAINSTAY_TEST_POSTGRES", "postgresql://nobody@127.0.0.1:1/none")
    console = quiet()
    assert await play(Script(engine="full"), console=console) == 1
    assert isinstance(console.file, io.StringIO)
    assert "no java: install it with" in console.file.getvalue()


async def test_nothing_runs_on_when_a_process_fails(monkeypatch):
    """An API that cannot start ends the demo with the last lines that it wrote, and the others are stopped."""
    stopped: list[str] = []
    stop = OfficeProcess.stop

    async def noted(process: OfficeProcess) -> int | None:
        stopped.append(process.name)
        return await stop(process)

    monkeypatch.setattr(OfficeProcess, "stop", noted)
    monkeypatch.setenv("MAINSTAY_WORKFLOW_LEASE", "typo")
    console = quiet()
    assert await play(Script(), console=console) == 1
    assert isinstance(console.file, io.StringIO)
    assert "did you mean MAINSTAY_WORKFLOW_LEASE_SECONDS?" in console.file.getvalue()
    assert stopped == ["worker", "api", "provider"]


async def test_whatever_goes_wrong_is_one_sentence(monkeypatch):
    """An error that nobody thought of ends the demo with 1, and what is said has its type, its text and its place."""

    async def performed(*_args):
        msg = "status"
        raise KeyError(msg)

    monkeypatch.setattr(demo, "perform", performed)
    console = quiet()
    assert await play(Script(), console=console) == 1
    assert isinstance(console.file, io.StringIO)
    said = console.file.getvalue()
    assert said.startswith("The demo could not be played: KeyError: 'status' (demo.py, line ")
    assert said.count("\n") == 1


async def test_an_api_that_dies_on_the_way_is_the_reason_given(monkeypatch, tmp_path):
    """The demo notices a connection that is refused, and says which process has ended, and what that wrote last."""
    buy = demo._Office._buy

    async def last_one(office: demo._Office, number: int, data: bytes) -> None:
        if number == 9:
            office._api.log.write_text("these are my last words\n")
            assert office._api._process is not None
            office._api._process.kill()
            office._api._process.wait()
        await buy(office, number, data)

    monkeypatch.setattr(demo._Office, "_buy", last_one)
    with pytest.raises(ProcessFailed, match=r"the api ended with status -9; its last lines:\nthese are my last words"):
        await perform(Script(kills=0), tmp_path, quiet())


async def test_a_connection_that_is_closed_while_it_is_used_again_fails_nothing():
    """A server closes one that was idle; the request that crossed with that is sent again."""
    asked = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        await reader.readuntil(b"\r\n\r\n")
        asked += 1
        if asked > 1:
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server, httpx.AsyncClient() as client:
        office = object.__new__(demo._Office)
        office._client = client
        office._urls = {"api": f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"}
        office._api = SimpleNamespace(check=lambda: None)  # type: ignore[assignment]  # as far as it is asked
        response = await office._asked("GET", "/purchases")
    assert (asked, response.status_code) == (2, 200)


async def test_a_process_that_does_not_answer_is_quoted(tmp_path):
    """The log is gone with the demo's directory, so the error has the end of it."""
    log = tmp_path / "provider.log"
    log.write_text("".join(f"line {n}\n" for n in range(30)))
    provider = OfficeProcess("provider", str(tmp_path / "l"), f"--port={free_port()}", environment={}, log=log)
    provider.start()
    try:
        with pytest.raises(ProcessFailed, match=r"within 0\.2 s; its last lines:\nline 15\n(.*\n)+line 29$"):
            await until_up(provider, f"http://127.0.0.1:{free_port()}/", seconds=0.2)
    finally:
        provider.end()


def environment_with(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(demo.__file__).parents[1])} | more


def test_a_demo_that_is_asked_to_stop_says_so(tmp_path):
    """SIGTERM ends it with 1 and a sentence, its processes and its files gone."""
    command = [sys.executable, "-m", "ticketing", "demo"]
    environment = environment_with(TMPDIR=str(tmp_path))
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        assert run.stdout is not None
        run.stdout.readline()  # it has begun
        run.terminate()
        said, _ = run.communicate(timeout=60)
    assert run.returncode == 1
    assert said.endswith("The demo could not be played: it was asked to stop\n")
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


STARTER = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
from ticketing.processes import OfficeProcess
name, *arguments = sys.argv[1:]
process = OfficeProcess(name, *arguments, environment={}, log=Path("log"))
process.start()
time.sleep(600)
"""


@pytest.mark.parametrize("name", ["provider", "api", "worker"])
def test_nothing_outlives_whoever_started_it(tmp_path, name):
    """A demo that is killed can stop nobody, so its processes end by themselves."""
    port = free_port()
    arguments = {"provider": ["ledger", f"--port={port}"], "api": [f"--port={port}"], "worker": []}[name]
    environment = environment_with(
        MAINSTAY_DATABASE_URL="sqlite+aiosqlite:///office.db", MAINSTAY_OBSERVABILITY_HTTP_PORT=str(port)
    )

    def listens() -> bool:
        with closing(socket.socket()) as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    def wait_until(expected: bool) -> None:
        deadline = time.monotonic() + 60
        while listens() is not expected:
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.05)

    with subprocess.Popen([sys.executable, "-c", STARTER, name, *arguments], env=environment, cwd=tmp_path) as starter:
        try:
            wait_until(expected=True)
        finally:
            starter.kill()
    wait_until(expected=False)
