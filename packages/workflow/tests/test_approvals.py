"""Approvals: a run waits for a person's decision, which exactly one person takes, and it or the deadline counts."""

import asyncio
import json
import sys
from datetime import timedelta
from typing import Any

import pytest
from pydantic import BaseModel, SecretStr

from mainstay.cli import main
from mainstay.core import App, ConfigurationError, bind, given
from mainstay.core.testing import VirtualClock, eventually
from mainstay.database import Database
from mainstay.workflow import (
    ApprovalConflict,
    ApprovalNotFound,
    Asked,
    Decision,
    DecisionAttempt,
    DecisionDenied,
    NotInRun,
    RunNotFound,
    RunStatus,
    StepFailed,
    WorkflowEngine,
    WorkflowFailed,
    WorkflowRouter,
    current_step,
)
from mainstay.workflow.testing import explore, workflows

WAIT = 30.0
HOUR = 3_600.0


class Refund(BaseModel):
    order: str
    amount: int


class Office:
    """A router with an approval, and what its hooks saw."""

    def __init__(self, **limits: float) -> None:
        self.flows = WorkflowRouter()
        self.attempts: list[DecisionAttempt[Refund]] = []
        self.told: list[str] = []
        self.limits: dict[str, float] = limits

        @self.flows.step(harmless=True)
        async def tell_boss(refund: Refund) -> None:
            self.told.append(current_step().key)

        async def note(attempt: DecisionAttempt[Refund]) -> None:
            self.attempts.append(attempt)

        self.refund = self.flows.approval(
            "large/refund", Refund, may_decide=self.may_decide, on_decision=note, on_escalation=tell_boss
        )

        @self.flows.workflow(name="pay-back")
        async def pay_back(amount: int) -> str:
            decision = await self.refund.ask(Refund(order="o-1", amount=amount), **self.limits)
            return f"{decision.approved} {decision.by} {decision.reason} {decision.escalated}"

        self.pay_back = pay_back

    @staticmethod
    def may_decide(asked: Asked[Refund], actor: str) -> bool:
        """Ann may always, the boss once it is escalated."""
        return actor == "ann" or (actor == "boss" and asked.escalated)


async def asked(app: App, number: int = 1) -> list[Asked[str]]:
    """The open asks, once there are so many."""

    async def enough() -> bool:
        return len(await app.get(WorkflowEngine).approvals.waiting()) >= number

    await eventually(enough, seconds=WAIT)
    return await app.get(WorkflowEngine).approvals.waiting()


async def escalated(app: App) -> None:
    """Return once an open ask is escalated."""

    async def is_so() -> bool:
        return any(each.escalated for each in await app.get(WorkflowEngine).approvals.waiting())

    await eventually(is_so, seconds=WAIT)


async def test_a_person_decides(url):
    """The run waits, the list shows the ask, and the decision comes back with who, why and when."""
    office = Office(timeout_seconds=HOUR)
    seen: list[Decision] = []

    @office.flows.workflow(name="look")
    async def look() -> None:
        seen.append(await office.refund.ask(Refund(order="o-2", amount=1)))

    async with workflows(office.flows, url=url) as app:
        run = await office.pay_back.start(700, id="r")
        (ask,) = await asked(app)
        assert (ask.run_id, ask.name, ask.place, ask.escalated) == ("r", "large/refund", "large_refund:1", False)
        assert json.loads(ask.question) == {"order": "o-1", "amount": 700}
        assert ask.due_at is not None
        assert ask.due_at - ask.at == pytest.approx(timedelta(hours=1), abs=timedelta(seconds=0.01))
        with bind(actor="ann"):
            await office.refund.decide("r", approved=True, reason="a good customer")
        assert await run.result(WAIT) == "True ann a good customer False"
        assert await app.get(WorkflowEngine).approvals.waiting() == []
        (attempt,) = office.attempts
        assert (attempt.allowed, attempt.by, attempt.asked.question.amount) == (True, "ann", 700)
        other = await look.start(id="other")
        (without,) = await asked(app)
        assert without.due_at is None
        with bind(actor="ann"):
            await app.get(WorkflowEngine).approvals.decide("other", "large/refund", approved=False)
        await other.result(WAIT)
        assert (seen[-1].approved, seen[-1].reason) == (False, "")
        assert seen[-1].at >= without.at


