"""Archives: ended runs are in a file before they are deleted, whatever happens in between."""

import asyncio
import json
import os
import re
import resource
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from mainstay.cli import main
from mainstay.core import Retry, bind
from mainstay.core.testing import eventually
from mainstay.database import Database
from mainstay.workflow import RunNotFound, WorkflowEngine, WorkflowRouter
from mainstay.workflow._archive import Archived, archive, archived_run
from mainstay.workflow._ended import OF_A_RUN
from mainstay.workflow._payloads import Payloads
from mainstay.workflow.errors import WorkflowError
from mainstay.workflow.tables import SCHEMA, history, runs, signals, values
from mainstay.workflow.testing import DyingDatabase, Killed, workflows

WAIT = 60.0
COMMAND = "import sys; from mainstay.cli import main; sys.exit(main(sys.argv[1:]))"


def service() -> tuple[WorkflowRouter, Any, Any, Any]:
    """A workflow with a child, a signal and a step."""
    flows = WorkflowRouter()
    told, progress = flows.signal("told", str), flows.value("progress", str)

    @flows.step(retry=Retry(attempts=1), harmless=True)
    async def step(n: int) -> str:
        return f"größer: {n}"

    @flows.workflow(name="inner")
    async def inner(n: int) -> str:
        return await step(n)

    @flows.workflow(name="outer")
    async def outer(n: int) -> str:
        await progress.set("half")
        return await inner(n) + await told.wait()

    return flows, outer, inner, told


def row(n: int) -> dict[str, Any]:
    """A run that has ended long ago."""
    return {
        "id": f"r{n}",
        "workflow": "inner",
        "version": 1,
        "status": "completed" if n % 3 else "failed",
        "epoch": 1,
        "attempts": 1,
        "progress": 0,
        "wake_at": 0.0,
        "cancel_requested": False,
        "input": '{"n":1}',
        "context": "{}",
        "ended_at": 1.5 + n / 7,
    }


def entries(n: int) -> list[dict[str, Any]]:
    """Its history."""
    return [{"run_id": f"r{n}", "seq": seq, "kind": "done", "step": f"step:{seq}", "body": '"é"'} for seq in (1, 2)]


async def fill(database: Database, number: int) -> None:
    """So many ended runs."""
    await database.write(sa.insert(runs), [row(n) for n in range(number)])
    await database.write(sa.insert(history), [entry for n in range(number) for entry in entries(n)])


def lines(path: Path) -> list[dict[str, Any]]:
    """The runs in an archive."""
    return [json.loads(line) for line in path.read_text().splitlines()]


async def test_a_run_is_in_the_file_with_all_that_is_its(url: str, tmp_path: Path) -> None:
    """Copied first, deleted with its family later; what has not ended, or not long ago, stays."""
    flows, outer, _, told = service()
    path = tmp_path / "runs.jsonl"
    async with workflows(flows, url=url) as app:
        database, engine = app.get(Database), app.get(WorkflowEngine)
        run, waits = await outer.start(1, id="o"), await outer.start(2, id="waits")
        await told.send("o", "!", id="m")
        assert await run.result(WAIT) == "größer: 1!"
        children = sa.select(runs.c.id).where(runs.c.workflow == "inner", runs.c.ended_at.is_not(None))
        async with asyncio.timeout(WAIT):
            while len(await database.read(children)) < 2:  # noqa: ASYNC110  the worker's doing
                await asyncio.sleep(0.005)
        assert await archive(database, path, older_than_seconds=3_600, deleting=True) == Archived(0, 0)
        await database.write(sa.update(runs).values(ended_at=runs.c.ended_at - 7_200))
        before = (await engine.run("o"), await engine.history("o"))
        assert await archive(database, path, older_than_seconds=3_600, deleting=False) == Archived(3, 0)
        assert await archive(database, path, older_than_seconds=3_600, deleting=False) == Archived(0, 0)
        assert await archive(database, path, older_than_seconds=3_600, deleting=True) == Archived(0, 2)
        assert path.stat().st_mode & 0o077 == 0
        whole = {line["run"]["workflow"]: line for line in lines(path) if line["run"]["input"] == '{"n":1}'}
        assert [message["id"] for message in whole["outer"]["signals"]] == ["m"]
        assert whole["inner"]["run"]["parent"] == "o"
        shown, past, published = archived_run(path, "o", Payloads())
        assert (shown, past.records.keys()) == (before[0], before[1].records.keys())
        assert [(value.name, value.body) for value in published] == [("progress", '"half"')]
        left = await database.read(sa.select(runs.c.workflow).order_by(runs.c.workflow))
        assert [each.workflow for each in left] == ["inner", "outer"], "the run that waits, and its child"
        await told.send("waits", "?")
        assert await waits.result(WAIT) == "größer: 2?"


