"""`mainstay audit`: verify the log, export it, prove an entry, make a key."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from math import inf
from pathlib import Path
from typing import Annotated, TypeVar
from uuid import UUID

import typer
from pydantic import SecretStr

from mainstay.audit import _tree
from mainstay.audit.errors import AuditError, InvalidNote
from mainstay.audit.keys import development_key_file
from mainstay.audit.module import AuditModule
from mainstay.audit.note import SigningKey, VerifierKey
from mainstay.audit.receipt import Receipt, prove, size_in
from mainstay.audit.settings import AuditSettings
from mainstay.audit.tables import SCHEMA
from mainstay.audit.verifier import Report, verify
from mainstay.cli import as_json, document, named_app, say, settings_of
from mainstay.core import App, ConfigurationError
from mainstay.database import Database, DatabaseModule, DatabaseSettings

__all__ = ["commands"]

T = TypeVar("T")

_CHUNK = 1000

commands = typer.Typer(no_args_is_help=True, help="The audit trail: verify the log, export it, prove an entry.")

Url = Annotated[str, typer.Option(help="The database; without it that of the App, or MAINSTAY_DATABASE_URL.")]
Keys = Annotated[
    list[str] | None,
    typer.Option("--key", metavar="KEY", help="Verifier key of the log; without it that of the settings."),
]


def _age(seconds: float | None) -> float | None:
    if seconds is not None and not 0 <= seconds < inf:
        msg = f"{seconds} is no number of seconds: 0 or more"
        raise typer.BadParameter(msg)
    return seconds


@commands.command("verify")
def verify_log(  # noqa: PLR0917  typer passes them by name
    receipt: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Check this receipt instead; needs no database.")
    ] = None,
    remember: Annotated[
        Path,
        typer.Option(metavar="FILE", help="Keeps the newest checkpoint; not on the database's host."),
    ] = Path("mainstay-audit.checkpoint"),
    key: Keys = None,
    producer: Annotated[list[str] | None, typer.Option(metavar="KEY", help="Verifier key of a producer.")] = None,
    max_age: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            callback=_age,
            help="A problem if the newest checkpoint is older; sealers sign one a minute even when nothing happens.",
        ),
    ] = None,
    url: Url = "",
) -> None:
    """Check the whole log, or one receipt; 1 where something is wrong with it."""
    if receipt is not None:
        _check_receipt(receipt.read_text(), key or [])
        return
    remembered = _remembered(remember)

    async def look(database: Database) -> Report:
        keys: list[VerifierKey | str] = [*key] if key else [_own_key(database)]
        return await verify(database, keys, producers=producer or [], remembered=remembered, max_age_seconds=max_age)

    report = _with(url, look)
    if report.ok and report.checkpoint is None:
        msg = "the log is empty, so nothing was proved: is this the right database?"
        raise ConfigurationError(msg)
    _tell(report, remembered)
    if not report.ok or report.checkpoint is None:
        raise typer.Exit(1)
    _remember(remember, report.checkpoint)


@commands.command("export")
def export_entries(
    first: Annotated[int, typer.Option(min=0, metavar="N", help="Begin with this entry.")] = 0, url: Url = ""
) -> None:
    """Print the entries, one a line, exactly as they are hashed; with --json as one list."""

    async def export(database: Database) -> None:
        latest = await _tree.latest_checkpoint(database)
        size = 0 if latest is None else size_in(latest[1])
        if as_json():
            typer.echo("[")
        for low in range(first, size, _CHUNK):
            for place, data in enumerate(await _tree.leaves(database, low, min(low + _CHUNK, size)), low):
                typer.echo(("," if as_json() and place > first else "") + data.decode())
        if as_json():
            typer.echo("]")

    _with(url, export)


@commands.command("prove")
def prove_entry(entry: Annotated[UUID, typer.Argument(metavar="ID", help="The entry.")], url: Url = "") -> None:
    """Print the receipt of an entry."""
    typer.echo(_with(url, lambda database: prove(database, entry)).to_text())


@commands.command("key")
def make_key(
    name: Annotated[str, typer.Argument(help="Of the log, such as orders.example.com/audit.")],
) -> None:
    """Make a signing key, and print it with its verifier key."""
    key = SigningKey.generate(name)
    if as_json():
        document({"signing_key": key.private_text(), "verifier_key": key.verifier.text})
        return
    typer.echo(key.private_text())
    typer.echo(f"# to verify with: {key.verifier.text}")


def _with(url: str, work: Callable[[Database], Awaitable[T]]) -> T:
    named = DatabaseSettings(url=SecretStr(url)) if url else settings_of(DatabaseModule)
    settings = named.model_copy(update={"migrate": False})

    async def run() -> T:
        async with App(DatabaseModule.for_root(settings)) as app:
            database = app.get(Database)
            await database.ensure_schema(SCHEMA)
            return await work(database)

    return asyncio.run(run())


def _check_receipt(text: str, keys: list[str]) -> None:
    if not keys:
        msg = "a receipt is checked against a key that you trust: --key"
        raise typer.BadParameter(msg)
    try:
        entry = Receipt.from_text(text).verify([VerifierKey.parse(key) for key in keys])
    except InvalidNote:
        raise
    except AuditError as error:
        _verdict(proved=False, text=f"NOT PROVED: {error}")
        raise typer.Exit(1) from None
    what = f"{entry.action} {entry.resource or ''} {entry.outcome} at {entry.time} by {entry.actor or '(no actor)'}"
    _verdict(proved=True, text=f"proved: {what}")


def _verdict(*, proved: bool, text: str) -> None:
    if as_json():
        document({"proved": proved, "detail": text})
    else:
        say(text)


def _own_key(database: Database) -> VerifierKey:
    settings = AuditSettings() if named_app() is None else settings_of(AuditModule)
    if settings.signing_key is not None:
        return SigningKey.parse(settings.signing_key.get_secret_value()).verifier
    file = settings.signing_key_file or development_key_file(database)
    if not file.exists():
        msg = "no key to verify with: pass --key with the line that `mainstay audit key` printed for it"
        raise ConfigurationError(msg)
    return SigningKey.parse(file.read_text()).verifier


def _remembered(file: Path) -> str | None:
    if not file.exists():
        return None
    if not file.is_file():  # a device or a pipe has no end, and would be replaced by the new checkpoint
        msg = f"{file} is no regular file: name one that is, or that is not there yet, with --remember"
        raise ConfigurationError(msg)
    return file.read_text()


def _remember(file: Path, note: str) -> None:
    # Whole or not at all: half a checkpoint would look like a forged one.
    draft = file.with_name(file.name + ".new")
    try:
        draft.write_text(note)
        draft.replace(file)
    except OSError as error:  # a full disk is told without a name
        raise OSError(error.errno, error.strerror, str(draft)) from error


def _tell(report: Report, remembered: str | None) -> None:
    if as_json():
        document({"ok": report.ok, **asdict(report)})
        return
    try:
        since = "nothing remembered" if remembered is None else f"{size_in(remembered)} remembered"
    except InvalidNote:
        since = "what is remembered is no checkpoint"
    age = "" if report.age_seconds is None else f", the newest {report.age_seconds:.0f} s old"
    say(
        f"sealed entries: {report.entries} (statements among them: {report.statements}, of producers: "
        f"{report.producers}), pending: {report.pending}, checkpoints: {report.checkpoints}{age}; {since}",
        f"entries in no statement yet: {report.unstated}; producers without a final one: {report.unfinished}",
        *(f"PROBLEM {problem.kind}: {problem.detail}" for problem in report.problems),
        "the log is intact" if report.ok else "THE LOG IS NOT INTACT",
    )