async def test_who_may_not_decide_changes_nothing(url):
    """Without an actor, or by one who may not: refused, told to the hook, and nothing is stored."""
    office = Office()
    async with workflows(office.flows, url=url) as app:
        run = await office.pay_back.start(700, id="r")
        await asked(app)
        with pytest.raises(DecisionDenied, match="bind\\(actor=…\\)"):
            await office.refund.decide("r", approved=True)
        with bind(actor="eve"), pytest.raises(DecisionDenied, match="eve may not decide large_refund:1 of run 'r'"):
            await office.refund.decide("r", approved=True)
        assert DecisionDenied.code == "AUTH_DECISION_DENIED"
        assert [(attempt.by, attempt.allowed) for attempt in office.attempts] == [("eve", False)]
        assert len(await app.get(WorkflowEngine).approvals.waiting()) == 1
        with bind(actor="ann"):
            await office.refund.decide("r", approved=False, reason="no")
        assert await run.result(WAIT) == "False ann no False"


async def test_the_first_decision_stands(url):
    """The same one by the same person is the same; any other one is a conflict that names the first."""
    office = Office()
    async with workflows(office.flows, url=url) as app:
        run = await office.pay_back.start(700, id="r")
        await asked(app)
        with bind(actor="ann"):
            for _ in range(2):
                await office.refund.decide("r", approved=True)
            with pytest.raises(ApprovalConflict, match="large_refund:1 of run 'r' was approved by ann at"):
                await office.refund.decide("r", approved=False)
        assert await run.result(WAIT) == "True ann  False"
        with bind(actor="ann"):
            await office.refund.decide("r", approved=True)
            with pytest.raises(RunNotFound):
                await office.refund.decide("absent", approved=True)
        assert len(office.attempts) == 1


async def test_only_one_of_many_decides(url):
    """Of decisions at the same time one is accepted, and the run goes by it."""
    office = Office()
    office.refund.may_decide = lambda _asked, _actor: True

    async def decide(n: int) -> int | None:
        with bind(actor=f"p{n}"):
            try:
                await office.refund.decide("r", approved=n % 2 == 0)
            except ApprovalConflict:
                return None
        return n

    async with workflows(office.flows, url=url) as app:
        run = await office.pay_back.start(1, id="r")
        await asked(app)
        (winner,) = [n for n in await asyncio.gather(*map(decide, range(8))) if n is not None]
        assert await run.result(WAIT) == f"{winner % 2 == 0} p{winner}  False"


async def test_what_is_not_asked_cannot_be_decided(url):
    """A run that does not ask, has ended, or is cancelled: said, and nothing is kept for later."""
    office = Office()
    go_on = office.flows.signal("go-on", str)

    @office.flows.workflow(name="later")
    async def later() -> str:
        await go_on.wait()
        return str((await office.refund.ask(Refund(order="o", amount=1))).approved)

    async with workflows(office.flows, url=url) as app:
        with bind(actor="ann"):
            run = await later.start(id="r")
            with pytest.raises(ApprovalNotFound, match="run 'r' does not ask for large/refund"):
                await office.refund.decide("r", approved=True)
            await go_on.send("r", "now")
            await asked(app)
            with pytest.raises(ApprovalNotFound, match="does not ask for large_refund:7"):
                await office.refund.decide("r", approved=True, place="large_refund:7")
            with pytest.raises(ApprovalNotFound, match="no router of this App has an approval 'other'"):
                await app.get(WorkflowEngine).approvals.decide("r", "other", approved=True)
            await run.cancel()
            with pytest.raises(ApprovalConflict, match="is not asked any more"):
                await office.refund.decide("r", approved=True)
            with pytest.raises(WorkflowFailed, match="cancelled"):
                await run.result(WAIT)
            with pytest.raises(ApprovalConflict, match="is not asked any more"):
                await office.refund.decide("r", approved=True)
        assert await app.get(WorkflowEngine).approvals.waiting() == []
        assert office.attempts == []


