"""A run that has ended is forked: what it did before a step counts in a new run, and stays its own."""

import asyncio
import json
from itertools import count
from pathlib import Path
from shutil import copyfile
from typing import Any

import pytest

from mainstay.cli import main
from mainstay.core import Retry, bind, current, derived_id, once
from mainstay.core.testing import eventually
from mainstay.workflow import (
    Done,
    PayloadCodec,
    RunConflict,
    RunNotFound,
    RunParked,
    RunStateError,
    RunStatus,
    Unknown,
    WorkflowEngine,
    WorkflowFailed,
    WorkflowRouter,
    current_step,
)
from mainstay.workflow.testing import explore, workflows

WAIT = 60.0


class Shop:
    """A run of every primitive, and two steps at its end; `world` decides what the last one does.

    Attributes:
        lines: what was executed, with the key; `-` is a compensation, with the key that it undoes.
    """

    def __init__(self) -> None:
        self.lines = list[str]()
        self.world: dict[str, Any] = {"send": "works"}
        self.flows = flows = WorkflowRouter()
        self.paid = flows.signal("paid", int)
        self.progress = flows.value("progress", int)
        self.stage = flows.value("stage", str)

        def write(line: str = "") -> None:
            info = current_step()
            self.lines.append(f"{line}{info.undoes or info.key}")

        @flows.step()
        async def reserve(n: int) -> int:
            write()
            return n

        @reserve.compensation
        async def release(outcome: Done[int] | Unknown, n: int) -> None:
            write("-")

        @flows.step(transactional=True)
        async def book(n: int) -> int:
            write()
            return n

        @book.compensation
        async def unbook(outcome: Done[int] | Unknown, n: int) -> None:
            write("-")

        @flows.workflow(name="pack")
        async def pack(n: int) -> int:
            return await reserve(n)

        @flows.step(retry=Retry(attempts=1))
        async def charge(n: int, event: str) -> int:
            write()
            return n

        @charge.compensation
        async def refund(outcome: Done[int] | Unknown, n: int, event: str) -> None:
            write("-")

        @flows.step(retry=Retry(attempts=1), harmless=True, failed_on=(LookupError,))
        async def send(n: int) -> str:
            if self.world["send"] == "fails":
                raise LookupError(n)
            write()
            return f"{current().actor}"

        async def effect(key: str | None) -> None:
            self.lines.append(str(key))

        @flows.workflow(name="shop", timeout_seconds=3600)
        async def shop(n: int) -> str:
            await reserve(n)
            await self.progress.set(1)
            first, second = await flows.gather(book(n), pack(n))
            event = await once("told", effect, transactional=False)
            got = await self.paid.wait()
            await flows.sleep(0)
            await charge(first + second + got, str(event))
            await self.progress.set(2)
            return await send(n)

        self.shop = shop


EARLY = [
    "reserve:1", "@value progress:1", "@gather:1", "0.0/book:1", "0.0/@end:0", "0.1/@child pack:1", "0.1/@end:0",
    "@told:1", "@signal paid:1",
]  # fmt: skip
INHERITED = [*EARLY, "@sleep:1"]


async def ended(shop: Shop, id: str = "o") -> Any:
    """The original, with its message."""
    with bind(actor="ann"):
        run = await shop.shop.start(1, id=id)
    await shop.paid.send(id, 5, id="m")
    try:
        await run.result(WAIT)
    except WorkflowFailed:
        assert shop.world["send"] == "fails"
    return run


async def test_what_was_done_before_counts(url: str) -> None:
    """Only the step and what follows is executed, under the new run's keys, in the context of the original."""
    shop = Shop()
    async with workflows(shop.flows, url=url) as app:
        engine = app.get(WorkflowEngine)
        await ended(shop)
        before = list(shop.lines)
        assert await engine.fork("o", before="charge:1", new_id="n") == "n"
        run = shop.shop.handle("n")
        assert await run.result(WAIT) == "ann"
        assert shop.lines == [*before, "n:charge:1", "n:send:1"]
        records = (await engine.history("n")).records
        assert sorted(record.key for record in records.values() if record.inherited) == sorted(INHERITED)
        assert records["@told:1"].inherited == "o:@told:1"
        assert json.loads(records["charge:1"].input or "")["event"] == "o:@told:1"
        view, original = await engine.run("n"), await engine.run("o")
        assert (view.input, view.context) == (original.input, original.context)
        assert not any(record.maybe_twice for record in records.values())


