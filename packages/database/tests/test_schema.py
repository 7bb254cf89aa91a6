"""Migrations, the command, settings, and a start on a database that is not ready."""

import asyncio
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import sqlalchemy as sa
from pydantic import SecretStr
from sqlalchemy.dialects import postgresql

from mainstay.cli import main
from mainstay.core import App, ConfigurationError
from mainstay.database import Database, DatabaseModule, DatabaseSettings, Schema, _alembic, cli, upgrade
from mainstay.database._revisions import newest
from mainstay.database.schema import SCHEMA, downgrade, installed, revision, status
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


async def test_an_index_of_one_dialect_is_missed_on_that_only(db, tmp_path):
    """What `ddl_if` says counts in the comparison, so that no revision makes an index where it is not wanted."""
    schema = shop(tmp_path / "m", FIRST)
    if db.dialect == "sqlite":
        await db.ensure_schema(schema)
    else:
        async with db.transaction() as session:
            await (await session.connection()).run_sync(schema.metadata.create_all)
    orders = schema.metadata.tables["mainstay_shop_orders"]
    other = "postgresql" if db.dialect == "sqlite" else "sqlite"
    sa.Index("mainstay_shop_elsewhere", orders.c.id).ddl_if(dialect=other)
    assert await schema_differences(db, schema) == []
    sa.Index("mainstay_shop_here", orders.c.id).ddl_if(dialect=db.dialect)
    (missing,) = await schema_differences(db, schema)
    assert str(missing).startswith("('add_index', Index('mainstay_shop_here'")


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
    with pytest.raises(ConfigurationError, match=r"no tables of the schema database.*`mainstay db upgrade`"):
        async with app:
            pass
    await upgrade(postgres, [SCHEMA, old])
    async with app:
        with pytest.raises(ConfigurationError, match="revision 0001 of the schema shop, whose newest revision is 0002"):
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


async def test_databases_of_one_process_migrate_side_by_side(tmp_path, postgres):
    """Each gets its own tables: while one migration waits for its database, another does not take its place."""
    schema = shop(tmp_path / "two", FIRST, SECOND)
    urls = [postgres, *(f"sqlite:///{tmp_path / f'{number}.db'}" for number in range(6))]
    await asyncio.gather(*(upgrade(url, [schema]) for url in urls))
    for url in urls:
        assert await status(url, [SCHEMA, schema]) == [("database", "0001", "0001"), ("shop", "0002", "0002")]


async def test_apps_of_one_process_start_side_by_side(tmp_path):
    """The same at the start of an App on SQLite."""
    schema = shop(tmp_path / "two", FIRST, SECOND)

    async def start(number: int) -> int:
        async with database(f"sqlite:///{tmp_path / f'{number}.db'}", schema) as db:
            return len(await db.read(sa.text("SELECT id FROM mainstay_shop_orders")))

    assert await asyncio.gather(*(start(number) for number in range(6))) == [1] * 6


async def test_alembic_is_silent_unless_something_changes(lasting, tmp_path, caplog):
    """A start, an upgrade and a status on new tables log nothing, at any level that a service turns on."""
    schema = shop(tmp_path / "two", FIRST, SECOND)
    await upgrade(lasting, [schema])
    caplog.clear()
    with caplog.at_level("INFO"):
        await upgrade(lasting, [schema])
        await status(lasting, [schema])
        async with database(lasting, schema):
            pass
    assert [record.name for record in caplog.records if record.name.startswith("alembic")] == []


PLAIN = {
    "none": [],
    "in order": [FIRST, SECOND],
    "as Alembic writes them": [
        'revision: str = "a1"\ndown_revision: str | None = None\nbranch_labels: str | None = None\n',
        'revision: str = "b2"\ndown_revision: str | None = "a1"\ndepends_on: str | None = None\n',
    ],
}
NOT_PLAIN = {
    "two branches that are merged": [
        'revision, down_revision = "a1", None',
        *(f'revision = "{name}"\ndown_revision = "a1"' for name in ("b2", "b3")),
        'revision = "c4"\ndown_revision = ("b2", "b3")',
    ],
    "computed": ['revision = "".join(("a", "1"))\ndown_revision = None'],
    "beside another file": [FIRST, "TABLES = ()"],
    "unreadable": ["revision = ("],
    "two newest": [FIRST, SECOND, SECOND.replace("0002", "0003")],
    "the one before is missing": [SECOND],
    "a circle": ['revision = "a1"\ndown_revision = "b2"', 'revision = "b2"\ndown_revision = "a1"'],
    "a label": [f'{FIRST}branch_labels = ("shop",)'],
}


@pytest.mark.parametrize("revisions", PLAIN.values(), ids=PLAIN)
def test_the_newest_revision_is_read_as_alembic_reads_it(revisions, tmp_path):
    """From the text, since importing Alembic takes a tenth of a second."""
    schema = shop(tmp_path / "migrations", *revisions)
    (schema.migrations / "__init__.py").touch()
    assert newest(schema.migrations) == _alembic.head(schema)


