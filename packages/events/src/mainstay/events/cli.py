"""The command `mainstay-events`: looks at dead letters and sends them again."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from uuid import UUID

from mainstay.core import App, MainstayError
from mainstay.database import DatabaseModule
from mainstay.events.dead_letters import DeadLetter, DeadLetters
from mainstay.events.module import EventsModule
from mainstay.events.settings import EventsSettings

_WIDE = 60


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, or 1 with the reason on stderr."""
    options = _parser().parse_args(arguments)
    try:
        return asyncio.run(_run(options))
    except MainstayError as error:
        print(f"mainstay-events: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mainstay-events",
        description="Uses the service's own settings: MAINSTAY_EVENTS_… and MAINSTAY_DATABASE_… from the environment.",
    )
    topics = parser.add_subparsers(required=True, metavar="dead-letters")
    letters = topics.add_parser("dead-letters", help="events that could not be handled")
    commands = letters.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="the oldest first")
    listing.add_argument("--group", help="of this consumer group only")
    listing.add_argument("--limit", type=int, default=100)
    show = commands.add_parser("show", help="everything about one")
    show.add_argument("id", type=UUID)
    redrive = commands.add_parser("redrive", help="send again, to the group that failed and to no other")
    which = redrive.add_mutually_exclusive_group(required=True)
    which.add_argument("id", type=UUID, nargs="*", default=[])
    which.add_argument("--all", action="store_true", help="every one that is there now")
    redrive.add_argument("--group", help="with --all: of this consumer group only")
    return parser


async def _run(options: argparse.Namespace) -> int:
    settings = EventsSettings()
    if settings.transport == "memory":
        print("mainstay-events: the memory transport keeps nothing for other processes", file=sys.stderr)
        return 1
    modules = [DatabaseModule.for_root()] if settings.writes_database else []
    async with App(*modules, EventsModule.for_root(settings)) as app:
        letters = app.get(DeadLetters)
        if options.command == "list":
            for letter in await letters.list(options.group, limit=options.limit):
                print(_line(letter))
        elif options.command == "show":
            print(_page(await letters.get(options.id)))
        else:
            await _redrive(letters, options)
    return 0


async def _redrive(letters: DeadLetters, options: argparse.Namespace) -> None:
    ids: list[UUID] = options.id
    if options.all:
        ids = [letter.id for letter in await letters.list(options.group, limit=1_000_000)]
    for wanted in ids:
        letter = await letters.redrive(wanted)
        print(f"sent again: {letter.id} to group {letter.group}")


def _line(letter: DeadLetter) -> str:
    reason = letter.error.rpartition("\n")[2]
    reason = reason if len(reason) <= _WIDE else f"{reason[: _WIDE - 1]}…"
    kind = letter.type or "(no type)"
    return f"{letter.id}  {letter.time:%Y-%m-%d %H:%M:%S}  {letter.group}  {kind}  {reason}"


def _page(letter: DeadLetter) -> str:
    headers = "\n".join(f"  {name}: {value.decode(errors='backslashreplace')}" for name, value in letter.headers)
    value = "(none)" if letter.value is None else letter.value.decode(errors="backslashreplace")
    key = "(none)" if letter.key is None else letter.key.decode(errors="backslashreplace")
    return (
        f"id        {letter.id}\ngroup     {letter.group}\n"
        f"read at   {letter.topic}/{letter.partition}@{letter.offset}\n"
        f"given up  {letter.time:%Y-%m-%d %H:%M:%S %Z} after {letter.attempts} attempts\nkey       {key}\n"
        f"headers\n{headers}\nvalue\n  {value}\nerror\n{letter.error}"
    )
