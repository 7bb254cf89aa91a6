"""The command `mainstay-database`: migrates tables of packages and applications, or says how they stand."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import sys
from collections.abc import Sequence

from mainstay.core import ConfigurationError
from mainstay.database.schema import Schema, downgrade, installed, revision, status, upgrade, upgrade_command
from mainstay.database.settings import DatabaseSettings, parse_url, variable_of_url


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit status is 0, 1 where `status` finds something to do, 2 for an error."""
    options = _parser().parse_args(arguments)
    try:
        url = options.url or DatabaseSettings().url.get_secret_value()
        named = [] if options.schema is None else [load(options.schema)]
        schemas = [*installed(), *named]
        match options.verb:
            case "status":
                return asyncio.run(_status(url, schemas))
            case "upgrade" if options.sql:
                dialect = parse_url(url).get_backend_name()
                for schema in schemas:
                    print(schema.sql(dialect))
            case "upgrade":
                asyncio.run(upgrade(url, schemas))
                print("up to date: " + ", ".join(schema.package for schema in schemas))
            case "downgrade":
                asyncio.run(downgrade(url, named[0], options.target))
            case _:
                compared = not options.empty
                print(asyncio.run(revision(url, named[0], options.message, autogenerate=compared)))
    except (ConfigurationError, ValueError) as error:
        print(f"mainstay-database: {error}", file=sys.stderr)
        return 2
    return 0


def load(place: str) -> Schema:
    """Import the schema at `module:NAME`; modules of the current directory are found.

    Raises:
        ConfigurationError: there is none.
    """
    name, _, attribute = place.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found = getattr(importlib.import_module(name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        msg = f"there is no schema at {place!r} ({error}): name the module and the variable, as loans.tables:SCHEMA"
        raise ConfigurationError(msg) from error
    if not isinstance(found, Schema):
        msg = f"{place!r} is no mainstay.database.Schema but a {type(found).__name__}"
        raise ConfigurationError(msg)
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mainstay-database", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, text in (
        ("upgrade", "bring the tables up to date"),
        ("status", "say which tables are not up to date"),
        ("revision", "write a revision file with what the database lacks of a schema"),
        ("downgrade", "take the tables of a schema back to an older revision"),
    ):
        command = verbs.add_parser(verb, help=text, description=text)
        command.add_argument("--url", help=f"the database; without it, {variable_of_url()}")
        command.add_argument(
            "--schema",
            metavar="MODULE:NAME",
            required=verb in {"revision", "downgrade"},
            help="the schema of an application, such as loans.tables:SCHEMA",
        )
        if verb == "upgrade":
            command.add_argument("--sql", action="store_true", help="print the statements of a first installation")
        elif verb == "downgrade":
            command.add_argument("target", help="a revision, `base` for no tables at all")
        elif verb == "revision":
            command.add_argument("message", help="what the revision does, in a few words")
            command.add_argument("--empty", action="store_true", help="do not compare; the functions are left empty")
    return parser


async def _status(url: str, schemas: Sequence[Schema]) -> int:
    old = 0
    for schema, (package, current, newest) in zip(schemas, await status(url, schemas), strict=True):
        old |= current != newest
        state = "up to date" if current == newest else f"newest is {newest}: run `{upgrade_command(schema)}`"
        print(f"{package:16} {current or 'no tables':12} {state}")
    return old
