"""The command `mainstay-audit`: verify the log, export it, prove an entry, make a key."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from uuid import UUID

from mainstay.audit import tree
from mainstay.audit.errors import AuditError, InvalidNote
from mainstay.audit.keys import development_key_file
from mainstay.audit.note import SigningKey, VerifierKey
from mainstay.audit.receipt import Receipt, prove, size_in
from mainstay.audit.settings import AuditSettings
from mainstay.audit.tables import SCHEMA
from mainstay.audit.verifier import Report, verify
from mainstay.core import App, ConfigurationError
from mainstay.database import Database, DatabaseError, DatabaseModule, DatabaseSettings

_CHUNK = 1000


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit status is 0, 1 where something is wrong with the log or a receipt, 2 for an error."""
    options = _parser().parse_args(arguments)
    try:
        if options.verb == "key":
            key = SigningKey.generate(options.name)
            _say(key.private_text(), f"# to verify with: {key.verifier.text}")
            return 0
        if options.verb == "verify" and options.receipt is not None:
            return _check_receipt(options.receipt.read_text(), options.key)
        return asyncio.run(_with_database(options))
    except (ConfigurationError, AuditError, DatabaseError, OSError, ValueError) as error:
        print(f"mainstay-audit: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mainstay-audit", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    check = verbs.add_parser("verify", help="check the whole log, or one receipt")
    check.add_argument("--receipt", type=Path, metavar="FILE", help="check this receipt instead; needs no database")
    check.add_argument(
        "--remember",
        type=Path,
        metavar="FILE",
        default=Path("mainstay-audit.checkpoint"),
        help="keeps the newest checkpoint for the next time; not where the database is (default: %(default)s)",
    )
    check.add_argument("--producer", action="append", default=[], metavar="KEY", help="verifier key of a producer")
    check.add_argument(
        "--key", action="append", default=[], metavar="KEY", help="verifier key of the log; default: from the settings"
    )
    check.add_argument(
        "--max-age",
        type=float,
        metavar="SECONDS",
        help="a problem if the newest checkpoint is older; sealers sign one a minute even when nothing happens",
    )
    export = verbs.add_parser("export", help="print the entries, one a line, exactly as they are hashed")
    export.add_argument("--first", type=int, default=0, metavar="N", help="begin with this entry (default: 0)")
    receipt = verbs.add_parser("prove", help="print the receipt of an entry")
    receipt.add_argument("entry", type=UUID, help="the id of the entry")
    for command in (check, export, receipt):
        command.add_argument("--url", help="the database; default: MAINSTAY_DATABASE_URL")
    key = verbs.add_parser("key", help="make a signing key and print it with its verifier key")
    key.add_argument("name", help="of the log, such as orders.example.com/audit")
    return parser


async def _with_database(options: argparse.Namespace) -> int:
    settings = DatabaseSettings(url=options.url) if options.url else DatabaseSettings()
    async with App(DatabaseModule.for_root(settings)) as app:
        database = app.get(Database)
        await database.ensure_schema(SCHEMA)
        if options.verb == "prove":
            _say((await prove(database, options.entry)).to_text())
            return 0
        if options.verb == "export":
            return await _export(database, options.first)
        remembered = options.remember.read_text() if options.remember.exists() else None
        report = await verify(
            database,
            options.key or [_own_key(database)],
            producers=options.producer,
            remembered=remembered,
            max_age_seconds=options.max_age,
        )
        if report.ok and report.checkpoint is None:
            msg = "the log is empty, so nothing was proved: is this the right database?"
            raise ConfigurationError(msg)
        _tell(report, remembered)
        if not report.ok or report.checkpoint is None:
            return 1
        _remember(options.remember, report.checkpoint)
        return 0


async def _export(database: Database, first: int) -> int:
    latest = await tree.latest_checkpoint(database)
    size = 0 if latest is None else size_in(latest[1])
    for low in range(first, size, _CHUNK):
        _say(*(data.decode() for data in await tree.leaves(database, low, min(low + _CHUNK, size))))
    return 0


def _check_receipt(text: str, keys: Sequence[str]) -> int:
    if not keys:
        msg = "a receipt is checked against a key that you trust: --key"
        raise ValueError(msg)
    try:
        entry = Receipt.from_text(text).verify([VerifierKey.parse(key) for key in keys])
    except InvalidNote:
        raise
    except AuditError as error:
        _say(f"NOT PROVED: {error}")
        return 1
    what = f"{entry.action} {entry.resource or ''} {entry.outcome} at {entry.time} by {entry.actor or 'nobody'}"
    _say(f"proved: {_shown(what)}")
    return 0


def _own_key(database: Database) -> VerifierKey:
    settings = AuditSettings()
    if settings.signing_key is not None:
        return SigningKey.parse(settings.signing_key.get_secret_value()).verifier
    file = settings.signing_key_file or development_key_file(database)
    if not file.exists():
        msg = "no key to verify with: pass --key with the line that `mainstay-audit key` printed for it"
        raise ConfigurationError(msg)
    return SigningKey.parse(file.read_text()).verifier


def _remember(file: Path, note: str) -> None:
    # Whole or not at all: half a checkpoint would look like a forged one.
    draft = file.with_name(file.name + ".new")
    draft.write_text(note)
    draft.replace(file)


def _tell(report: Report, remembered: str | None) -> None:
    try:
        since = "nothing remembered" if remembered is None else f"{size_in(remembered)} remembered"
    except InvalidNote:
        since = "what is remembered is no checkpoint"
    age = "" if report.age_seconds is None else f", the newest {report.age_seconds:.0f} s old"
    _say(
        f"{report.entries} entries sealed ({report.statements} of them statements of {report.producers} producers), "
        f"{report.pending} pending, {report.checkpoints} checkpoints{age}; {since}",
        f"{report.unstated} entries are in no statement yet; {report.unfinished} producers have no final one",
        *(f"PROBLEM {problem.kind}: {_shown(problem.detail)}" for problem in report.problems),
        "the log is intact" if report.ok else "THE LOG IS NOT INTACT",
    )


def _shown(text: str) -> str:
    """What others have written, with nothing in it that moves the cursor or begins a line."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def _say(*lines: str) -> None:
    for line in lines:
        print(line)
