"""The command `mainstay events`, and the metrics."""

import asyncio
import json
from typing import Any
from uuid import uuid4

import pytest
from prometheus_client import REGISTRY, generate_latest
from pydantic import SecretStr

from mainstay.cli import main
from mainstay.core import App, Retry
from mainstay.core.testing import eventually
from mainstay.database import DatabaseModule, DatabaseSettings
from mainstay.events import DeadLetters, Event, EventRouter, EventsModule, EventsSettings, Metadata
from mainstay.events.testing import in_memory, metadata_of


class Broken(Event, type="command.broken", key="name"):
    name: str


async def _run(*arguments: str) -> int:
    """The command makes a loop of its own, so it runs in a thread."""
    return await asyncio.to_thread(main, ["events", "dead-letters", *arguments])


async def test_dead_letters_are_listed_shown_and_redriven(
    database_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole way of somebody on call: see what is there, look at one, send it again, all of them."""
    events = EventRouter()
    broken = True
    handled: list[str] = []

    @events.on(Broken, group="printer", retry=Retry(attempts=1), on_failure="dead-letter")
    async def handle(event: Broken) -> None:
        if broken:
            msg = "out of paper"
            raise RuntimeError(msg)
        handled.append(event.name)

    database = DatabaseModule.for_root(DatabaseSettings(url=SecretStr(database_url)))
    app = App(database, EventsModule.for_root(EventsSettings()), EventsModule.for_feature(events))
    monkeypatch.setenv("MAINSTAY_DATABASE_URL", database_url)
    async with app.running(serve=True):
        for name in ("ann", "bob", "cy"):
            await events.publish(Broken(name=name))
        letters: Any = []
        while len(letters) < 3:
            letters = await app.get(DeadLetters).list()
            await asyncio.sleep(0.02)
        assert await _run("list", "--group", "printer") == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 4
        assert all("printer  command.broken  RuntimeError: out of paper" in line for line in lines[1:])
        assert await _run("list", "--group", "nobody") == 0
        assert capsys.readouterr().out == "no dead letters\n"
        one = str(letters[0].id)
        assert await _run("show", one) == 0
        page = capsys.readouterr().out
        assert "ce_type: command.broken" in page
        assert f'"name":"{letters[0].key.decode()}"' in page
        assert "after 1 attempts" in page
        broken = False
        assert await _run("redrive", one) == 0
        assert await _run("redrive", one) == 2
        assert "was redriven on" in capsys.readouterr().err
        assert await _run("redrive", "--all") == 0
        assert capsys.readouterr().out.count("sent again") == 2
        await eventually(lambda: sorted(handled) == ["ann", "bob", "cy"])


async def test_two_who_send_all_again_and_what_an_error_says(
    database_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A letter that another has sent meanwhile is passed over; one by name is an error, after those that were sent.

    The list shows the error with its class: the last line of a message may be anything.
    """
    events = EventRouter()

    @events.on(Broken, group="scanner", retry=Retry(attempts=1), on_failure="dead-letter")
    async def handle(event: Broken) -> None:
        msg = "out of paper\nKeyError: nothing to see here"
        raise RuntimeError(msg)

    database = DatabaseModule.for_root(DatabaseSettings(url=SecretStr(database_url)))
    app = App(database, EventsModule.for_root(EventsSettings()), EventsModule.for_feature(events))
    monkeypatch.setenv("MAINSTAY_DATABASE_URL", database_url)
    async with app.running(serve=True):
        for name in ("ann", "bob", "cy"):
            await events.publish(Broken(name=name))
        letters: Any = []
        while len(letters) < 3:
            letters = await app.get(DeadLetters).list()
            await asyncio.sleep(0.02)
    assert await _run("list") == 0
    assert "RuntimeError: out of paper\\nKeyError" in capsys.readouterr().out
    listed = DeadLetters.list

    async def late(store: DeadLetters, *args: Any, **options: Any) -> Any:
        found = await listed(store, *args, **options)
        await store.redrive(found[0].id)  # by another, once both have looked
        return found

    with monkeypatch.context() as patched:
        patched.setattr(DeadLetters, "list", late)
        assert await _run("redrive", "--all", "--json") == 0
    sent = [each["id"] for each in json.loads(capsys.readouterr().out)]
    assert sent == [str(letter.id) for letter in letters[1:]]
    async with app:
        assert await app.get(DeadLetters).list() == []
    async with app.running(serve=True):
        while len(letters) < 6:
            letters = [*letters[:3], *await app.get(DeadLetters).list()]
            await asyncio.sleep(0.02)
    assert await _run("redrive", "--json", str(letters[3].id), str(letters[0].id)) == 2
    captured = capsys.readouterr()
    assert json.loads(captured.out) == [{"id": str(letters[3].id), "group": "scanner"}]
    assert "was redriven on" in captured.err


async def test_the_memory_transport_has_nothing_to_look_at(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another process cannot see it, and the command says so."""
    monkeypatch.setenv("MAINSTAY_EVENTS_TRANSPORT", "memory")
    assert await _run("list") == 2
    assert "keeps nothing for other processes" in capsys.readouterr().err


async def test_metrics_count_what_happened() -> None:
    """Published, handled with its seconds, failed, dead-lettered, by type and group."""
    events = EventRouter()
    group = f"metrics-{uuid4().hex[:6]}"

    @events.on(Broken, group=group, retry=Retry(attempts=1), timeout_seconds=5.0)
    async def handle(event: Broken) -> None:
        if event.name == "bad":
            msg = "no"
            raise RuntimeError(msg)

    def value(name: str, **labels: str) -> float:
        return REGISTRY.get_sample_value(name, labels) or 0.0

    before = value("mainstay_events_published_total", type="command.broken")
    async with in_memory(events) as rehearsal:
        for name in ("good", "good", "bad"):
            await rehearsal.publish(Broken(name=name))
        await rehearsal.settled()
    labels = {"type": "command.broken", "group": group}
    assert value("mainstay_events_published_total", type="command.broken") - before == 3
    assert value("mainstay_events_handled_seconds_count", **labels) == 2
    assert value("mainstay_events_handled_seconds_bucket", **labels, le="+Inf") == 2
    assert value("mainstay_events_failed_total", **labels) == 1
    assert value("mainstay_events_dead_letters_total", group=group) == 1
    assert b"mainstay_events_handled_seconds_sum" in generate_latest(REGISTRY)


async def test_a_handler_that_takes_too_long_has_failed() -> None:
    """The timeout of a handler is a failure like any other: retried, then a dead letter."""
    events = EventRouter()

    @events.on(Broken, group="slow", retry=Retry(attempts=1), timeout_seconds=0.02)
    async def handle(event: Broken, meta: Metadata) -> None:
        await asyncio.Event().wait()

    async with in_memory(events) as rehearsal:
        await rehearsal.publish(Broken(name="a"))
        await rehearsal.settled()
        letters = await rehearsal.dead_letters()
        assert "DeadlineExceeded" in letters[0].error
        listed = await rehearsal.app.get(DeadLetters).list("slow")
        await rehearsal.app.get(DeadLetters).redrive(listed[0].id)
        await rehearsal.settled()
        assert len(await rehearsal.dead_letters()) == 1


def test_metadata_for_calling_a_handler_by_hand() -> None:
    """A unit test of a handler needs no transport."""
    meta = metadata_of(Broken(name="ann"), group="printer", attempt=2)
    assert (meta.type, meta.key, meta.group, meta.attempt) == ("command.broken", "ann", "printer", 2)
    assert (meta.topic, meta.partition, meta.offset) == ("command", 0, 0)
    assert meta.headers["ce_source"] == b"test"
    assert meta.traceparent is None
    assert meta.context().causation_id == meta.id
    assert "command.broken" in repr(meta)
