"""Migrations, the command, settings, and a start on a database that is not ready."""

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa
from pydantic import SecretStr

from mainstay.core import App, ConfigurationError
from mainstay.database import Database, DatabaseModule, DatabaseSettings, Schema, console, upgrade
from mainstay.database.schema import SCHEMA, installed, status
from mainstay.database.testing import database, schema_differences

FIRST = """
import sqlalchemy as sa
from alembic import op
revision = "0001"
down_revision = None
def upgrade():
    op.create_table("mainstay_shop_orders", sa.Column("id", sa.Integer, primary_key=True))
"""
SECOND = """
import sqlalchemy as sa
from alembic import op
revision = "0002"
down_revision = "0001"
def upgrade():
    op.add_column("mainstay_shop_orders", sa.Column("total", sa.Integer))
    op.execute("INSERT INTO mainstay_shop_orders (id, total) VALUES (1, 2)")
"""
BROKEN = SECOND + '    op.execute("this is no SQL")\n'


def shop(folder: Path, *revisions: str) -> Schema:
    """A package with so many revisions."""
    folder.mkdir(exist_ok=True)
    for number, text in enumerate(revisions, 1):
        (folder / f"000{number}_x.py").write_text(text)
    metadata = sa.MetaData()
    columns = [sa.Column("id", sa.Integer, primary_key=True), sa.Column("total", sa.Integer)][: len(revisions)]
    sa.Table("mainstay_shop_orders", metadata, *columns)
    return Schema("shop", metadata, folder)


@pytest.fixture
def lasting(url, tmp_path):
    """A database that outlives its connection."""
    return url.replace(":memory:", str(tmp_path / "lasting.db"))


async def test_our_own_migrations_make_our_own_tables(db):
    """The tables of the leases are as the code declares them."""
    assert await schema_differences(db, SCHEMA) == []


async def test_a_difference_is_found(db, tmp_path):
    """A column that no migration makes is reported, so that a package's test of this can fail."""
    schema = shop(tmp_path / "m", FIRST)
    if db.dialect == "sqlite":
        await db.ensure_schema(schema)
        assert await schema_differences(db, schema) == []
    sa.Table("mainstay_shop_orders", schema.metadata, sa.Column("more", sa.Text), extend_existing=True)
    assert await schema_differences(db, schema) != []


async def test_sqlite_migrates_at_start(tmp_path):
    """A new revision is applied by the next start, once, in the package's own version table."""
    url = f"sqlite:///{tmp_path / 'x.db'}"
    old = shop(tmp_path / "one", FIRST)
    new = shop(tmp_path / "two", FIRST, SECOND)
    async with database(url, old):
        pass
    assert await status(url, [new, SCHEMA]) == [("shop", "0001", "0002"), ("database", "0001", "0001")]
    for _ in range(2):
        async with database(url, new) as db:
            rows = await db.read(sa.text("SELECT id, total FROM mainstay_shop_orders"))
            assert [tuple(row) for row in rows] == [(1, 2)]


async def test_postgres_is_migrated_by_the_command_only(postgres, tmp_path):
    """A start without tables, and on old ones, is refused with the command to run; after it, all is well."""
    old, new = shop(tmp_path / "one", FIRST), shop(tmp_path / "two", FIRST, SECOND)
    app = App(DatabaseModule.for_root(DatabaseSettings(url=SecretStr(postgres))))
    with pytest.raises(ConfigurationError, match=r"no tables for mainstay-database.*`mainstay-database upgrade`"):
        async with app:
            pass
    await upgrade(postgres, [SCHEMA, old])
    async with app:
        with pytest.raises(ConfigurationError, match="revision 0001 for mainstay-shop, whose newest revision is 0002"):
            await app.get(Database).ensure_schema(new)
        await upgrade(postgres, [new])
        await app.get(Database).ensure_schema(new)


async def test_a_newer_database_is_no_obstacle(lasting, tmp_path, caplog):
    """While a new version is being rolled out, the old one can still start on the tables, and says so."""
    await upgrade(lasting, [SCHEMA, shop(tmp_path / "two", FIRST, SECOND)])
    async with database(lasting, shop(tmp_path / "one", FIRST)):
        assert "0002, newer than this installation" in caplog.text


