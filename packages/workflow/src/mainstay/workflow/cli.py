"""`mainstay workflow`: which runs there are, what waits for a person, and what a person decides."""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import typer
from pydantic import SecretStr

from mainstay.cli import as_json, document, named_app, needed_app, say, settings_of, table
from mainstay.core import App, bind, derived_id
from mainstay.database import Database, DatabaseModule, DatabaseSettings
from mainstay.workflow._archive import archive, archived_run
from mainstay.workflow._history import History, Keys, StepRecord, is_child
from mainstay.workflow._payloads import Payloads
from mainstay.workflow._verdict import error_text
from mainstay.workflow.approval import ApprovalView
from mainstay.workflow.codec import PayloadCodec
from mainstay.workflow.engine import RunView, WorkflowEngine
from mainstay.workflow.module import WorkflowModule
from mainstay.workflow.settings import WorkflowSettings
from mainstay.workflow.value import ValueView
from mainstay.workflow.workflow import RunStatus

__all__ = ["commands"]

T = TypeVar("T")

_UNITS = {"d": 86_400.0, "h": 3_600.0, "m": 60.0, "s": 1.0}
_MOST = 2**31 - 1  # no database takes a number without a limit

commands = typer.Typer(
    no_args_is_help=True,
    help="Runs of workflows: start, list, show, resume, retry, fork, cancel, decide, terminate, archive.",
)

Url = Annotated[str, typer.Option(help="The database; without it that of the App, or MAINSTAY_DATABASE_URL.")]
Id = Annotated[str, typer.Argument(metavar="ID", help="The run.")]