async def test_every_table_with_rows_of_runs_is_archived(url: str, tmp_path: Path) -> None:
    """What a person was asked, until when, and that it was escalated, is in the line before it is deleted."""
    of_runs = {table for table in SCHEMA.metadata.tables.values() if "run_id" in table.c}
    assert set(OF_A_RUN.values()) == of_runs
    flows, path = WorkflowRouter(), tmp_path / "runs.jsonl"
    refund = flows.approval("refund", str, may_decide=lambda _asked, actor: actor == "eva")

    @flows.workflow(name="asks")
    async def asks(n: int) -> bool:
        return (await refund.ask(f"refund {n}?", timeout_seconds=600)).approved

    async with workflows(flows, url=url) as app:
        run = await asks.start(1, id="r")
        engine = app.get(WorkflowEngine)
        await eventually(engine.approvals.waiting, seconds=WAIT)
        with bind(actor="eva"):
            await refund.decide("r", approved=True, reason="late")
        assert await run.result(WAIT)
        assert await archive(app.get(Database), path, older_than_seconds=0, deleting=True) == Archived(1, 1)
        (line,) = lines(path)
        assert {part: len(rows) > 0 for part, rows in line.items() if part != "run"} == {
            "history": True, "signals": True, "values": False, "asks": True
        }  # fmt: skip
        (asked,) = line["asks"]
        assert (asked["name"], json.loads(asked["question"]), asked["open"]) == ("refund", "refund 1?", False)
        assert asked["due_at"] > asked["asked_at"]
        for table in of_runs:
            assert await app.get(Database).read(sa.select(table)) == []


@pytest.mark.parametrize("after", [False, True])
async def test_a_kill_in_between_loses_nothing(url: str, tmp_path: Path, after: bool) -> None:
    """Before and after each deletion is durable; begun again, the archive has each run once."""
    flows, *_ = service()
    async with workflows(flows, url=url, serve=False) as app:
        database = app.get(Database)
        for at in (1, 2, 3):
            path = tmp_path / f"{at}.jsonl"
            await fill(database, 250)
            dying: Any = DyingDatabase(database, at, after=after)
            with pytest.raises(Killed):
                await archive(dying, path, older_than_seconds=60, deleting=True)
            left = {each.id for each in await database.read(sa.select(runs.c.id))}
            assert left | {line["run"]["id"] for line in lines(path)} == {f"r{n}" for n in range(250)}
            with path.open("a") as file:
                file.write('{"run":{"id":"r')  # and a line that a kill broke off
            await archive(database, path, older_than_seconds=60, deleting=True)
            assert Counter(line["run"]["id"] for line in lines(path)) == Counter(f"r{n}" for n in range(250))
            assert all(len(line["history"]) == 2 for line in lines(path))
            for table in (runs, history, signals, values):
                assert await database.read(sa.select(sa.literal(1)).select_from(table)) == []


def killed_while_writing(command: list[str], path: Path) -> None:
    """Kill a process once it has written something, should it not have ended before."""
    size = path.stat().st_size if path.exists() else 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and (path.stat().st_size if path.exists() else 0) <= size:
            time.sleep(0.001)
        process.kill()