async def test_a_migration_that_fails_leaves_nothing(lasting, tmp_path):
    """All revisions of all packages are one transaction, on SQLite too."""
    with pytest.raises(sa.exc.DBAPIError):
        await upgrade(lasting, [SCHEMA, shop(tmp_path / "two", FIRST, BROKEN)])
    assert await status(lasting, [SCHEMA, shop(tmp_path / "one", FIRST)]) == [
        ("database", None, "0001"),
        ("shop", None, "0001"),
    ]


async def test_upgrades_at_once_take_turns(lasting, tmp_path):
    """Eight upgrades at the same time make the tables once."""
    schema = shop(tmp_path / "two", FIRST, SECOND)
    await asyncio.gather(*(upgrade(lasting, [SCHEMA, schema]) for _ in range(8)))
    assert await status(lasting, [schema]) == [("shop", "0002", "0002")]


def test_the_command(lasting, capsys, monkeypatch):
    """Status says what is missing and ends with 1, upgrade brings it, then status ends with 0."""
    monkeypatch.setattr(console, "installed", lambda: [SCHEMA])
    assert console.main(["status", "--url", lasting]) == 1
    assert "run `mainstay-database upgrade`" in capsys.readouterr().out
    monkeypatch.setenv("MAINSTAY_DATABASE_URL", lasting)
    assert console.main(["upgrade"]) == 0
    assert "up to date: database" in capsys.readouterr().out
    assert console.main(["status"]) == 0
    assert "up to date" in capsys.readouterr().out


@pytest.mark.parametrize("url", ["sqlite://", "postgresql://me:hunter2@nowhere/db"])
def test_the_command_prints_sql(url, capsys, monkeypatch):
    """The statements of a first installation, for those who may not run commands there; needs no database."""
    monkeypatch.setattr(console, "installed", lambda: [SCHEMA])
    assert console.main(["upgrade", "--url", url, "--sql"]) == 0
    text = capsys.readouterr().out
    assert "CREATE TABLE mainstay_database_leases" in text
    assert "mainstay_database_version" in text


@pytest.mark.parametrize(
    "url",
    [
        "mysql://me:hunter2@host/db",
        "no url: hunter2",
        "postgresql://me:hunter2@127.0.0.1:1/db",
        "postgresql://me:what@hunter2@127.0.0.1:1/db",
    ],
)
def test_the_command_with_a_wrong_url(url, capsys):
    """It says what is wrong, ends with 2, and prints no secret."""
    assert console.main(["status", "--url", url]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("mainstay-database: ")
    assert "hunter2" not in captured.out + captured.err


def test_the_command_is_installed():
    """The script and the entry point of our own schema are there."""
    done = subprocess.run(
        [Path(sys.executable).with_name("mainstay-database"), "--help"], capture_output=True, text=True, check=True
    )
    assert "upgrade" in done.stdout
    assert SCHEMA in installed()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"url": "mysql://me:hunter2@host/db"}, ["mysql is not supported", "MAINSTAY_DATABASE_URL"]),
        ({"url": "hunter2"}, ["no database URL"]),
        ({"url": "postgresql://me:what@hunter2@127.0.0.1:1/db"}, ["percent-encode the password", "%40"]),
        ({"url": "postgresql://me:what@is/hunter2@127.0.0.1:1/db"}, ["percent-encode the password"]),
        ({"url": "postgresql://me:what@is:hunter2@127.0.0.1:1/db"}, ["no database URL"]),
        ({"url": "postgresql+psycopg://me:hunter2@host/db"}, ["postgresql+psycopg", "postgresql+asyncpg"]),
        ({"pool_size": 0}, ["pool_size", "MAINSTAY_DATABASE_POOL_SIZE"]),
        ({"busy_timeout_seconds": 0}, ["busy_timeout_seconds"]),
    ],
)
def test_settings_that_cannot_work(values, words):
    """They are refused when they are made, naming the variable, and no message repeats a password."""
    with pytest.raises(ConfigurationError) as caught:
        DatabaseSettings(**values)
    for word in words:
        assert word in str(caught.value)
    assert "hunter2" not in str(caught.value) + repr(caught.value)


def test_the_password_stays_out_of_sight(monkeypatch):
    """Neither the settings' repr nor their JSON shows it."""
    monkeypatch.setenv("MAINSTAY_DATABASE_URL", "postgres://me:hunter2@host/db")
    settings = DatabaseSettings()
    assert "hunter2" not in repr(settings) + str(settings) + settings.model_dump_json()
