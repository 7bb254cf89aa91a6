"""`mainstay db`: the tables of packages and applications."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from mainstay.cli import as_json, document, object_at, say, settings_of, table
from mainstay.database.module import DatabaseModule
from mainstay.database.schema import Schema, downgrade, installed, revision, status, upgrade, upgrade_command
from mainstay.database.settings import parse_url, variable_of_url

__all__ = ["commands"]

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
        for text in statements.values():
            typer.echo(text)
        return
    asyncio.run(upgrade(_url(url), schemas))
    say("up to date: " + ", ".join(each.package for each in schemas))


@commands.command("status")
def status_of_tables(url: Url = "", schema: SchemaOption = "") -> None:
    """Say which tables are not up to date; 1 where some are not. Nothing is changed."""
    schemas = _schemas(schema)
    found = asyncio.run(status(_url(url), schemas))
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
    path = asyncio.run(revision(_url(url), _named(schema), message, autogenerate=not empty))
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
    asyncio.run(downgrade(_url(url), _named(schema), target))
    say(f"{schema} is at {target}")


def _url(url: str) -> str:
    return url or settings_of(DatabaseModule).url.get_secret_value()


def _named(place: str) -> Schema:
    named: Schema = object_at(place, Schema, "loans.tables:SCHEMA")
    return named


def _schemas(place: str) -> list[Schema]:
    return [*installed(), *([_named(place)] if place else [])]
