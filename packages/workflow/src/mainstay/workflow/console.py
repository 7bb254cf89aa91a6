"""The command `mainstay-workflow`: which runs there are, what waits for a person, and what a person decides."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys

from pydantic import SecretStr

from mainstay.core import App, MainstayError
from mainstay.database import DatabaseModule, DatabaseSettings
from mainstay.workflow.engine import RunView, WorkflowEngine
from mainstay.workflow.journal import Record
from mainstay.workflow.module import WorkflowModule
from mainstay.workflow.settings import WorkflowSettings
from mainstay.workflow.workflow import RunStatus


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit status is 0, or 2 where what was asked for cannot be done."""
    parser = argparse.ArgumentParser(prog="mainstay-workflow", description=__doc__)
    parser.add_argument("--url", help="the database; without it, MAINSTAY_DATABASE_URL")
    verbs = parser.add_subparsers(dest="verb", required=True)
    listing = verbs.add_parser("list", help="the newest runs", description="The newest runs.")
    listing.add_argument("--status", choices=[str(status) for status in RunStatus], help="only those")
    listing.add_argument("--limit", type=int, default=50, help="at most so many (50)")
    for verb, text in (
        ("show", "one run, its steps, and what may have happened twice"),
        ("resume", "let a parked run go on where it stopped"),
        ("cancel", "stop a run at its next boundary and undo what it did"),
    ):
        command = verbs.add_parser(verb, help=text, description=text)
        command.add_argument("id")
    options = parser.parse_args(arguments)
    try:
        return asyncio.run(_run(options))
    except MainstayError as error:
        print(f"mainstay-workflow: {error}", file=sys.stderr)
        return 2


async def _run(options: argparse.Namespace) -> int:
    database = DatabaseSettings() if options.url is None else DatabaseSettings(url=SecretStr(options.url))
    app = App(DatabaseModule.for_root(database), WorkflowModule.for_root(WorkflowSettings()))
    async with app:
        engine = app.get(WorkflowEngine)
        if options.verb == "list":
            status = None if options.status is None else RunStatus(options.status)
            lines = _table(await engine.runs(status, limit=options.limit))
        elif options.verb == "show":
            lines = await _show(engine, options.id)
        elif options.verb == "resume":
            await engine.resume(options.id)
            lines = [f"{options.id} goes on as soon as a worker takes it"]
        else:
            await engine.cancel(options.id)
            lines = [f"{options.id} will be cancelled at its next boundary between steps"]
    print("\n".join(lines))
    return 0


def _table(views: list[RunView]) -> list[str]:
    lines = [f"{'started':19}  {'status':19}  {'workflow':24}  id"]
    for view in views:
        workflow = f"{view.workflow} v{view.version}"
        lines.append(f"{view.created_at:%Y-%m-%d %H:%M:%S}  {view.status:19}  {workflow:24}  {view.id}")
        if view.note:
            lines.append(f"{'':19}  {view.note}")
    return lines


async def _show(engine: WorkflowEngine, id: str) -> list[str]:
    view = await engine.run(id)
    history = await engine.history(id)
    facts = {
        "run": view.id,
        "workflow": f"{view.workflow} version {view.version}",
        "status": f"{view.status}{' (cancellation asked for)' if view.cancel_requested else ''}",
        "why": view.note,
        "failure": None if view.failure is None else f"{view.failure['type']}: {view.failure['detail']}",
        "started": f"{view.created_at:%Y-%m-%d %H:%M:%S} UTC",
        "ended": None if view.ended_at is None else f"{view.ended_at:%Y-%m-%d %H:%M:%S} UTC",
        "context": json.dumps(view.context) if view.context else None,
        "input": view.input,
        "result": view.output,
    }
    lines = [f"{name:9} {value}" for name, value in facts.items() if value is not None]
    lines += ["", f"{'step':32} {'state':8} attempts"]
    lines += [_step(record) for record in sorted(history.records.values(), key=lambda record: record.seq)]
    return lines


def _step(record: Record) -> str:
    notes: list[str] = []
    if record.maybe_twice:
        notes.append("may have happened more than once, unless the other side honours the key")
    if record.state == "open" and record.dangling:
        notes.append("nobody saw the end of the last attempt")
    if record.error:
        notes.append(f"{record.error['type']}: {record.error['detail']}")
    return f"{record.key:32} {record.state:8} {max(record.began, 1):8}  {'; '.join(notes)}".rstrip()