@pytest.mark.parametrize("suspend_after_seconds", [0.01, 10.0])
async def test_a_deadline_ends_an_ask(url, suspend_after_seconds):
    """The function sees a failed step, also where the run has left memory; no decision is accepted afterwards."""
    office = Office()

    @office.flows.workflow(name="limited")
    async def limited(seconds: float) -> str:
        try:
            await office.refund.ask(Refund(order="o", amount=1), timeout_seconds=seconds)
        except StepFailed as error:
            return f"{error.step} {error.error_type} {error.outcome}"
        return "decided"

    async with workflows(office.flows, url=url, suspend_after_seconds=suspend_after_seconds) as app:
        run = await limited.start(0.2, id="r")
        assert await run.result(WAIT) == "approval large_refund DeadlineExceeded failed"
        with bind(actor="ann"), pytest.raises(ApprovalConflict, match="is not asked any more"):
            await office.refund.decide("r", approved=True)
        assert await app.get(WorkflowEngine).approvals.waiting() == []


async def test_a_decision_counts_or_is_refused_at_the_last_moment(url):
    """Whichever comes first, decision or deadline: what was accepted is what the function got."""
    office = Office()
    office.refund.may_decide = lambda _asked, _actor: True

    @office.flows.workflow(name="limited")
    async def limited(seconds: float) -> bool:
        try:
            return (await office.refund.ask(Refund(order="o", amount=1), timeout_seconds=seconds)).approved
        except StepFailed:
            return False

    async def decide(n: int) -> bool:
        while True:
            await asyncio.sleep(n / 400)  # moves across the deadline
            with bind(actor="ann"):
                try:
                    await office.refund.decide(f"r{n}", approved=True)
                except ApprovalNotFound:
                    continue
                except ApprovalConflict:
                    return False
            return True

    async with workflows(office.flows, url=url):
        started = [await limited.start(0.05, id=f"r{n}") for n in range(30)]
        accepted = await asyncio.gather(*map(decide, range(30)))
        assert [await run.result(WAIT) for run in started] == accepted


async def test_escalation(url):
    """After its time the step is executed once, the ask is marked, and who may decide depends on it."""
    office = Office(escalate_after_seconds=0.05, timeout_seconds=HOUR)
    async with workflows(office.flows, url=url, suspend_after_seconds=0.02) as app:
        run = await office.pay_back.start(700, id="r")
        await escalated(app)
        await eventually(lambda: office.told, seconds=WAIT)
        with bind(actor="boss"):
            await office.refund.decide("r", approved=True, reason="well")
        assert await run.result(WAIT) == "True boss well True"
        assert office.told == ["r:tell_boss:1"]


async def test_an_escalation_that_fails_leaves_the_ask_open(url):
    """The step's failure is in the record, and the run goes on waiting."""
    flows = WorkflowRouter()

    @flows.step(harmless=True, failed_on=(LookupError,))
    async def tell(n: int) -> None:
        raise LookupError

    question = flows.approval("question", int, may_decide=lambda _asked, _actor: True, on_escalation=tell)

    @flows.workflow(name="ask")
    async def ask() -> bool:
        return (await question.ask(1, escalate_after_seconds=0.01)).escalated

    async with workflows(flows, url=url) as app:
        run = await ask.start(id="r")

        async def failed() -> bool:
            record = (await app.get(WorkflowEngine).history("r")).records.get("tell:1")
            return record is not None and record.state == "failed"

        await eventually(failed, seconds=WAIT)
        with bind(actor="ann"):
            await question.decide("r", approved=True)
        assert await run.result(WAIT) is True


