"""Values: what runs and their steps publish while they go on, and who can read it."""

import asyncio
import json
import sqlite3
import threading
from contextlib import asynccontextmanager, closing

import pytest
import sqlalchemy as sa
from pydantic import BaseModel, SecretStr
from sqlalchemy.ext.asyncio import create_async_engine

from mainstay.cli import main
from mainstay.core import ConfigurationError
from mainstay.core.testing import eventually
from mainstay.database import Database
from mainstay.workflow import NotInRun, RunNotFound, RunStatus, Step, StepFailed, Value, WorkflowEngine, WorkflowRouter
from mainstay.workflow._recording import Recording
from mainstay.workflow.tables import runs
from mainstay.workflow.testing import explore, workflows

WAIT = 30.0


class Progress(BaseModel):
    done: int
    of: int


class Gate:
    """Holds a step until the test has seen what it wants to see; for steps on the loop and in threads."""

    def __init__(self) -> None:
        self._open = threading.Event()

    def open(self) -> None:
        self._open.set()

    def pass_in_thread(self) -> None:
        assert self._open.wait(WAIT)

    async def passed(self) -> None:
        await eventually(self._open.is_set, seconds=WAIT)


def flows_of(gate: Gate) -> tuple[WorkflowRouter, Value[Progress], dict[str, Step[[int], int]]]:
    """A router whose steps publish and wait at the gate."""
    flows = WorkflowRouter()
    progress = flows.value("progress", Progress)

    @flows.step(harmless=True)
    async def on_loop(of: int) -> int:
        for done in range(1, of + 1):
            await progress.set(Progress(done=done, of=of))
        await gate.passed()
        return of

    @flows.step(harmless=True)
    def in_thread(of: int) -> int:
        for done in range(1, of + 1):
            progress.report(Progress(done=done, of=of))
        gate.pass_in_thread()
        return of

    @flows.step(transactional=True, harmless=True)
    async def in_transaction(of: int) -> int:
        for done in range(1, of + 1):
            progress.report(Progress(done=done, of=of))
        return of

    return flows, progress, {"on_loop": on_loop, "in_thread": in_thread, "in_transaction": in_transaction}


async def test_a_function_sets_values_that_others_read(url):
    """Each is there when `set` returns, by its name, with the time and the place that set it; it outlives the run."""
    flows = WorkflowRouter()
    stage, share = flows.value("order/stage", str), flows.value("share", float)
    go_on = flows.signal("go-on", str)

    @flows.workflow(name="sell")
    async def sell() -> str:
        await stage.set("packing")
        await share.set(0.5)
        word = await go_on.wait()
        await flows.gather(stage.set("sent"), share.set(1.0))
        return word

    async with workflows(flows, url=url) as app:
        run = await sell.start(id="r")
        await eventually(lambda: share.of("r"), what="the second value")
        first = await stage.of("r")
        assert first is not None
        assert (first.value, first.set_by) == ("packing", "@value order_stage:1")
        assert abs((first.at - (await app.get(WorkflowEngine).run("r")).created_at).total_seconds()) < WAIT
        await go_on.send("r", "now")
        assert await run.result(WAIT) == "now"
        last = await run.value(stage)
        assert last is not None
        assert (last.value, last.set_by) == ("sent", "0.0/@value order_stage:1")
        assert last.at >= first.at
        assert [(view.name, view.body) for view in await app.get(WorkflowEngine).values("r")] == [
            ("order/stage", '"sent"'),
            ("share", "1.0"),
        ]
        other = await sell.start(id="other")
        await other.cancel()
        with pytest.raises(RunNotFound, match="there is no run 'absent'"):
            await stage.of("absent")


async def test_a_run_that_has_set_nothing_has_no_value(url):
    """`of` answers None."""
    flows, progress, _ = flows_of(Gate())

    @flows.workflow(name="idle")
    async def idle() -> None: ...

    async with workflows(flows, url=url):
        run = await idle.start(id="r")
        await run.result(WAIT)
        assert await run.value(progress) is None


@pytest.mark.parametrize("name", ["on_loop", "in_thread"])
async def test_a_step_publishes_while_it_is_executed(url, name):
    """The newest value is read while the step goes on; those before it may be left out."""
    gate = Gate()
    flows, progress, steps = flows_of(gate)

    @flows.workflow(name="import")
    async def run_import(of: int) -> int:
        return await steps[name](of)

    async with workflows(flows, url=url):
        run = await run_import.start(20, id="r")

        async def complete() -> bool:
            found = await progress.of("r")
            return found is not None and found.value == Progress(done=20, of=20) and found.set_by == f"{name}:1"

        await eventually(complete, seconds=WAIT)
        assert await run.status() is RunStatus.RUNNING
        gate.open()
        assert await run.result(WAIT) == 20