async def test_it_undoes_only_its_own(url: str) -> None:
    """What is inherited belongs to the original, whose child and transactional step are among it."""
    shop = Shop()
    async with workflows(shop.flows, url=url) as app:
        engine = app.get(WorkflowEngine)
        await ended(shop)
        before = list(shop.lines)
        shop.world["send"] = "fails"
        await engine.fork("o", before="charge:1", new_id="n")
        with pytest.raises(WorkflowFailed):
            await shop.shop.handle("n").result(WAIT)
        assert shop.lines == [*before, "n:charge:1", "-n:charge:1"]
        assert (await engine.run("n")).status is RunStatus.FAILED


async def test_a_fork_in_a_branch_and_before_a_wait(url: str) -> None:
    """What began later in another branch is executed anew, with a child and a message of its own."""
    shop = Shop()
    async with workflows(shop.flows, url=url) as app:
        engine = app.get(WorkflowEngine)
        await ended(shop)
        for step, new_id in (
            ("reserve:1", "a"),
            ("0.0/book:1", "b"),
            ("0.1/@child pack:1", "c"),
            ("@signal paid:1", "d"),
        ):
            await engine.fork("o", before=step, new_id=new_id)
            run = shop.shop.handle(new_id)
            await shop.paid.send(new_id, 7)
            assert await run.result(WAIT) == "ann"
            charged = json.loads((await engine.history(new_id)).records["charge:1"].input or "")
            assert charged["n"] == 9
        assert "a:reserve:1" in shop.lines
        assert "b:0.0/book:1" in shop.lines
        assert "b:reserve:1" not in shop.lines
        records = (await engine.history("d")).records
        assert sorted(record.key for record in records.values() if record.inherited) == sorted(EARLY[:-1])


async def test_an_ask_is_inherited_with_its_decision_or_not_at_all(url: str) -> None:
    """Between its escalation and its decision there is no fork: the new run would have nobody to ask."""
    flows = WorkflowRouter()

    @flows.step(harmless=True)
    async def tell(n: int) -> None:
        return None

    @flows.step(harmless=True)
    async def after(n: int) -> int:
        return n

    refund = flows.approval("refund", int, may_decide=lambda _asked, _actor: True, on_escalation=tell)

    @flows.workflow(name="pay")
    async def pay(n: int) -> bool:
        decision = await refund.ask(n, escalate_after_seconds=0)
        await after(n)
        return decision.approved

    async def decided(run_id: str) -> None:
        async def escalated() -> bool:
            return any(view.run_id == run_id and view.escalated for view in await engine.approvals.waiting())

        await eventually(escalated, seconds=WAIT)
        with bind(actor="eva"):
            await refund.decide(run_id, approved=True)

    async with workflows(flows, url=url) as app:
        engine = app.get(WorkflowEngine)
        run = await pay.start(1, id="o")
        await decided("o")
        assert await run.result(WAIT)
        for step in ("tell:1", "@escalated refund:1"):
            with pytest.raises(RunStateError, match="fork before @approval refund:1"):
                await engine.fork("o", before=step, new_id="no")
        await engine.fork("o", before="after:1", new_id="later")
        assert await pay.handle("later").result(WAIT)
        await engine.fork("o", before="@approval refund:1", new_id="again")
        await decided("again")
        assert await pay.handle("again").result(WAIT)


async def test_values_that_stand_are_inherited(url: str) -> None:
    """The newest of the inherited part; one that the original has replaced later is not known any more."""
    shop = Shop()
    flows, stage = shop.flows, shop.stage

    @flows.step(harmless=True)
    async def nothing(n: int) -> int:
        return n

    @flows.workflow(name="stages")
    async def stages(n: int) -> int:
        await stage.set("first")
        await nothing(n)
        return await nothing(n + 1)

    async with workflows(flows, url=url) as app:
        engine = app.get(WorkflowEngine)
        await (await stages.start(1, id="o")).result(WAIT)
        await engine.fork("o", before="nothing:2", new_id="n")
        (value,) = await engine.values("n")
        assert (value.name, value.body, value.set_by) == ("stage", '"first"', "@value stage:1")
        await ended(shop, "p")
        await engine.fork("p", before="charge:1", new_id="q")
        assert await shop.shop.handle("q").result(WAIT) == "ann"
        assert [value.body for value in await engine.values("q")] == ["2"]


async def test_the_same_fork_again_is_the_same_run(url: str) -> None:
    """Another one under its id is a conflict, and so is the id of any other run."""
    shop = Shop()
    async with workflows(shop.flows, url=url) as app:
        engine = app.get(WorkflowEngine)
        await ended(shop)
        await asyncio.gather(*(engine.fork("o", before="charge:1", new_id="n") for _ in range(3)))
        assert await shop.shop.handle("n").result(WAIT) == "ann"
        await engine.fork("o", before="charge:1", new_id="n")
        assert shop.lines.count("n:charge:1") == 1
        with pytest.raises(RunConflict, match="run 'n' exists, and is not this fork"):
            await engine.fork("o", before="send:1", new_id="n")
        with pytest.raises(RunConflict, match="run 'o' exists"):
            await engine.fork("o", before="send:1", new_id="o")
        assert (await engine.history("o")).forks == {"n": "charge:1"}