async def test_days_pass_on_a_virtual_clock():
    """Escalation after a day and deadline after three, by the database's clock and without memory."""
    office, clock = Office(escalate_after_seconds=24 * HOUR, timeout_seconds=72 * HOUR), VirtualClock()
    async with workflows(office.flows, clock=clock) as app:
        run = await office.pay_back.start(700, id="r")
        await clock.advance(23 * HOUR)
        (ask,) = await app.get(WorkflowEngine).approvals.waiting()
        assert (ask.escalated, office.told) == (False, [])
        assert await run.status() is RunStatus.WAITING
        await clock.advance(2 * HOUR)
        (ask,) = await app.get(WorkflowEngine).approvals.waiting()
        assert (ask.escalated, office.told) == (True, ["r:tell_boss:1"])
        await clock.advance(46 * HOUR)
        assert not (await run.status()).terminal
        await clock.advance(2 * HOUR)
        with pytest.raises(WorkflowFailed) as failure:
            await run.result()
        assert (failure.value.step, failure.value.error_code) == ("escalated large_refund", "EXT_DEADLINE")


async def test_asks_of_one_name_are_told_apart_by_place(url):
    """In branches, and one after another; a decision without a place is refused, and so can never hit another one."""
    office = Office()

    @office.flows.workflow(name="several")
    async def several() -> list[str]:
        both = await office.flows.gather(
            office.refund.ask(Refund(order="left", amount=1)), office.refund.ask(Refund(order="right", amount=1))
        )
        last = await office.refund.ask(Refund(order="last", amount=1))
        return [decision.reason for decision in (*both, last)]

    async with workflows(office.flows, url=url) as app:
        run = await several.start(id="r")
        by_order = {json.loads(ask.question)["order"]: ask.place for ask in await asked(app, 2)}
        assert by_order == {"left": "0.0/large_refund:1", "right": "0.1/large_refund:1"}
        with bind(actor="ann"):
            with pytest.raises(ApprovalConflict, match="more than once: say which with place="):
                await office.refund.decide("r", approved=True)
            await office.refund.decide("r", approved=True, reason="two", place=by_order["right"])
            await office.refund.decide("r", approved=True, reason="one", place=by_order["left"])

            async def last() -> bool:
                found = await app.get(WorkflowEngine).approvals.waiting()
                return [ask.place for ask in found] == ["large_refund:1"]

            await eventually(last, seconds=WAIT)
            with pytest.raises(ApprovalConflict, match="more than once"):
                await office.refund.decide("r", approved=True)
            await office.refund.decide("r", approved=True, reason="three", place="large_refund:1")
        assert await run.result(WAIT) == ["one", "two", "three"]


async def test_an_ask_that_the_function_gave_up_is_not_decided(url):
    """A time limit of the function's own ends the ask like a deadline, before and during the escalation."""
    office = Office()
    gate, hanging = asyncio.Event(), asyncio.Event()
    limits: list[asyncio.Timeout] = []

    @office.flows.step(harmless=True)
    async def hangs(n: int) -> None:
        hanging.set()
        await gate.wait()

    slow = office.flows.approval("slow", int, may_decide=lambda _asked, _actor: True, on_escalation=hangs)

    @office.flows.workflow(name="impatient")
    async def impatient(n: int) -> str:
        try:
            async with asyncio.timeout(None) as limit:
                limits.append(limit)
                if n:
                    await slow.ask(n, escalate_after_seconds=0.0)
                else:
                    await office.refund.ask(Refund(order="o", amount=1))
        except TimeoutError as error:
            return type(error).__name__
        return "decided"

    async with workflows(office.flows, url=url) as app:
        for n in (0, 1):
            run = await impatient.start(n, id=f"r{n}")
            if n:
                await asyncio.wait_for(hanging.wait(), WAIT)
            else:
                await eventually(app.get(WorkflowEngine).approvals.waiting, seconds=WAIT)
            limits[-1].reschedule(0.0)  # it passes now
            assert await run.result(WAIT) == "StepCancelled"
            assert await app.get(WorkflowEngine).approvals.waiting() == []
            with bind(actor="ann"), pytest.raises(ApprovalConflict, match="is not asked any more"):
                await (slow if n else office.refund).decide(f"r{n}", approved=True)


