"""The command `mainstay-database`: brings the tables of all installed packages up to date, or says how they stand."""

from __future__ import annotations

import argparse
import asyncio
import sys

from mainstay.core import ConfigurationError
from mainstay.database.schema import installed, status, upgrade
from mainstay.database.settings import DatabaseSettings, parse_url, variable_of_url


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit status is 0, 1 where `status` finds something to do, 2 for an error."""
    parser = argparse.ArgumentParser(prog="mainstay-database", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, text in (("upgrade", "bring the tables up to date"), ("status", "say which tables are not up to date")):
        command = verbs.add_parser(verb, help=text, description=text)
        command.add_argument("--url", help=f"the database; without it, {variable_of_url()}")
        if verb == "upgrade":
            command.add_argument("--sql", action="store_true", help="print the statements of a first installation")
    options = parser.parse_args(arguments)
    try:
        url = options.url or DatabaseSettings().url.get_secret_value()
        if options.verb == "status":
            return asyncio.run(_status(url))
        if options.sql:
            dialect = parse_url(url).get_backend_name()
            for schema in installed():
                print(schema.sql(dialect))
        else:
            asyncio.run(_upgrade(url))
    except (ConfigurationError, ValueError) as error:
        print(f"mainstay-database: {error}", file=sys.stderr)
        return 2
    return 0


async def _status(url: str) -> int:
    old = 0
    for package, current, head in await status(url, installed()):
        old |= current != head
        state = "up to date" if current == head else f"newest is {head}: run `mainstay-database upgrade`"
        print(f"{package:16} {current or 'no tables':12} {state}")
    return old


async def _upgrade(url: str) -> None:
    schemas = installed()
    await upgrade(url, schemas)
    print("up to date: " + ", ".join(schema.package for schema in schemas))