async def test_a_fork_of_a_fork(url: str) -> None:
    """What both inherit keeps the name that others know it by; a retry leaves it alone."""
    shop = Shop()
    async with workflows(shop.flows, url=url) as app:
        engine = app.get(WorkflowEngine)
        await ended(shop)
        await engine.fork("o", before="charge:1", new_id="n")
        await shop.shop.handle("n").result(WAIT)
        await engine.fork("n", before="send:1", new_id="m")
        assert await shop.shop.handle("m").result(WAIT) == "ann"
        records = (await engine.history("m")).records
        names = {record.key: record.inherited for record in records.values()}
        assert (names["reserve:1"], names["charge:1"], names["send:1"]) == ("o:reserve:1", "n:charge:1", "")
        assert shop.lines[-1] == "m:send:1"


async def test_an_original_is_not_undone_under_its_forks(url: str) -> None:
    """Its steps are in use; once its forks are undone, so can it be."""
    shop = Shop()
    async with workflows(shop.flows, url=url) as app:
        engine, run = app.get(WorkflowEngine), await ended(shop)
        await engine.fork("o", before="charge:1", new_id="n")
        await shop.shop.handle("n").result(WAIT)
        with pytest.raises(RunStateError, match="n was forked from it and uses its steps: compensate that first"):
            await engine.compensate("o")
        await engine.compensate("n")
        with pytest.raises(WorkflowFailed):
            await shop.shop.handle("n").result(WAIT)
        await engine.compensate("o")
        with pytest.raises(WorkflowFailed):
            await run.result(WAIT)
        assert [line for line in shop.lines if line[0] == "-"][:2] == ["-n:charge:1", "-o:charge:1"]
        with pytest.raises(RunStateError, match="reserve:1, which it would inherit, is undone"):
            await engine.fork("o", before="charge:1", new_id="x")


def pivots() -> tuple[WorkflowRouter, list[str], dict[str, str], Any]:
    """A run whose pivot may be in doubt, and which parks at its end."""
    flows, lines, world = WorkflowRouter(), list[str](), {"pay": "works", "tell": "fails"}

    @flows.step(harmless=True)
    async def look(n: int) -> int:
        return n

    @flows.step(pivot=True, on_unknown="park")
    async def pay(n: int) -> int:
        lines.append(current_step().key)
        if world["pay"] == "unknown":
            raise OSError(n)
        return n

    @flows.step(retry=Retry(attempts=1), exhausted="park", after_pivot=True)
    async def tell(n: int) -> str:
        if world["tell"] == "fails":
            raise OSError(n)
        return current_step().key

    @flows.workflow(name="sell")
    async def sell(n: int) -> str:
        async def other() -> int:
            return await look(n + 1)

        await look(n)
        await flows.gather(pay(n), other())
        return await tell(n)

    return flows, lines, world, sell


async def test_what_cannot_be_forked_is_refused(url: str) -> None:
    """Each refusal names its reason and the remedy, and leaves nothing behind."""
    flows, lines, world, sell = pivots()
    async with workflows(flows, url=url) as app:
        engine = app.get(WorkflowEngine)
        with pytest.raises(RunNotFound):
            await engine.fork("o", before="look:1", new_id="n")
        with pytest.raises(ValueError, match="the id of a run"):
            await engine.fork("o", before="look:1", new_id="not an id")
        with pytest.raises(RunParked):
            await (await sell.start(1, id="o")).result(WAIT)
        with pytest.raises(
            RunStateError, match="it is parked, and may undo its steps yet: let it end, or terminate it"
        ):
            await engine.fork("o", before="tell:1", new_id="n")
        await engine.terminate("o", reason="its code was wrong")
        for step in ("tell:2", "nothing", ""):
            with pytest.raises(RunStateError, match="it has no such step"):
                await engine.fork("o", before=step, new_id="n")
        # A pivot that is done counts, so the new run is past it.
        world["tell"] = "works"
        await engine.fork("o", before="tell:1", new_id="n")
        assert await sell.handle("n").result(WAIT) == "n:tell:1"
        with pytest.raises(RunStateError, match="it is past its pivot"):
            await engine.compensate("n")
        assert lines == ["o:0.0/pay:1"]
        world["pay"] = "unknown"
        with pytest.raises(RunParked):
            await (await sell.start(1, id="u")).result(WAIT)
        await engine.terminate("u", reason="its provider is gone")
        with pytest.raises(
            RunStateError, match=r"its pivot 0\.0/pay:1 may have taken effect, and is never attempted twice"
        ):
            await engine.fork("u", before="0.1/look:1", new_id="x")
        with pytest.raises(RunNotFound):
            await engine.run("x")


