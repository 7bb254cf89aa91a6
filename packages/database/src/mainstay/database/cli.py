"""`mainstay db`: the tables of packages and applications."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Coroutine, Generator
from contextlib import contextmanager
from typing import Annotated, Any, TypeVar

import typer
from sqlalchemy.exc import SQLAlchemyError

from mainstay.cli import as_json, document, object_at, say, settings_of, table
from mainstay.database._translation import translate
from mainstay.database.errors import DatabaseError
from mainstay.database.module import DatabaseModule
from mainstay.database.schema import Schema, downgrade, installed, revision, status, upgrade, upgrade_command
from mainstay.database.settings import parse_url, shown, variable_of_url

__all__ = ["commands"]

T = TypeVar("T")

commands = typer.Typer(no_args_is_help=True, help="The tables of packages and of applications.")

Url = Annotated[str, typer.Option(help=f"The database; without it that of the App, or {variable_of_url()}.")]
SchemaOption = Annotated[
    str, typer.Option("--schema", metavar="MODULE:NAME", help="The schema of an application, as loans.tables:SCHEMA.")
]
NeededSchema = Annotated[
    str, typer.Option("--schema", metavar="MODULE:NAME", help="The schema of the application, as loans.tables:SCHEMA.")
]


@commands.command("upgrade")
def upgrade_tables(
    url: Url = "",
    schema: SchemaOption = "",
    sql: Annotated[bool, typer.Option("--sql", help="Print the statements of a first installation.")] = False,
) -> None:
    """Bring the tables up to date, in one transaction."""
    schemas = _schemas(schema)
    if sql:
        dialect = parse_url(_url(url)).get_backend_name()
        statements = {each.package: each.sql(dialect) for each in schemas}
        if as_json():
            document(statements)
            return
        for text in statements.values():
            typer.echo(text)
        return
    address = _url(url)
    with _ended_by_ctrl_c():
        _done(address, upgrade(address, schemas))
    names = [each.package for each in schemas]
    if as_json():
        document({"up to date": names})
    else:
        say("up to date: " + ", ".join(names))


@commands.command("status")
def status_of_tables(url: Url = "", schema: SchemaOption = "") -> None:
    """Say which tables are not up to date; 1 where some are not. Nothing is changed."""
    schemas = _schemas(schema)
    address = _url(url)
    found = _done(address, status(address, schemas))
    rows = [
        {
            "schema": package,
            "revision": current or "no tables",
            "newest": newest,
            "state": "up to date" if current == newest else f"run `{upgrade_command(each)}`",
        }
        for each, (package, current, newest) in zip(schemas, found, strict=True)
    ]
    table(("schema", "revision", "newest", "state"), rows)
    if any(row["state"] != "up to date" for row in rows):
        raise typer.Exit(1)


@commands.command("revision")
def new_revision(
    message: Annotated[str, typer.Argument(help="What the revision does, in a few words.")],
    schema: NeededSchema,
    url: Url = "",
    empty: Annotated[bool, typer.Option("--empty", help="Do not compare; the functions are left empty.")] = False,
) -> None:
    """Write a revision file with what the database lacks of a schema."""
    address = _url(url)
    path = _done(address, revision(address, _named(schema), message, autogenerate=not empty))
    if as_json():
        document({"file": str(path)})
    else:
        say(path)


@commands.command("downgrade")
def downgrade_tables(
    target: Annotated[str, typer.Argument(help="A revision; `base` for no tables at all.")],
    schema: NeededSchema,
    url: Url = "",
) -> None:
    """Take the tables of a schema back to an older revision."""
    address, named = _url(url), _named(schema)
    with _ended_by_ctrl_c():
        _done(address, downgrade(address, named, target))
    if as_json():
        document({"schema": named.package, "revision": target})
    else:
        say(f"{schema} is at {target}")


def _url(url: str) -> str:
    address = url or settings_of(DatabaseModule).url.get_secret_value()
    try:
        parse_url(address)
    except ValueError as error:
        msg = f"it {error}"
        raise typer.BadParameter(msg, param_hint="'--url'") from None
    return address


def _done(url: str, work: Coroutine[Any, Any, T]) -> T:
    """Do it, with an error of the driver's as one of ours that names the database."""
    try:
        return asyncio.run(work)
    except SQLAlchemyError as error:
        msg = f"{shown(parse_url(url))}: {translate(error)}"
        raise DatabaseError(msg) from error


@contextmanager
def _ended_by_ctrl_c() -> Generator[None, None, None]:
    """End the process at once at Ctrl-C: a migration in a thread would go on, and the database undoes half of one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _named(place: str) -> Schema:
    named: Schema = object_at(place, Schema, "loans.tables:SCHEMA")
    return named


def _schemas(place: str) -> list[Schema]:
    return [*installed(), *([_named(place)] if place else [])]