@commands.command("list")
def list_runs(
    status: Annotated[RunStatus | None, typer.Option(help="Only runs in this state.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=_MOST, help="At most so many.")] = 50,
    url: Url = "",
) -> None:
    """The newest runs."""
    views = _with(url, lambda engine: engine.runs(status, limit=limit))
    columns = ("started", "status", "workflow", "id", "note")
    table(columns, [_row(view) for view in views], empty="no runs", beneath="note")


@commands.command("show")
def show_run(
    id: Id,
    archived: Annotated[Path | None, typer.Option("--archive", help="Look into this file instead.")] = None,
    url: Url = "",
) -> None:
    """One run, its steps, and which of them may have happened twice."""

    async def look(engine: WorkflowEngine) -> tuple[RunView, History, list[ValueView]]:
        history = await engine.history(id)
        return await engine.run(id), history, await engine.values(id)

    if archived is None:
        view, history, values = _with(url, look)
    else:
        view, history, values = archived_run(archived, id, Payloads(next(iter(_codec()), None)))
    facts = _facts(view)
    said = {value.set_by: value.at for value in sorted(values, key=lambda value: value.at)}
    records = sorted(history.records.values(), key=lambda record: record.seq)
    keys = Keys(view.id, view.generation)
    steps = [_step(record, keys, said.get(record.key)) for record in records]
    published = [_value(value) for value in values]
    if as_json():
        document({**facts, "steps": steps, "values": published})
        return
    say(*(f"{name:9} {value}" for name, value in facts.items() if value is not None), "")
    table(("step", "state", "attempts", "note"), steps, empty="no steps yet", beneath="note")
    if published:
        say("")
        table(("value", "content", "set", "by"), published)


@commands.command("start")
def start_run(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The workflow.")],
    input: Annotated[str, typer.Option(help="A JSON object of its arguments by name; - reads standard input.")] = "{}",
    id: Annotated[str, typer.Option(help="The run's; started again with it, it is the same run.")] = "",
    version: Annotated[int, typer.Option(min=0, help="Of the workflow; without it the newest of the App.")] = 0,
    url: Url = "",
) -> None:
    """Begin a run. With --app its input is checked here, else by the worker that has the code."""
    arguments = _object(_read_input() if input == "-" else input)

    async def start(engine: WorkflowEngine) -> str:
        return await engine.start_by_name(name, arguments, version=version or None, id=id or None)

    app = named_app()

    async def in_the_app() -> str:
        assert app is not None  # noqa: S101  asked below
        async with app:
            return await start(app.get(WorkflowEngine))

    try:
        run_id = _with(url, start) if app is None else asyncio.run(in_the_app())
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    _tell(run_id, f"{run_id} begins as soon as a worker takes it")


def _read_input() -> str:
    if sys.stdin is None:  # pyright: ignore[reportUnnecessaryComparison]  closed
        msg = "standard input is closed: write the JSON object there, or give it instead of -"
        raise typer.BadParameter(msg, param_hint="'--input'")
    return sys.stdin.read()


def _object(text: str) -> dict[str, Any]:
    try:
        found: object = json.loads(text, object_pairs_hook=_members)
    except (ValueError, RecursionError) as error:
        msg = f"no JSON: {error}"
        raise typer.BadParameter(msg, param_hint="'--input'") from None
    if not isinstance(found, dict):
        msg = 'it is a JSON object of arguments by name, such as {"order_id": 7}'
        raise typer.BadParameter(msg, param_hint="'--input'")
    return cast("dict[str, Any]", found)


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The members of an object; which of two with one name is meant cannot be known."""
    members = dict(pairs)
    if len(members) < len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        msg = f"an object has the member {name!r} twice"
        raise ValueError(msg)
    return members


@commands.command("resume")
def resume_run(id: Id, url: Url = "") -> None:
    """Let a parked run go on where it stopped."""
    _with(url, lambda engine: engine.resume(id))
    _tell(id, f"{id} goes on as soon as a worker takes it")


@commands.command("cancel")
def cancel_run(id: Id, url: Url = "") -> None:
    """Stop a run at its next boundary and undo what it did."""
    _with(url, lambda engine: engine.cancel(id))
    _tell(id, f"{id} will be cancelled at its next boundary between steps")


@commands.command("retry")
def retry_run(
    id: Id,
    step: Annotated[str, typer.Option("--from", metavar="STEP", help="The step's key, as `show` lists it: charge:1.")],
    url: Url = "",
) -> None:
    """Let a parked run go on from a step: it and those that began later are attempted again."""
    _with(url, lambda engine: engine.retry_from(id, step))
    _tell(id, f"{id} goes on from {step} as soon as a worker takes it")


@commands.command("fork")
def fork_run(
    id: Id,
    before: Annotated[str, typer.Option(metavar="STEP", help="Its key, such as charge:1; `show` lists them.")],
    new_id: Annotated[str, typer.Option("--id", metavar="NEW", help="The new run's.")],
    url: Url = "",
) -> None:
    """Begin a new run with the input of one that has ended, and what it did before a step."""
    _with(url, lambda engine: engine.fork(id, before=before, new_id=new_id))
    _tell(new_id, f"{new_id} goes on before {before} of {id} as soon as a worker takes it")


@commands.command("terminate")
def terminate_run(
    id: Id,
    reason: Annotated[str, typer.Option(help="Why; it is kept.")],
    actor: Annotated[str, typer.Option("--as", help="Who decides; it is kept.")],
    url: Url = "",
) -> None:
    """End a run and its children at once, and undo nothing: the last resort."""

    async def end(engine: WorkflowEngine) -> None:
        with bind(actor=actor):
            await engine.terminate(id, reason=reason)

    _with(url, end)
    _tell(id, f"{id} is terminated: what it did is not undone")


@commands.command("archive")
def archive_runs(
    older_than: Annotated[str, typer.Option(metavar="AGE", help="Since their end: 30d, 12h, 90m or 45s.")],
    to: Annotated[Path, typer.Option(help="The file, which is made, or appended to.")],
    delete: Annotated[bool, typer.Option("--delete", help="Delete them, once they are in the file.")] = False,
    url: Url = "",
) -> None:
    """Copy ended runs with all that is theirs to a file, one JSON object a line."""
    seconds = _seconds(older_than)
    done = _with_app(url, lambda app: archive(app.get(Database), to, older_than_seconds=seconds, deleting=delete))
    if as_json():
        document({"written": done.written, "deleted": done.deleted, "file": str(to)})
    else:
        say(f"{done.written} runs were written to {to}, {done.deleted} were deleted")


def _seconds(age: str) -> float:
    number, unit = age[:-1], age[-1:]
    if not (number.isascii() and number.isdigit() and unit in _UNITS):
        msg = f"{age!r} is no age: write a whole number and d, h, m or s, such as 30d"
        raise typer.BadParameter(msg, param_hint="'--older-than'")
    return int(number) * _UNITS[unit]


@commands.command("approvals")
def list_approvals(
    limit: Annotated[int, typer.Option(min=1, max=_MOST, help="At most so many.")] = 50,
    url: Url = "",
) -> None:
    """What runs ask people, the oldest first."""
    asks = _with(url, lambda engine: engine.approvals.waiting(limit=limit))
    columns = ("since", "until", "escalated", "run", "approval", "place", "question")
    table(columns, [_ask(each) for each in asks], empty="nothing waits for a decision")


@commands.command("decide")
def decide(
    id: Id,
    *,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The approval.")],
    approve: Annotated[bool, typer.Option("--approve/--reject", help="The decision.")],
    actor: Annotated[str, typer.Option("--as", help="Who decides.")],
    reason: Annotated[str, typer.Option(help="Why.")] = "",
    place: Annotated[str, typer.Option(help="Which ask, where the run has asked more than once.")] = "",
) -> None:
    """Decide what a run asks. The App says who may, so it has to be named by --app or MAINSTAY_APP."""
    app = needed_app()

    async def run() -> None:
        with bind(actor=actor):
            async with app:
                approvals = app.get(WorkflowEngine).approvals
                await approvals.decide(id, name, approved=approve, reason=reason, place=place or None)

    asyncio.run(run())
    _tell(id, f"{name} of {id} is {'approved' if approve else 'rejected'} by {actor}")


def _ask(view: ApprovalView) -> dict[str, Any]:
    return {
        "since": _moment(view.at),
        "until": None if view.due_at is None else _moment(view.due_at),
        "escalated": "yes" if view.escalated else "no",
        "run": view.run_id,
        "approval": view.name,
        "place": view.place,
        "question": view.question,
    }


def _tell(id: str, what: str) -> None:
    if as_json():
        document({"run": id, "detail": what})
    else:
        say(what)


def _with(url: str, work: Callable[[WorkflowEngine], Awaitable[T]]) -> T:
    return _with_app(url, lambda app: work(app.get(WorkflowEngine)))


def _with_app(url: str, work: Callable[[App], Awaitable[T]]) -> T:
    named = DatabaseSettings(url=SecretStr(url)) if url else settings_of(DatabaseModule)
    database = named.model_copy(update={"migrate": False})

    async def run() -> T:
        modules = DatabaseModule.for_root(database), WorkflowModule.for_root(WorkflowSettings())
        async with App(*modules, WorkflowModule.for_feature(*_codec())) as app:
            return await work(app)

    return asyncio.run(run())


def _codec() -> list[PayloadCodec]:
    """What reads the payloads of the named App."""
    app = named_app()
    modules = [] if app is None else [module for module in app.modules if isinstance(module, WorkflowModule)]
    return [part for module in modules for part in module.parts if isinstance(part, PayloadCodec)]


def _row(view: RunView) -> dict[str, Any]:
    return {
        "started": f"{view.created_at:%Y-%m-%d %H:%M:%S}",
        "status": str(view.status),
        "workflow": f"{view.workflow} v{view.version}",
        "id": view.id,
        "note": _note(view),
    }


def _note(view: RunView) -> str | None:
    if view.status.terminal:  # a run that was terminated has its old note, too
        return _failure(view)
    until = _waits(view)
    return view.note or _failure(view) or (None if until is None else f"waits {until}")


def _failure(view: RunView) -> str | None:
    return None if view.failure is None else error_text(view.failure)


def _waits(view: RunView) -> str | None:
    if view.due_at is None or view.due_at <= datetime.now(UTC):
        return None
    return f"until {_moment(view.due_at)} at the latest"


def _facts(view: RunView) -> dict[str, Any]:
    generation = f", generation {view.generation}" if view.generation > 1 else ""
    return {
        "run": view.id,
        "parent": view.parent,
        "workflow": f"{view.workflow} version {view.version}{generation}",
        "status": f"{view.status}{' (cancellation asked for)' if view.cancel_requested else ''}",
        "why": None if view.status.terminal else view.note,
        "failure": _failure(view),
        "waits": _waits(view),
        "started": _moment(view.created_at),
        "ended": None if view.ended_at is None else _moment(view.ended_at),
        "context": view.context or None,
        "input": view.input,
        "result": view.output,
    }


def _value(view: ValueView) -> dict[str, Any]:
    return {"value": view.name, "content": view.body, "set": _moment(view.at), "by": view.set_by}


def _moment(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M:%S} UTC"


def _step(record: StepRecord, keys: Keys, said_at: datetime | None) -> dict[str, Any]:
    notes: list[str] = []
    if record.maybe_twice:
        notes.append("may have happened more than once, unless the other side honours the key")
    if record.inherited:
        notes.append(f"inherited: {record.inherited}")
    if record.state == "open" and record.dangling:
        notes.append("it is being attempted, or may have happened: no end of its last attempt is recorded")
    if is_child(record.key):
        notes.append(f"run {derived_id(record.inherited) if record.inherited else keys.of_child(record.key)}")
    if record.state == "open" and said_at is not None:
        notes.append(f"last set a value at {_moment(said_at)}")
    if record.error:
        notes.append(error_text(record.error))
    return {
        "step": record.key,
        "state": record.state,
        "attempts": max(record.began, 1),
        "note": "; ".join(notes) or None,
    }