async def test_a_child_is_not_forked(url: str) -> None:
    """It is undone with its parent."""
    shop = Shop()
    async with workflows(shop.flows, url=url) as app:
        engine = app.get(WorkflowEngine)
        await ended(shop)
        (child,) = [view.id for view in await engine.runs() if view.workflow == "pack"]
        with pytest.raises(RunStateError, match="it is a child, and undone with its parent: fork o"):
            await engine.fork(child, before="reserve:1", new_id="n")


async def test_a_crash_at_every_moment(tmp_path: Path) -> None:
    """The forked run executes what it did not inherit, and undoes that and nothing else."""
    shop, files = Shop(), count()
    async with workflows(shop.flows, url=f"sqlite+aiosqlite:///{tmp_path / 'original.db'}"):
        await ended(shop)
    shop.world["send"] = "fails"

    def url() -> str:
        copied = tmp_path / f"{next(files)}.db"
        copyfile(tmp_path / "original.db", copied)
        return f"sqlite+aiosqlite:///{copied}"

    async def start(app: Any) -> Any:
        shop.lines.clear()
        await app.get(WorkflowEngine).fork("o", before="charge:1", new_id="n")
        return shop.shop.handle("n")

    async def check(run: Any, app: Any) -> None:
        engine = app.get(WorkflowEngine)
        assert await run.status() is RunStatus.FAILED
        assert await engine.status("o") is RunStatus.COMPLETED
        records = (await engine.history("n")).records
        assert sorted(record.key for record in records.values() if record.inherited) == sorted(INHERITED)
        assert set(shop.lines) == {"n:charge:1", "-n:charge:1"}
        assert [key for key in records if key.endswith(":compensation")] == ["charge:1:compensation"]

    assert await explore(shop.flows, start=start, check=check, url=url) > 5


async def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """It makes the run, and `show` names what is inherited; what is refused is an error with exit code 2."""
    url = f"sqlite+aiosqlite:///{tmp_path / 'runs.db'}"
    shop = Shop()

    def workflow(*options: str) -> int:
        return main(["workflow", *options, "--url", url])

    async with workflows(shop.flows, url=url):
        await ended(shop)
        assert await asyncio.to_thread(workflow, "fork", "o", "--before", "nothing", "--id", "n") == 2
        assert "run 'o' cannot be forked before nothing: it has no such step" in capsys.readouterr().err
        assert await asyncio.to_thread(workflow, "fork", "o", "--before", "charge:1", "--id", "n", "--json") == 0
        assert json.loads(capsys.readouterr().out)["run"] == "n"
        assert await shop.shop.handle("n").result(WAIT) == "ann"
        assert await asyncio.to_thread(workflow, "show", "n", "--json") == 0
        shown = capsys.readouterr().out
        assert "inherited: o:reserve:1" in shown
        assert f"run {derived_id('o:0.1/@child pack:1')}" in shown


class Bound(PayloadCodec):
    """Reads a payload only as the run's that it was stored for."""

    name = "bound"

    def encode(self, payload: bytes, run_id: str) -> bytes:
        return run_id.encode() + b"|" + payload[::-1]

    def decode(self, stored: bytes, run_id: str) -> bytes:
        owner, _, payload = stored.partition(b"|")
        assert owner == run_id.encode()
        return payload[::-1]


async def test_payloads_and_generations(url: str) -> None:
    """Payloads are sealed for the new run; its input and records are those of the original's last generation."""
    flows, keys = WorkflowRouter(), list[str]()
    stage = flows.value("stage", int)

    @flows.step(harmless=True)
    async def step(n: int) -> str:
        keys.append(current_step().key)
        return f"{n}"

    @flows.workflow(name="again")
    async def again(n: int) -> str:
        await stage.set(n)
        first = await step(n)
        if n == 1:
            await again.continue_with(2)
        return first + await step(n + 1)

    async with workflows(flows, Bound(), url=url) as app:
        engine = app.get(WorkflowEngine)
        assert await (await again.start(1, id="o")).result(WAIT) == "23"
        await engine.fork("o", before="step:2", new_id="n")
        assert await again.handle("n").result(WAIT) == "23"
        assert keys == ["o:step:1", "o:step:1@2", "o:step:2@2", "n:step:2"]
        records = (await engine.history("n")).records
        assert records["step:1"].inherited == "o:step:1@2"
        assert (await engine.run("n")).input == '{"n":2}'
        assert [value.body for value in await engine.values("n")] == ["2"]
