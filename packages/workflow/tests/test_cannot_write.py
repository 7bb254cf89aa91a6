"""SQLite that cannot write for a while, under running sagas: no step fails, no run is parked, and health says so."""

import asyncio
import logging
import sqlite3
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from mainstay.core.testing import eventually
from mainstay.database import Database
from mainstay.workflow.tables import runs
from packages.workflow.tests.test_failover import WAIT, selling

FULL = ("PRAGMA max_page_count=1", "PRAGMA max_page_count=1000000000")  # not less than there are
READS_ONLY = ("PRAGMA query_only=ON", "PRAGMA query_only=OFF")


class Told(sqlite3.Connection):
    """A connection that is told something before its next statement; all of them the same."""

    what = ""
    _heard = ""

    def _hear(self) -> None:
        if self._heard != Told.what:
            self._heard = Told.what
            super().execute(Told.what).fetchall()

    def execute(self, *arguments: Any) -> sqlite3.Cursor:
        self._hear()
        return super().execute(*arguments)

    def executemany(self, *arguments: Any) -> sqlite3.Cursor:
        self._hear()
        return super().executemany(*arguments)

    def cursor(self, factory: Any = sqlite3.Cursor) -> Any:
        self._hear()
        return super().cursor(factory)


@pytest.fixture(autouse=True)
def connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every connection to SQLite, by whichever part of the App, is one of these."""
    monkeypatch.setattr(Told, "what", "")
    monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=Told))


@contextmanager
def unable(pragmas: tuple[str, str]) -> Generator[None]:
    """Nothing can be written within the block."""
    Told.what = pragmas[0]
    yield
    Told.what = pragmas[1]


@pytest.mark.parametrize("pragmas", [FULL, READS_ONLY], ids=["full", "read-only"])
async def test_sqlite_that_cannot_write_for_a_while(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, pragmas: tuple[str, str]
) -> None:
    """Writes are refused and repeated, also for longer than a lease; then every saga ends as it would have."""
    caplog.set_level(logging.WARNING)
    async with selling(f"sqlite+aiosqlite:///{tmp_path / 'x.db'}") as shop:
        database = shop.database
        assert database is not None
        assert (await database.health()).status == "ok"
        caplog.clear()
        with unable(pragmas):
            await eventually(lambda: caplog.text.count("will be again") >= 5, seconds=WAIT, what="refused writes")
            health = await database.health()
            assert health.status == "down"
            assert "cannot write" in health.detail
            await asyncio.sleep(2.5)  # the leases end: the time is what is tested
            parked = sa.select(sa.func.count()).where(runs.c.status.like("%parked%"))
            assert (await database.read(parked))[0][0] == 0
        await eventually(lambda: is_ok(database), seconds=WAIT)


async def is_ok(database: Database) -> bool:
    """By its health."""
    return (await database.health()).status == "ok"
