"""Hints reach those who listen: in this process at once, in others by PostgreSQL, and never before the commit."""

import logging

import pytest
import sqlalchemy as sa
from pydantic import SecretStr

from mainstay.core import ConfigurationError
from mainstay.core.testing import eventually
from mainstay.database import DatabaseSettings
from mainstay.database._hints import _packed, _unpacked
from mainstay.database.testing import database

WAIT = 30.0


async def test_a_hint_is_heard_after_the_commit(db):
    """In this process: at once without a unit, with the commit of one, and never when it is rolled back."""
    heard: list[str] = []
    with db.listen("news", heard.append):
        heard.clear()
        db.notify("news", "alone")
        db.notify("gossip", "for others")
        assert heard == ["alone"]
        async with db.transaction():
            db.notify("news", "committed")
            assert heard == ["alone"]
        async with db.batch():
            db.notify("news", "batched")
        with pytest.raises(LookupError):
            async with db.transaction():
                db.notify("news", "rolled back")
                raise LookupError
        assert [each for each in heard if each] == ["alone", "committed", "batched"]
    db.notify("news", "too late")
    assert "too late" not in heard


async def test_a_listener_that_fails_harms_nobody(db, caplog):
    """The others are called, and the sender does not notice."""
    heard: list[str] = []

    def fails(_payload: str) -> None:
        raise LookupError

    with db.listen("news", fails), db.listen("news", heard.append):
        db.notify("news", "x")
        assert "x" in heard
    assert any(record.exc_info and record.exc_info[0] is LookupError for record in caplog.records)


@pytest.mark.parametrize("channel", ["", "News", "a-b", "1a", "a" * 64, 'x"; drop table y'])
async def test_a_channel_has_a_rule(db, channel):
    """What is no plain name is refused, also where it is listened to."""
    with pytest.raises(ValueError, match="is no channel"):
        db.notify(channel)
    with pytest.raises(ValueError, match="is no channel"):
        db.listen(channel, print)


async def test_a_payload_is_small(db):
    """It is an id, not a message."""
    db.notify("news", "é" * 500)
    with pytest.raises(ValueError, match="1002 bytes"):
        db.notify("news", "é" * 501)


async def test_another_process_hears_it(postgres):
    """Two Databases that share nothing but PostgreSQL: each hint arrives once, whole, and not at its sender again."""
    payloads = [f"id-{number} 'with' \"quotes\" é" for number in range(2_000)]
    async with database(postgres) as one, database(postgres) as other:
        there: list[str] = []
        here: list[str] = []
        with other.listen("news", there.append), one.listen("news", here.append):
            await eventually(lambda: one.hears_others and other.hears_others, seconds=WAIT)
            for payload in payloads:
                one.notify("news", payload)
            one.notify("news", "last")
            await eventually(lambda: "last" in there, seconds=WAIT)
            assert [each for each in there if each] == [*payloads, "last"]
            other.notify("news", "answer")
            await eventually(lambda: "answer" in here, seconds=WAIT)
            assert [each for each in here if each] == [*payloads, "last", "answer"]


async def test_a_lost_connection_is_made_again(postgres, caplog):
    """Also the one that listens: the listeners look at everything, and hear what comes then. It is two lines of log."""
    caplog.set_level(logging.INFO, "mainstay.database")
    async with database(postgres) as one, database(postgres) as other:
        there: list[str] = []
        with other.listen("news", there.append):
            one.notify("news", "before")
            await eventually(lambda: other.hears_others and "" in there, seconds=WAIT)
            there.clear()
            kill = (
                "select pg_terminate_backend(pid) from pg_stat_activity "
                "where query like 'LISTEN%' and datname = current_database()"  # the server is that of other tests, too
            )
            async with one.transaction() as session:
                assert len((await session.execute(sa.text(kill))).all()) == 1
            await eventually(lambda: "" in there and other.hears_others, seconds=WAIT)
            one.notify("news", "after")
            await eventually(lambda: "after" in there, seconds=WAIT)
    said = [record.getMessage() for record in caplog.records if "hints" in record.getMessage()]
    assert len(said) == 2
    assert "there is polling" in said[0]
    assert "again" in said[1]


async def test_without_a_server_hints_are_collected_and_bounded(own_postgres):
    """What cannot be sent costs no memory without end: many hints become one that says so."""
    async with database(own_postgres.url) as one, database(own_postgres.url) as other:
        there: list[str] = []
        with other.listen("news", there.append), one.listen("news", lambda _payload: None):
            await eventually(lambda: one.hears_others and other.hears_others, seconds=WAIT)
            own_postgres.kill()
            await eventually(lambda: not (one.hears_others or other.hears_others), seconds=WAIT)
            for number in range(20_000):
                one.notify("news", str(number))
            assert one._hints.waiting is not None
            assert len(one._hints.waiting["news"]) <= 5_001
            own_postgres.start()
            await eventually(lambda: one.hears_others and other.hears_others, seconds=WAIT)
            one.notify("news", "after")
            await eventually(lambda: "after" in there, seconds=WAIT)


async def test_behind_a_pooler_there_is_polling_alone(pgbouncer, caplog):
    """The start succeeds, the listeners of this process are called, and one line names the setting that would help."""
    async with database(pgbouncer) as db:
        heard: list[str] = []
        with db.listen("news", heard.append):
            await eventually(lambda: "MAINSTAY_DATABASE_DIRECT_URL" in caplog.text, seconds=WAIT)
            db.notify("news", "here")
            assert heard == ["here"]
            assert not db.hears_others
    assert caplog.text.count("MAINSTAY_DATABASE_DIRECT_URL") == 1


async def test_past_the_pooler_hints_are_heard(pgbouncer, postgres):
    """With `direct_url` the two processes hear each other, and everything else goes by the pooler."""
    past = SecretStr(postgres)
    async with database(pgbouncer, direct_url=past) as one, database(pgbouncer, direct_url=past) as other:
        there: list[str] = []
        with other.listen("news", there.append):
            await eventually(lambda: other.hears_others, seconds=WAIT)
            one.notify("news", "x")
            await eventually(lambda: "x" in there, seconds=WAIT)


async def test_what_nobody_needs_is_no_connection(postgres):
    """A service without listeners and hints has none for them."""
    listening = sa.text(
        "select count(*) from pg_stat_activity where datname = current_database() and query like 'LISTEN%'"
    )
    async with database(postgres) as db:
        assert (await db.read(listening))[0][0] == 0
        with db.listen("news", print):
            await eventually(lambda: db.hears_others, seconds=WAIT)
            assert (await db.read(listening))[0][0] == 1


def test_only_postgresql_has_a_direct_address():
    """Another address there is a mistake, which names no secret."""
    with pytest.raises(ConfigurationError, match="no address of a PostgreSQL") as caught:
        DatabaseSettings(direct_url=SecretStr("sqlite+aiosqlite:///secret.db"))
    assert "secret" not in str(caught.value)


def test_messages_are_short_enough_for_postgresql():
    """Any payloads, in messages of less than 8,000 bytes; and what other programs send is a payload as it is."""
    payloads = ['é\\"' * 250, *(str(number) for number in range(5_000)), ""]
    messages = _packed(payloads)
    assert max(len(message.encode()) for message in messages) < 8_000
    assert [each for message in messages for each in _unpacked(message)] == payloads
    assert _packed([]) == []
    for foreign in ("", "hello", "{}", "[1]", "17"):
        assert _unpacked(foreign) == [foreign]
