"""The same code means the same on SQLite and PostgreSQL: moments, and inserts that find their row there."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta, timezone

import pytest
import sqlalchemy as sa

from mainstay.database import Conflict, DatabaseError, UtcDateTime, upsert

metadata = sa.MetaData()
visits = sa.Table(
    "visits",
    metadata,
    sa.Column("page", sa.Text, primary_key=True),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("alias", sa.Text, unique=True),
    sa.Column("at", UtcDateTime),
)
TOKYO = timezone(timedelta(hours=9))
NOON = datetime(2026, 3, 1, 12, 0, 0, 250, tzinfo=UTC)
ADD = sa.insert(visits)
COUNT = upsert(visits, lambda new: {"number": visits.c.number + new.number, "at": new.at})
ONCE = upsert(visits)
BY_ALIAS = upsert(visits, lambda new: {"number": new.number}, on=["alias"])


@pytest.fixture
async def pages(db):
    """A database with the table of visits."""
    async with db.transaction() as session:
        await (await session.connection()).run_sync(metadata.create_all)
    return db


async def test_a_moment_comes_back_in_utc(pages):
    """From any zone and by each way of writing, the same moment to the microsecond."""
    await pages.write(ADD, {"page": "written", "number": 1, "at": NOON.astimezone(TOKYO)})
    async with pages.transaction() as session:
        await session.execute(ADD, {"page": "executed", "number": 1, "at": NOON.astimezone(TOKYO)})
        await pages.write(ADD, [{"page": "none", "number": 1, "at": None}])
    rows = {row.page: row.at for row in await pages.read(sa.select(visits.c.page, visits.c.at))}
    assert rows == {"written": NOON, "executed": NOON, "none": None}
    assert rows["written"].tzinfo is UTC or rows["written"].utcoffset() == timedelta(0)


async def test_moments_compare_as_moments(pages):
    """The order and the comparison of the database do not depend on the zones in which they were written."""
    moments = [NOON + timedelta(hours=hour) for hour in range(5)]
    await pages.write(
        ADD,
        [
            {"page": str(n), "number": 1, "at": moment.astimezone(TOKYO if n % 2 else UTC)}
            for n, moment in enumerate(moments)
        ],
    )
    later = sa.select(visits.c.page).where(visits.c.at > moments[2].astimezone(TOKYO)).order_by(visits.c.at.desc())
    assert [row.page for row in await pages.read(later)] == ["4", "3"]


async def test_a_naive_datetime_is_refused(pages):
    """It names no moment: not written, not compared with."""
    naive = NOON.replace(tzinfo=None)
    with pytest.raises(DatabaseError, match="is naive"):
        await pages.write(ADD, {"page": "x", "number": 1, "at": naive})
    with pytest.raises(DatabaseError, match="is naive"):
        async with pages.transaction():
            await pages.write(ADD, {"page": "x", "number": 1, "at": naive})
    with pytest.raises(DatabaseError, match="is naive"):
        await pages.read(sa.select(visits).where(visits.c.at > naive))
    assert await pages.read(sa.select(visits)) == []


async def add(db, way: str, statement: sa.Insert, *rows: Mapping[str, object]) -> None:
    if way == "write":
        for row in rows:
            await db.write(statement, row)
    else:
        async with db.transaction() as session:
            for row in rows:
                await session.execute(statement, row)


@pytest.mark.parametrize("way", ["write", "session"])
async def test_an_upsert_changes_the_row_that_is_there(pages, way):
    """By what is there and by what could not be inserted."""
    await add(pages, way, COUNT, *({"page": "a", "number": n, "at": NOON + timedelta(n)} for n in (1, 2, 3)))
    assert [(row.number, row.at) for row in await pages.read(sa.select(visits))] == [(6, NOON + timedelta(3))]


@pytest.mark.parametrize("way", ["write", "session"])
async def test_an_upsert_without_changes_leaves_the_row(pages, way):
    """The first one stays, and no error is raised."""
    await add(pages, way, ONCE, {"page": "a", "number": 1}, {"page": "a", "number": 2})
    assert [row.number for row in await pages.read(sa.select(visits))] == [1]


async def test_an_upsert_on_another_constraint(pages):
    """The one that is named decides; another one refuses as ever."""
    await pages.write(BY_ALIAS, {"page": "a", "number": 1, "alias": "x"})
    await pages.write(BY_ALIAS, {"page": "b", "number": 2, "alias": "x"})
    assert [(row.page, row.number) for row in await pages.read(sa.select(visits))] == [("a", 2)]
    with pytest.raises(Conflict):
        await pages.write(BY_ALIAS, {"page": "a", "number": 3, "alias": "y"})