def holding(path: Path) -> "subprocess.Popen[str]":
    """A process that has the file for itself until it gets a line."""
    held = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, 2); print('held', flush=True); input()"
    command = [sys.executable, "-c", held, str(path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    return process


async def test_a_process_that_is_killed_while_it_archives(shared: str, tmp_path: Path) -> None:
    """Killed again and again by SIGKILL, wherever it is: every run is in the file or in the table, as a whole."""
    flows, *_ = service()
    path, number = tmp_path / "runs.jsonl", 1_500
    command = [sys.executable, "-c", COMMAND, "workflow", "archive", "--older-than", "1d", "--to", str(path)]
    async with workflows(flows, url=shared, serve=False) as app:
        database = app.get(Database)
        await fill(database, number)
        for _ in range(2):
            await asyncio.to_thread(killed_while_writing, [*command, "--delete", "--url", shared], path)
            written = {line["run"]["id"] for line in map(json.loads, path.read_text().split("\n")[:-1])}
            left = {each.id for each in await database.read(sa.select(runs.c.id))}
            assert written | left == {f"r{n}" for n in range(number)}
        await archive(database, path, older_than_seconds=60, deleting=True)
        assert Counter(line["run"]["id"] for line in lines(path)) == Counter(f"r{n}" for n in range(number))
        assert all(len(line["history"]) == 2 for line in lines(path))
        assert await database.read(sa.select(runs.c.id)) == []


async def test_a_run_that_went_back_meanwhile_is_not_deleted(url: str, tmp_path: Path) -> None:
    """Only the run that has its line goes: one that is compensated after it was read is another."""
    flows, *_ = service()
    async with workflows(flows, url=url, serve=False) as app:
        database, engine = app.get(Database), app.get(WorkflowEngine)
        await fill(database, 2)

        undone = list[str]()

        class Compensating:
            """A database that is asked to take a run back just before it is deleted."""

            def __getattr__(self, name: str) -> Any:
                return getattr(database, name)

            async def read(self, *args: Any) -> Any:
                found = await database.read(*args)
                if not undone and found and "output" in found[0]._mapping:  # what was just read is written next
                    undone.append("r1")
                    await engine.compensate("r1")
                return found

        meanwhile: Any = Compensating()
        path = tmp_path / "runs.jsonl"
        assert await archive(meanwhile, path, older_than_seconds=60, deleting=True) == Archived(2, 1)
        assert (await engine.run("r1")).cancel_requested is False
        assert len((await engine.history("r1")).records) == 2


async def test_a_file_that_is_none_or_in_use_is_refused(tmp_path: Path) -> None:
    """What is no archive is not appended to, and two processes do not write to one."""
    flows, *_ = service()
    async with workflows(flows, serve=False) as app:
        database = app.get(Database)
        await fill(database, 1)
        other = tmp_path / "notes.txt"
        other.write_text("hello\n")
        with pytest.raises(WorkflowError, match="no archive of runs"):
            await archive(database, other, older_than_seconds=1, deleting=True)
        assert other.read_text() == "hello\n"
        other.write_text("hello")  # no line that a kill broke off
        with pytest.raises(WorkflowError, match="no archive of runs"):
            await archive(database, other, older_than_seconds=1, deleting=True)
        assert other.read_text() == "hello"
        path = tmp_path / "runs.jsonl"
        process = await asyncio.to_thread(holding, path)
        with pytest.raises(WorkflowError, match="is being written by another process"):
            await archive(database, path, older_than_seconds=1, deleting=True)
        await asyncio.to_thread(process.communicate, "\n")
        assert await archive(database, path, older_than_seconds=1, deleting=True) == Archived(1, 1)
        with pytest.raises(RunNotFound):
            archived_run(path, "other", Payloads())


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    """A named pipe without a reader at its other end."""
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


def test_what_is_no_file_is_refused(tmp_path: Path, pipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A device has no end, keeps nothing or is full, and a pipe waits: the command names it, and deletes nothing."""
    url = f"sqlite+aiosqlite:///{tmp_path / 'test.db'}"

    async def filled() -> None:
        async with workflows(WorkflowRouter(), url=url, serve=False) as app:
            await fill(app.get(Database), 3)

    async def left() -> int:
        async with workflows(WorkflowRouter(), url=url, serve=False) as app:
            return len(await app.get(Database).read(sa.select(runs.c.id)))

    asyncio.run(filled())
    for place in ("/dev/full", "/dev/zero", "/dev/null", str(pipe)):
        archiving = ["workflow", "archive", "--older-than", "1d", "--delete", "--url", url, "--to", place]
        for arguments in (archiving, ["workflow", "show", "r1", "--archive", place]):
            assert main(arguments) == 2
            assert f"{place} is no regular file" in capsys.readouterr().err
    for place in (str(tmp_path), str(tmp_path / "nowhere" / "runs.jsonl")):
        assert main(["workflow", "archive", "--older-than", "1d", "--delete", "--url", url, "--to", place]) == 2
        assert place in capsys.readouterr().err
    assert asyncio.run(left()) == 3


async def test_a_full_disk_deletes_nothing_that_has_no_line(postgres: str, tmp_path: Path) -> None:
    """The error names the file, whose lines are whole; with space again the archive goes on where it was."""
    path, number = tmp_path / "runs.jsonl", 350
    async with workflows(WorkflowRouter(), url=postgres, serve=False) as app:
        database = app.get(Database)
        await fill(database, number)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (130_000, before[1]))  # in the middle of the third hundred
        try:
            with pytest.raises(OSError, match=re.escape(str(path))):
                await archive(database, path, older_than_seconds=60, deleting=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        written = [line["run"]["id"] for line in lines(path)]
        left = [each.id for each in await database.read(sa.select(runs.c.id))]
        assert 0 < len(written) < number
        assert sorted(written + left) == sorted(f"r{n}" for n in range(number))
        assert await archive(database, path, older_than_seconds=60, deleting=True) == Archived(len(left), len(left))
        assert Counter(line["run"]["id"] for line in lines(path)) == Counter(f"r{n}" for n in range(number))


async def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It says how many; `show --archive` reads a run back; a wrong age is wrong use."""
    url, path = f"sqlite+aiosqlite:///{tmp_path / 'test.db'}", tmp_path / "runs.jsonl"
    flows, *_ = service()

    async def command(*arguments: str) -> int:
        return await asyncio.to_thread(main, ["workflow", *arguments])

    async with workflows(flows, url=url, serve=False) as app:
        await fill(app.get(Database), 3)
        archiving = ["archive", "--to", str(path), "--url", url, "--older-than"]
        assert await command(*archiving, "30") == 2
        assert await command(*archiving, "30d") == 0
        assert f"3 runs were written to {path}, 0 were deleted" in capsys.readouterr().out.replace("\n", "")
        assert await command(*archiving, "30d", "--delete", "--json") == 0
        assert json.loads(capsys.readouterr().out) == {"written": 0, "deleted": 3, "file": str(path)}
        assert await command("show", "r1", "--archive", str(path)) == 0
        shown = capsys.readouterr().out
        assert "status    completed" in shown
        assert "step:2" in shown
        assert await command("show", "gone", "--archive", str(path)) == 2