@pytest.mark.parametrize("name", ["on_loop", "in_thread", "in_transaction"])
async def test_the_last_value_is_there_when_the_run_has_ended(url, name, monkeypatch):
    """What is left shares the commit of the run's end, and thousands of values are a few writes."""
    written: list[int] = []
    publish = Recording._publish

    async def counted(self, rows):
        written.append(len(rows))
        return await publish(self, rows)

    monkeypatch.setattr(Recording, "_publish", counted)
    gate = Gate()
    gate.open()
    flows, progress, steps = flows_of(gate)

    @flows.workflow(name="import")
    async def run_import(of: int) -> int:
        return await steps[name](of)

    async with workflows(flows, url=url):
        run = await run_import.start(2_000, id="r")
        assert await run.result(WAIT) == 2_000
        found = await progress.of("r")
        assert found is not None
        assert (found.value.done, found.set_by) == (2_000, f"{name}:1")
    assert len(written) < 200


@asynccontextmanager
async def values_held(url: str):
    """Nobody can write a value meanwhile."""
    if url.startswith("sqlite"):
        with closing(sqlite3.connect(url.partition("///")[2])) as writer:
            writer.execute("BEGIN IMMEDIATE")
            yield
    else:
        engine = create_async_engine(url)
        async with engine.begin() as connection:
            await connection.execute(sa.text("LOCK TABLE mainstay_workflow_values IN ACCESS EXCLUSIVE MODE"))
            yield
        await engine.dispose()


@pytest.mark.parametrize("name", ["on_loop", "in_thread"])
async def test_a_value_that_cannot_be_written_fails_no_step(shared, name):
    """The step goes on while the database takes no value, and the value is there afterwards."""
    began, gate = threading.Event(), Gate()
    flows, progress, steps = flows_of(gate)
    returned: list[int] = []

    @flows.step(harmless=True)
    async def ready() -> None:
        began.set()
        await gate.passed()

    @flows.step(harmless=True)
    async def told() -> None:
        returned.append(1)

    @flows.workflow(name="import")
    async def run_import(of: int) -> int:
        await ready()
        return await steps[name](of)

    said: list[int] = []
    report = progress.report

    def noted(value):
        report(value)
        said.append(value.done)

    progress.report = noted  # type: ignore[method-assign]  # counts, and does the same
    async with workflows(flows, url=shared, lease_seconds=60):
        run = await run_import.start(50, id="r")
        await eventually(began.is_set, seconds=WAIT)
        async with values_held(shared):
            gate.open()
            if not shared.startswith("sqlite"):  # where the intent of the step needs the one writer, too
                await eventually(lambda: len(said) == 50, seconds=WAIT)
        assert await run.result(WAIT) == 50
        found = await progress.of("r")
        assert found is not None
        assert found.value.done == 50
        records = (await app_history(run)).records
        assert records[f"{name}:1"].began == 1


async def app_history(run):
    """The history of a run, by its handle."""
    return await run._engine.history(run.id)


async def test_a_worker_that_lost_the_run_publishes_nothing(url):
    """The value is fenced like everything that a run writes: by its epoch, its worker and its state."""
    gate = Gate()
    flows, progress, _ = flows_of(gate)
    inside = threading.Event()

    @flows.step(harmless=True)
    async def late() -> None:
        inside.set()
        await gate.passed()
        await progress.set(Progress(done=99, of=99))

    @flows.workflow(name="import")
    async def run_import() -> None:
        await progress.set(Progress(done=1, of=99))
        await late()

    async with workflows(flows, url=url, lease_seconds=60) as app:
        await run_import.start(id="r")
        await eventually(inside.is_set, seconds=WAIT)
        async with app.get(Database).transaction() as session:
            await session.execute(sa.update(runs).values(epoch=runs.c.epoch + 1))
        gate.open()
        engine = app.get(WorkflowEngine)
        await eventually(lambda: not engine.worker.executes("r"), seconds=WAIT)
        found = await progress.of("r")
        assert found is not None
        assert found.value.done == 1


async def test_what_a_thread_says_after_its_attempt_is_dropped(url):
    """A thread that outlives its time limit does not overwrite what came after it."""
    gate, said = Gate(), threading.Event()
    flows = WorkflowRouter()
    stage = flows.value("stage", str)

    @flows.step(harmless=True, timeout_seconds=0.05)
    def slow() -> None:
        gate.pass_in_thread()
        stage.report("a ghost")
        said.set()

    @flows.workflow(name="hurry")
    async def hurry() -> None:
        try:
            await slow()
        except StepFailed:  # the limit
            await stage.set("given up")
            gate.open()
            await flows.sleep(0.2)

    async with workflows(flows, url=url):
        run = await hurry.start(id="r")
        await run.result(WAIT)
        await eventually(said.is_set, seconds=WAIT)
        found = await stage.of("r")
        assert found is not None
        assert found.value == "given up"