@pytest.mark.parametrize("revisions", NOT_PLAIN.values(), ids=NOT_PLAIN)
def test_alembic_is_asked_for_the_newest_revision_where_the_text_is_not_plain(revisions, tmp_path):
    """What the text does not say for certain is not guessed."""
    with pytest.raises(LookupError):
        newest(shop(tmp_path / "migrations", *revisions).migrations)


def test_a_start_on_tables_that_are_up_to_date_does_without_alembic(lasting):
    """Each start and each command would take a tenth of a second longer."""
    code = (
        "import asyncio, sys\n"
        "from mainstay.core import App\n"
        "from mainstay.database import DatabaseModule, DatabaseSettings\n"
        "async def main():\n"
        "    async with App(DatabaseModule.for_root(DatabaseSettings(url=sys.argv[1]))):\n"
        "        print('alembic' in sys.modules)\n"
        "asyncio.run(main())"
    )
    asyncio.run(upgrade(lasting, []))
    done = subprocess.run([sys.executable, "-c", code, lasting], check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False"


async def test_an_applications_own_tables(lasting, tmp_path):
    """Revisions are written from the metadata, applied, and taken back; the tables are then as the code has them."""
    folder = tmp_path / "loans"
    folder.mkdir()
    schema = Schema("loans", sa.MetaData(), folder)
    loans = sa.Table(
        "loans",
        schema.metadata,
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("terms", sa.JSON().with_variant(postgresql.JSONB(), "postgresql")),
    )
    await upgrade(lasting, [schema])
    first = await revision(lasting, schema, "loans are lent")
    assert first.parent == folder
    assert first.name.endswith("_loans_are_lent.py")
    with pytest.raises(ConfigurationError, match=r"has no tables of the schema loans.*before a revision is compared"):
        await revision(lasting, schema, "too early")
    await upgrade(lasting, [schema])
    async with database(lasting, schema) as db:
        assert await schema_differences(db, schema) == []
        await db.write(sa.insert(loans), {"id": 1})

    loans.append_column(sa.Column("returned", sa.Boolean, nullable=False, server_default=sa.false()))
    second = await revision(lasting, schema, "loans end")
    await upgrade(lasting, [schema])
    async with database(lasting, schema) as db:
        assert await schema_differences(db, schema) == []
        assert [tuple(row) for row in await db.read(sa.select(loans.c.id, loans.c.returned))] == [(1, False)]

    by_hand = await revision(lasting, schema, "by hand", autogenerate=False)
    by_hand.unlink()
    identifiers = [path.name.split("_")[0] for path in (first, second)]
    assert await status(lasting, [schema]) == [("loans", identifiers[1], identifiers[1])]
    await downgrade(lasting, schema, "-1")
    assert await status(lasting, [schema]) == [("loans", identifiers[0], identifiers[1])]
    with pytest.raises(ConfigurationError, match="cannot be taken back to revision 'nowhere'"):
        await downgrade(lasting, schema, "nowhere")
    text = first.read_text()
    first.write_text(text[: text.index("def downgrade")])
    with pytest.raises(ConfigurationError, match=rf"migration {first.name} has no function downgrade\(\)"):
        await downgrade(lasting, schema, "base")
    assert await status(lasting, [schema]) == [("loans", identifiers[0], identifiers[1])]
    first.write_text(text)
    await downgrade(lasting, schema, "base")
    with pytest.raises(ConfigurationError, match="nothing to take back"):
        await downgrade(lasting, schema, "base")


async def test_rebuilding_a_table_in_sqlite_keeps_what_refers_to_it(tmp_path):
    """SQLite changes a column by making the table anew; with foreign keys on, that would delete the rows of others."""
    change = """
import sqlalchemy as sa
from alembic import op
revision = "0002"
down_revision = "0001"
def upgrade():
    op.execute("INSERT INTO mainstay_shop_orders (id) VALUES (1)")
    op.execute("CREATE TABLE lines (id INTEGER REFERENCES mainstay_shop_orders ON DELETE CASCADE)")
    op.execute("INSERT INTO lines VALUES (1)")
    with op.batch_alter_table("mainstay_shop_orders", recreate="always") as batch:
        batch.add_column(sa.Column("total", sa.Integer))
"""
    async with database(f"sqlite:///{tmp_path / 'x.db'}", shop(tmp_path / "m", FIRST, change)) as db:
        assert len(await db.read(sa.text("SELECT * FROM lines"))) == 1


async def test_two_newest_revisions_are_refused_by_name(tmp_path):
    """Two branches that each brought a revision are found before anything is migrated."""
    schema = shop(tmp_path / "m", FIRST, SECOND, SECOND.replace('"0002"', '"0003"'))
    with pytest.raises(ConfigurationError, match=r"shop has several newest revisions \(0002, 0003\)"):
        await upgrade(f"sqlite:///{tmp_path / 'x.db'}", [schema])


async def test_the_command_that_helps_names_the_schema(postgres, tmp_path, monkeypatch):
    """For tables of a service that is not installed as a package, the command says where they are declared."""
    schema = shop(tmp_path / "m", FIRST)
    await upgrade(postgres, [])
    async with database(postgres) as db:
        with pytest.raises(ConfigurationError, match="`mainstay db upgrade --schema module:SCHEMA`"):
            await db.ensure_schema(schema)
        module = ModuleType("shop.tables")
        module.__dict__["TABLES"] = schema
        monkeypatch.setitem(sys.modules, "shop.tables", module)
        with pytest.raises(ConfigurationError, match=r"`mainstay db upgrade --schema shop\.tables:TABLES`"):
            await db.ensure_schema(schema)


async def test_what_only_reads_changes_nothing(tmp_path):
    """Neither a status nor a start with `migrate=False` makes a file, tables or newer tables."""
    path = tmp_path / "x.db"
    url = f"sqlite:///{path}"
    old, new = shop(tmp_path / "one", FIRST), shop(tmp_path / "two", FIRST, SECOND)
    assert await status(url, [SCHEMA, old]) == [("database", None, "0001"), ("shop", None, "0001")]
    with pytest.raises(ConfigurationError, match="there is no database at"):
        async with database(url, migrate=False):
            pass
    assert not path.exists()
    await upgrade(url, [old])
    before = path.read_bytes()
    async with database(url, old, migrate=False) as db:
        assert await db.read(sa.text("SELECT id FROM mainstay_shop_orders")) == []
        with pytest.raises(ConfigurationError, match="is at revision 0001 of the schema shop"):
            await db.ensure_schema(new)
    assert path.read_bytes() == before


def test_the_command(lasting, capsys, monkeypatch):
    """Status says what is missing and ends with 1, upgrade brings it, then status ends with 0."""
    monkeypatch.setattr(cli, "installed", lambda: [SCHEMA])
    assert main(["db", "status", "--url", lasting]) == 1
    assert "run `mainstay db upgrade`" in capsys.readouterr().out
    monkeypatch.setenv("MAINSTAY_DATABASE_URL", lasting)
    assert main(["db", "upgrade"]) == 0
    assert "up to date: database" in capsys.readouterr().out
    assert main(["db", "status"]) == 0
    assert "up to date" in capsys.readouterr().out


def test_the_command_for_tables_of_an_application(lasting, tmp_path, monkeypatch, capsys):
    """A service that is not installed names its schema by module, found from the current directory."""
    folder = tmp_path / "service"
    folder.mkdir()
    (folder / "lending_tables.py").write_text(
        "import sqlalchemy as sa\nfrom pathlib import Path\nfrom mainstay.database import Schema\n"
        "metadata = sa.MetaData()\nsa.Table('loans', metadata, sa.Column('id', sa.Integer, primary_key=True))\n"
        "SCHEMA = Schema('loans', metadata, Path(__file__).with_name('migrations'))\n"
    )
    (folder / "migrations").mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(cli, "installed", lambda: [SCHEMA])
    monkeypatch.setenv("MAINSTAY_DATABASE_URL", lasting)
    named = ["--schema", "lending_tables:SCHEMA"]
    try:
        assert main(["db", "revision", "loans are lent", *named]) == 0
        assert list((folder / "migrations").glob("*_loans_are_lent.py"))
        assert main(["db", "upgrade", *named]) == 0
        assert main(["db", "status", *named]) == 0
        assert main(["db", "downgrade", "base", *named]) == 0
        assert main(["db", "status", *named]) == 1
        assert "--schema lending_tables:SCHEMA" in capsys.readouterr().out
        for wrong in ("lending_tables", "lending_tables:NOTHING", "no_such_module:SCHEMA", "sys:path"):
            assert main(["db", "status", "--schema", wrong]) == 2
            assert wrong in capsys.readouterr().err
    finally:
        sys.modules.pop("lending_tables", None)


@pytest.mark.parametrize("url", ["sqlite://", "postgresql://me:hunter2@nowhere/db"])
def test_the_command_prints_sql(url, capsys, monkeypatch):
    """The statements of a first installation, for those who may not run commands there; needs no database."""
    monkeypatch.setattr(cli, "installed", lambda: [SCHEMA])
    assert main(["db", "upgrade", "--url", url, "--sql"]) == 0
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
    """It says what is wrong, with the option where it is the address itself, ends with 2, and prints no secret."""
    assert main(["db", "status", "--url", url]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("mainstay: ") or "Error: Invalid value for '--url': " in captured.err
    assert "hunter2" not in captured.out + captured.err


def test_the_command_is_installed():
    """The script and the entry point of our own schema are there."""
    done = subprocess.run(
        [Path(sys.executable).with_name("mainstay"), "db", "--help"], capture_output=True, text=True, check=True
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