async def test_a_decision_joins_the_transaction_around_it(url):
    """Rolled back, it was never made; the hook's own error refuses it, too."""
    office = Office()
    broken = [True]

    async def note(attempt: DecisionAttempt[Refund], *, database: Database = given(Database)) -> None:
        assert database.in_unit_of_work()
        if broken[0]:
            raise LookupError

    office.refund.on_decision = note
    async with workflows(office.flows, url=url) as app:
        run = await office.pay_back.start(1, id="r")
        await asked(app)
        with bind(actor="ann"):
            with pytest.raises(LookupError):
                await office.refund.decide("r", approved=False)
            broken[0] = False
            with pytest.raises(KeyError):
                async with app.get(Database).transaction():
                    await office.refund.decide("r", approved=False)
                    raise KeyError
            assert len(await asked(app)) == 1
            async with app.get(Database).transaction():
                await office.refund.decide("r", approved=True, reason="at last")
        assert await run.result(WAIT) == "True ann at last False"


async def test_workers_stop_and_start_while_a_run_asks(shared):
    """The ask outlives the process; the decision is taken while no worker is there."""
    first = Office(escalate_after_seconds=0.1, timeout_seconds=HOUR)
    async with workflows(first.flows, url=shared) as app:
        await first.pay_back.start(1, id="r")
        await asked(app)
    second = Office(escalate_after_seconds=0.1, timeout_seconds=HOUR)
    async with workflows(second.flows, url=shared) as app:
        await escalated(app)
        await eventually(lambda: len(first.told) + len(second.told) > 0, seconds=WAIT)
    third = Office(escalate_after_seconds=0.1, timeout_seconds=HOUR)
    async with workflows(third.flows, url=shared, serve=False):
        with bind(actor="boss"):
            await third.refund.decide("r", approved=True)
    fourth = Office(escalate_after_seconds=0.1, timeout_seconds=HOUR)
    async with workflows(fourth.flows, url=shared):
        assert await fourth.pay_back.handle("r").result(WAIT) == "True boss  True"
    assert set(first.told + second.told + third.told + fourth.told) == {"r:tell_boss:1"}


@pytest.mark.parametrize("decides", [True, False])
async def test_nothing_is_lost_or_doubled_whenever_the_worker_dies(decides):
    """Escalation and decision, or the deadline: the same end after a death at every moment."""
    office = Office(escalate_after_seconds=0.01, timeout_seconds=HOUR if decides else 0.1)
    deciding: list[asyncio.Task[None]] = []

    async def decide(app: App) -> None:
        await escalated(app)
        with bind(actor="boss"):
            await office.refund.decide("r", approved=True)

    async def start(app: App) -> Any:
        office.told.clear()
        if decides:
            deciding.append(asyncio.create_task(decide(app)))
        return await office.pay_back.start(1, id="r")

    async def check(run: Any, app: App) -> None:
        if decides:
            await deciding.pop()
            assert await run.result() == "True boss  True"
        else:
            assert await run.status() is RunStatus.FAILED
        assert set(office.told) == {"r:tell_boss:1"}
        history = (await app.get(WorkflowEngine).history("r")).records
        assert [key for key in history if key.startswith("@")] == [
            "@approval large_refund:1",
            "@escalated large_refund:1",
        ]

    assert await explore(office.flows, start=start, check=check) >= 10


async def test_another_question_on_replay_parks_the_run(shared):
    """What is asked is part of the record; its times are, too."""
    first = Office(timeout_seconds=HOUR)
    async with workflows(first.flows, url=shared) as app:
        await first.pay_back.start(1, id="r")
        await asked(app)
    second = Office(timeout_seconds=2 * HOUR)
    async with workflows(second.flows, url=shared) as app:
        handle = second.pay_back.handle("r")

        async def parked() -> bool:
            return await handle.status() is RunStatus.PARKED

        await eventually(parked, seconds=WAIT)
        assert "with the times [7200.0, None]" in ((await app.get(WorkflowEngine).run("r")).note or "")
        with bind(actor="ann"):  # it asks all the same, and goes on with the old code
            await second.refund.decide("r", approved=True)
    third = Office(timeout_seconds=HOUR)
    async with workflows(third.flows, url=shared) as app:
        await app.get(WorkflowEngine).resume("r")
        assert await third.pay_back.handle("r").result(WAIT) == "True ann  False"