async def test_values_are_set_once_whenever_the_worker_dies():
    """After a death at any moment the run ends with the same values, and its record has each place once."""
    flows = WorkflowRouter()
    stage, share = flows.value("stage", str), flows.value("share", int)

    @flows.step(harmless=True)
    async def work() -> int:
        await share.set(1)
        share.report(2)
        return 2

    @flows.workflow(name="publish")
    async def publish() -> int:
        await stage.set("begun")
        done = await work()
        await stage.set("ended")
        return done

    async def start(_app):
        return await publish.start(id="r")

    async def check(run, app):
        assert await run.status() is RunStatus.COMPLETED
        found = {view.name: (view.body, view.set_by) for view in await app.get(WorkflowEngine).values("r")}
        assert found["stage"] == ('"ended"', "@value stage:2")
        # A worker that dies between the step and the commit that its value shares takes the value along.
        assert found.get("share", ("2", "work:1")) in {("2", "work:1"), ("1", "work:1")}

    assert await explore(flows, start=start, check=check) >= 8


async def test_another_value_on_replay_parks_the_run(shared):
    """What a function sets is part of its record, like the argument of a step."""
    flows = WorkflowRouter()
    stage, go_on = flows.value("stage", str), flows.signal("go-on", str)
    said = ["one"]

    @flows.workflow(name="differs")
    async def differs() -> str:
        await stage.set(said[0])
        return await go_on.wait()

    async with workflows(flows, url=shared):
        await differs.start(id="r")
        await eventually(lambda: stage.of("r"), seconds=WAIT)
    said[0] = "two"
    async with workflows(flows, url=shared):
        run = differs.handle("r")
        await eventually(lambda: _is(run, RunStatus.PARKED), seconds=WAIT)
        found = await stage.of("r")
        assert found is not None
        assert found.value == "one"
    said[0] = "one"
    async with workflows(flows, url=shared) as app:
        await app.get(WorkflowEngine).resume("r")
        await go_on.send("r", "now")
        assert await differs.handle("r").result(WAIT) == "now"


async def _is(run, status) -> bool:
    return await run.status() is status


async def test_mistakes_are_said(url):
    """A wrong value, a call outside a run, a name that is taken and a type that cannot be kept name the remedy."""
    flows = WorkflowRouter()
    count = flows.value("count", int)
    errors: list[str] = []

    @flows.step(harmless=True)
    async def wrong() -> None:
        try:
            await count.set("many")  # type: ignore[arg-type]  # what the test is about
        except TypeError as error:
            errors.append(str(error))

    @flows.workflow(name="mistaken")
    async def mistaken() -> None:
        await wrong()
        try:
            count.report(1)
        except NotInRun as error:
            errors.append(str(error))
        await count.set("many")  # type: ignore[arg-type]  # the same

    with pytest.raises(NotInRun, match="value count was reported outside the code of a step"):
        await count.set(1)
    with pytest.raises(ValueError, match="already has a value 'count'"):
        flows.value("count", int)
    with pytest.raises(ValueError, match="the name of a value"):
        flows.value("no good", int)
    async with workflows(flows, url=url) as app:
        run = await mistaken.start(id="r")
        await eventually(lambda: _is(run, RunStatus.PARKED), seconds=WAIT)
        assert "value count cannot be kept" in ((await app.get(WorkflowEngine).run("r")).note or "")
    assert "value count cannot be kept" in errors[0]
    assert "await ….set(…)" in errors[1]
    assert repr(count) == "<value count>"
    secret = WorkflowRouter()
    secret.value("secret", SecretStr)
    with pytest.raises(ConfigurationError, match="value secret cannot be kept"):
        async with workflows(secret):
            pass


async def test_the_command_shows_values(capsys, tmp_path):
    """With the moment and the step that set them; no character of them reaches the terminal as a control."""
    url = f"sqlite+aiosqlite:///{tmp_path / 'runs.db'}"
    gate = Gate()
    flows = WorkflowRouter()
    stage = flows.value("stage", str)

    @flows.step(harmless=True)
    async def work() -> None:
        stage.report("\x1b[31mred\nline")
        await gate.passed()

    @flows.workflow(name="show")
    async def show() -> None:
        await work()

    async with workflows(flows, url=url):
        run = await show.start(id="r")
        await eventually(lambda: stage.of("r"), seconds=WAIT)
        assert await asyncio.to_thread(main, ["workflow", "show", "r", "--url", url]) == 0
        shown = capsys.readouterr().out
        assert "\x1b" not in shown
        assert "red" in shown
        assert "last set a value at 20" in shown
        assert await asyncio.to_thread(main, ["workflow", "show", "r", "--url", url, "--json"]) == 0
        (value,) = json.loads(capsys.readouterr().out)["values"]
        assert (value["value"], value["by"]) == ("stage", "work:1")
        gate.open()
        await run.result(WAIT)
