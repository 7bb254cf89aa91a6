"""Addresses as consoles of providers, secrets and environment files hold them: each works, or is refused by name."""

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import make_url

from mainstay.core import App, ConfigurationError
from mainstay.database import Database, DatabaseModule, DatabaseSettings, upgrade
from mainstay.database._engine import Address
from mainstay.database.settings import parse_url

APPLICATION = sa.text("SELECT current_setting('application_name') AS name, current_setting('search_path') AS path")


@pytest.fixture
async def at(postgres):
    """The address of a migrated database, put into a form: {user}, {port} and {name} are filled in."""
    await upgrade(postgres, [])
    parsed = make_url(postgres)

    def fill(form: str) -> str:
        return form.format(at=f"postgres@127.0.0.1:{parsed.port}", port=parsed.port, name=parsed.database)

    return fill


async def used(url: str) -> tuple[str, str]:
    """Start on the address, use each kind of connection, and return the name and the search path that a session has."""
    app = App(DatabaseModule.for_root(DatabaseSettings(url=url)))
    async with app:
        db = app.get(Database)
        lease = await db.lease("x")
        assert lease is not None
        async with db.batch():
            pass
        row = (await db.read(APPLICATION))[0]
        assert (await db.health()).status == "ok"
        return row.name, row.path


@pytest.mark.parametrize(
    "form",
    [
        "postgres://{at}/{name}",
        "postgresql://{at}/{name}",
        "postgresql+asyncpg://{at}/{name}",
        "postgresql://{at}/{name}\n",
        "  postgresql://{at}/{name} ",
        "postgresql://{at}/{name}?sslmode=disable",
        "postgresql://{at}/{name}?sslmode=prefer&channel_binding=prefer",
        "postgresql://{at}/{name}?ssl=disable",
        "postgresql://{at}/{name}?connect_timeout=5",
        "postgresql://{at}/{name}?connect_timeout=0",
        "postgresql://{at}/{name}?target_session_attrs=read-write",
        "postgresql://{at}/{name}?target_session_attrs=primary",
        "postgresql://{at}/{name}?target_session_attrs=any",
        "postgresql://postgres:p%40ss%2Fw%23rd@127.0.0.1:{port}/{name}",
        "postgresql://127.0.0.1:{port}/{name}?user=postgres&password=secret",
        "postgresql://postgres@/{name}?host=127.0.0.1&port={port}",
        "postgresql://postgres@/{name}?host=127.0.0.1,127.0.0.1&port=1,{port}",
    ],
)
async def test_an_address_that_works(at, form):
    """Every connection of the package is made by it."""
    await used(at(form))


async def test_parameters_of_the_session(at):
    """The application's name and the options reach the server."""
    url = at("postgresql://{at}/{name}?application_name=orders&options=-csearch_path%3Dpublic%2Cpg_temp")
    assert await used(url) == ("orders", "public,pg_temp")


async def test_a_unix_socket(own_postgres):
    """A directory as the host is that of a socket."""
    url = f"postgresql://postgres@/postgres?host={own_postgres.directory}&port={own_postgres.port}"
    await upgrade(url, [])
    await used(url)


async def test_a_server_without_encryption_is_refused_where_it_is_asked_for(at):
    """`sslmode=require` is kept, not dropped."""
    with pytest.raises(ConfigurationError, match="SSL"):
        await used(at("postgresql://{at}/{name}?sslmode=require"))


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ("postgresql://h/db?channel_binding=require", "channel_binding=require"),
        ("postgresql://h/db?connect_timeout=soon", "connect_timeout"),
        ("postgresql://h/db?prepared=no&nonsense=1", "nonsense, prepared"),
        ("postgresql+psycopg://h/db", r"postgresql\+psycopg is not supported"),
        ("postgresql+psycopg2://h/db", r"postgresql\+psycopg2 is not supported"),
        ("mysql://h/db", "mysql is not supported"),
        ('"postgresql://h/db"', "no database URL"),
        ("", "no database URL"),
    ],
)
def test_an_address_that_is_refused(form, words):
    """When the settings are made, by the name of what cannot work."""
    with pytest.raises(ConfigurationError, match=words):
        DatabaseSettings(url=form)


@pytest.mark.parametrize(
    ("form", "dsn"),
    [
        ("postgres://me@[::1]:5433/db", "postgresql://me@[::1]:5433/db?target_session_attrs=read-write"),
        (
            "postgresql://me:p%40ss@ep-x/db?sslmode=verify-full&sslrootcert=/ca.pem&channel_binding=prefer",
            "postgresql://me:p%40ss@ep-x/db?sslmode=verify-full&sslrootcert=%2Fca.pem&target_session_attrs=read-write",
        ),
        (
            "postgresql://h/db?ssl=require&connect_timeout=3",
            "postgresql://h/db?sslmode=require&target_session_attrs=read-write",
        ),
        ("postgresql://h/db?target_session_attrs=any", "postgresql://h/db?target_session_attrs=any"),
    ],
)
def test_what_the_driver_is_given(form, dsn):
    """Of what no server here can show: the address that asyncpg gets."""
    address = Address(parse_url(form))
    assert address.dsn == dsn
    assert address.connect_seconds == (3.0 if "connect_timeout" in form else None)
