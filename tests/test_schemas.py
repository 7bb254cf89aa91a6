"""The tables that the migrations of a package make are those that its code declares: nothing less, nothing else.

Alembic's comparison, which `mainstay db revision` goes by, looks at columns, indexes, unique constraints and foreign
keys by their names. Here the database's own catalog is compared, what it keeps after the migrations beside what it
keeps after `create_all`, down to the conditions of indexes, primary keys and checks. What a default says is left out:
the code has a placeholder where the migration has the database's time.
"""

import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from mainstay.database import upgrade
from mainstay.database.schema import Schema, installed

SCHEMAS = installed()

_POSTGRES = """
    SELECT 'column', c.relname, a.attname,
    concat_ws(' ', format_type(a.atttypid, a.atttypmod), CASE WHEN a.attnotnull THEN 'not null' END,
              CASE WHEN a.atthasdef THEN 'default' END, a.attidentity::text, a.attgenerated::text)
    FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
    WHERE c.relname = ANY (:tables) AND c.relkind = 'r'
    UNION ALL SELECT 'index', tablename, indexname, indexdef FROM pg_indexes WHERE tablename = ANY (:tables)
    UNION ALL SELECT 'constraint', conrelid::regclass::text, conname, pg_get_constraintdef(oid)
    FROM pg_constraint WHERE conrelid::regclass::text = ANY (:tables)
"""


def catalog(connection: sa.Connection, tables: list[str]) -> set[tuple[str, ...]]:
    """What the database keeps of tables: each column, index and constraint with its definition."""
    if connection.dialect.name == "postgresql":
        return {tuple(map(str, row)) for row in connection.execute(sa.text(_POSTGRES), {"tables": tables})}
    found: set[tuple[str, ...]] = set()
    for table in tables:
        for _, name, type_, required, default, key, hidden in connection.exec_driver_sql(
            f"PRAGMA table_xinfo({table})"
        ):
            found.add(("column", table, name, f"{type_} {required} {default is not None} {key} {hidden}"))
        for _, name, unique, origin, partial in connection.exec_driver_sql(f"PRAGMA index_list({table})"):
            columns = [row[2:5] for row in connection.exec_driver_sql(f"PRAGMA index_xinfo('{name}')")]
            shown = name if origin == "c" else ""  # those of constraints have numbers
            found.add(("index", table, shown, f"{unique} {origin} {partial} {columns}"))
        for row in connection.exec_driver_sql(f"PRAGMA foreign_key_list({table})"):
            found.add(("constraint", table, "", f"{tuple(row)[1:]}"))
        about = sa.text("SELECT type, name, sql FROM sqlite_master WHERE tbl_name = :table AND sql IS NOT NULL")
        for kind, name, text in connection.execute(about, {"table": table}):
            if kind == "index":
                found.add(("index", table, name, re.sub(r"\s+", " ", text)))
            else:
                found.update(
                    ("constraint", table, "", part) for part in re.findall(r"CHECK \(.*\)|AUTOINCREMENT", text)
                )
    return found


@pytest.fixture(params=["sqlite", "postgres"])
async def connection(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[AsyncConnection]:
    """A connection to a database with the tables of all packages."""
    sqlite = request.param == "sqlite"
    url: str = f"sqlite+aiosqlite:///{tmp_path / 'x.db'}" if sqlite else request.getfixturevalue("postgres")
    await upgrade(url, SCHEMAS)
    engine = create_async_engine(url)
    async with engine.connect() as connection:
        yield connection
    await engine.dispose()


def differences(connection: sa.Connection, schema: Schema) -> dict[str, list[tuple[str, ...]]]:
    """What only the migrations of a schema make, and what only its metadata does."""
    tables = sorted(schema.metadata.tables)
    migrated = catalog(connection, tables)
    schema.metadata.drop_all(connection)
    schema.metadata.create_all(connection)
    declared = catalog(connection, tables)
    assert len(declared) > len(tables)
    return {"only migrated": sorted(migrated - declared), "only declared": sorted(declared - migrated)}


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.package)
async def test_migrations_make_what_the_code_declares(connection: AsyncConnection, schema: Schema) -> None:
    """By Alembic's comparison, by which the next revision is written, and by the catalog; no table is beside them."""
    assert await connection.run_sync(schema.differences) == []
    names = await connection.run_sync(lambda sync: sa.inspect(sync).get_table_names())
    ours = {name for name in names if name.startswith(f"mainstay_{schema.package}_")}
    assert ours == {*schema.metadata.tables, schema.version_table}
    assert await connection.run_sync(differences, schema) == {"only migrated": [], "only declared": []}


def orders(**items: sa.schema.SchemaItem) -> sa.MetaData:
    """A table of a shop, with these in place of its own items or beside them."""
    metadata = sa.MetaData()
    usual: dict[str, sa.schema.SchemaItem] = {
        "id": sa.Column("id", sa.Integer, primary_key=True),
        "number": sa.Column("number", sa.Integer),
        "made": sa.Index("mainstay_shop_made", "number", "id"),
    }
    sa.Table("mainstay_shop_orders", metadata, *(usual | items).values())
    return metadata


_SOME = sa.text("id > 1")
OTHERS: dict[str, Callable[[], sa.MetaData]] = {
    "column": lambda: orders(more=sa.Column("more", sa.Text)),
    "type": lambda: orders(number=sa.Column("number", sa.BigInteger)),
    "required": lambda: orders(number=sa.Column("number", sa.Integer, nullable=False)),
    "default": lambda: orders(number=sa.Column("number", sa.Integer, server_default="0")),
    "key": lambda: orders(number=sa.Column("number", sa.Integer, primary_key=True)),
    "index": lambda: orders(more=sa.Index("mainstay_shop_more", "number", "id")),
    "order of an index": lambda: orders(made=sa.Index("mainstay_shop_made", "number", sa.text("id DESC"))),
    "condition of an index": lambda: orders(
        made=sa.Index("mainstay_shop_made", "number", "id", sqlite_where=_SOME, postgresql_where=_SOME)
    ),
    "unique": lambda: orders(more=sa.UniqueConstraint("number")),
    "check": lambda: orders(more=sa.CheckConstraint("number > 0")),
    "reference": lambda: orders(more=sa.ForeignKeyConstraint(["number"], ["mainstay_shop_orders.id"])),
}


async def test_what_differs_is_found(connection: AsyncConnection, tmp_path: Path) -> None:
    """In a column, an index or a constraint: the test above can fail."""

    def found(sync: sa.Connection, declared: sa.MetaData) -> bool:
        orders().create_all(sync)
        result = differences(sync, Schema("shop", declared, tmp_path))
        declared.drop_all(sync)
        return result != {"only migrated": [], "only declared": []}

    assert not await connection.run_sync(found, orders())
    for what, other in OTHERS.items():
        assert await connection.run_sync(found, other()), what