async def test_mistakes_are_said():
    """Times that make no sense, an ask outside a run, taken names and steps of another router name the remedy."""
    office, other = Office(), Office()
    question = Refund(order="o", amount=1)
    with pytest.raises(NotInRun, match="only workflow functions ask"):
        await office.refund.ask(question)
    for wrong in ({"timeout_seconds": -1.0}, {"timeout_seconds": 5.0, "escalate_after_seconds": 5.0}):
        with pytest.raises(ValueError, match=r"ask[:(]"):
            await office.refund.ask(question, **wrong)
    with pytest.raises(ValueError, match="already has an approval 'large/refund'"):
        office.flows.approval("large/refund", int, may_decide=lambda _asked, _actor: True)
    with pytest.raises(ConfigurationError, match="two routers have"):
        async with workflows(office.flows, other.flows):
            pass
    alien = WorkflowRouter()
    alien.approval(
        "alien", Refund, may_decide=lambda _asked, _actor: True, on_escalation=other.flows.steps["tell_boss"]
    )
    with pytest.raises(ConfigurationError, match="escalates by step tell_boss, whose router is not part of this App"):
        async with workflows(alien):
            pass
    secret = WorkflowRouter()
    secret.approval("secret", SecretStr, may_decide=lambda _asked, _actor: True)
    with pytest.raises(ConfigurationError, match="approval secret: its question cannot be kept"):
        async with workflows(secret):
            pass
    assert repr(office.refund) == "<approval large/refund>"


APP = """
from mainstay.core import App
from mainstay.database import DatabaseModule, DatabaseSettings
from mainstay.workflow import WorkflowModule, WorkflowRouter

flows = WorkflowRouter()
question = flows.approval("question", str, may_decide=lambda asked, actor: actor == "ann")

@flows.workflow(name="ask")
async def ask() -> str:
    decision = await question.ask("\\x1b[31mred?", timeout_seconds=3600)
    return f"{decision.approved} {decision.by} {decision.reason}"

app = App(
    DatabaseModule.for_root(DatabaseSettings(url="URL")), WorkflowModule.for_root(), WorkflowModule.for_feature(flows)
)
"""


async def test_the_command_lists_and_decides(tmp_path, capsys, monkeypatch):
    """The list needs the database only; a decision needs the App, whose code says who may."""
    url = f"sqlite+aiosqlite:///{tmp_path / 'runs.db'}"
    (tmp_path / "asking_service.py").write_text(APP.replace("URL", url))
    monkeypatch.syspath_prepend(str(tmp_path))

    async def command(*arguments: str) -> int:
        return await asyncio.to_thread(main, list(arguments))

    try:
        flows = __import__("asking_service").flows
        async with workflows(flows, url=url) as app:
            await flows.workflows["ask", 1].start(id="r")
            await asked(app)
        assert await command("workflow", "approvals", "--url", url) == 0
        listed = capsys.readouterr().out
        assert "question:1" in listed
        assert "\x1b" not in listed
        named = ("--app", "asking_service:app")
        decide = ("workflow", "decide", "r", "question", "--approve", "--reason", "it is fine")
        assert await command(*named, *decide, "--as", "eve") == 2
        assert "eve may not decide question:1 of run 'r'" in capsys.readouterr().err
        assert await command(*named, *decide, "--as", "ann") == 0
        assert "question of r is approved by ann" in capsys.readouterr().out
        assert await command("workflow", "approvals", "--url", url, "--json") == 0
        assert json.loads(capsys.readouterr().out) == []
        async with workflows(flows, url=url):
            assert await flows.workflows["ask", 1].handle("r").result(WAIT) == "True ann it is fine"
    finally:
        sys.modules.pop("asking_service", None)
