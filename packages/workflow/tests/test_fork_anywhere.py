"""A fork before each primitive: the new run has what was before, and does the rest itself, to the same end."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from mainstay.core import bind, once
from mainstay.core.testing import eventually
from mainstay.workflow import Done, RunStateError, RunStatus, Unknown, WorkflowEngine, WorkflowRouter
from mainstay.workflow.testing import workflows

WAIT = 60.0
PRIMITIVES = {
    "step": "look:1",
    "transactional step": "note:1",
    "value": "@value stage:1",
    "effect": "@told:1",
    "effect in the database": "@told:2",
    "send": "@send:paid:1",
    "start": "@start:other:1",
    "start of many": "@start_batch:1",
    "child": "@child other:1",
    "gather": "@gather:1",
    "sleep": "@sleep:1",
    "sleep until": "@sleep_until:1",
    "now": "@now:1",
    "uuid": "@uuid:1",
    "random": "@random:1",
    "signal": "@signal paid:1",
    "signal that does not come": "@signal never:1",
    "approval": "@approval refund:1",
    "approval that is escalated": "@approval refund:2",
    "approval without an answer": "@approval refund:3",
    "decision": "@decide:refund:1",
}
# Places of an ask that was escalated, and not decided by then; and where it can be forked instead.
IN_BETWEEN = {"look:2": "@approval refund:2", "@escalated refund:1": "@approval refund:2"}


class Everything:
    """A run of every primitive, whose result is what each of them came to."""

    def __init__(self) -> None:
        self.flows = flows = WorkflowRouter()
        self.paid, never = flows.signal("paid", int), flows.signal("never", int)
        stage = flows.value("stage", str)

        @flows.step(harmless=True)
        async def look(n: int) -> int:
            return n

        @flows.step(transactional=True)
        async def note(n: int) -> int:
            return n

        @note.compensation
        async def forget(outcome: Done[int] | Unknown, n: int) -> None: ...

        @flows.workflow(name="other")
        async def other(n: int) -> int:
            return n

        refund = self.refund = flows.approval("refund", int, may_decide=lambda _asked, _actor: True, on_escalation=look)

        @flows.workflow(name="asker")
        async def asker(n: int) -> bool:
            return (await refund.ask(n)).approved

        async def nothing(_key: str | None) -> None: ...

        async def failure(of: Awaitable[Any]) -> str:
            try:
                return str(await of)
            except Exception as error:  # noqa: BLE001  it is the result
                return type(error).__name__

        acts: dict[str, Callable[[], Awaitable[Any]]] = {
            "step": lambda: look(1),
            "transactional step": lambda: note(1),
            "value": lambda: stage.set("begun"),
            "effect": lambda: once("told", nothing, transactional=False),
            "effect in the database": lambda: once("told", nothing, transactional=True),
            "send": lambda: self.paid.send("somebody", 1),
            "start": lambda: other.start(1),
            "start of many": lambda: flows.binding.get().start_batch([other.input(n) for n in range(2)]),
            "child": lambda: other(2),
            "gather": lambda: flows.gather(look(3), other(4)),
            "sleep": lambda: flows.sleep(0),
            "sleep until": lambda: flows.sleep_until(datetime(2020, 1, 1, tzinfo=UTC)),
            "now": flows.now,
            "uuid": flows.uuid,
            "random": flows.random,
            "signal": self.paid.wait,
            "signal that does not come": lambda: never.wait(timeout_seconds=0),
            "approval": lambda: refund.ask(1),
            "approval that is escalated": lambda: refund.ask(2, escalate_after_seconds=0),
            "approval without an answer": lambda: refund.ask(3, timeout_seconds=0),
            "decision": lambda: refund.decide("asker", approved=True),
        }
        assert acts.keys() == PRIMITIVES.keys()

        @flows.workflow(name="everything")
        async def everything() -> list[str]:
            return [await failure(act()) for act in acts.values()]

        self.everything, self.asker = everything, asker

    async def to_its_end(self, app: Any, run_id: str) -> list[str]:
        """The result, once everybody has said what the run waits for."""
        engine = app.get(WorkflowEngine)
        run = self.everything.handle(run_id)
        await self.paid.send(run_id, 7)

        async def decided() -> bool:
            for view in await engine.approvals.waiting():
                escalated_first = view.place != "refund:2" or view.escalated
                if view.run_id == run_id and escalated_first and view.due_at is None:
                    with bind(actor="eva"):
                        await self.refund.decide(run_id, approved=True, place=view.place)
            return (await run.status()).terminal

        await eventually(decided, seconds=WAIT)
        return await run.result(WAIT)


async def test_before_each_primitive(url: str) -> None:
    """What came before is as it was, to the letter, and what follows comes to an end of the same kind."""
    shop = Everything()
    async with asyncio.timeout(2 * WAIT), workflows(shop.flows, url=url) as app:
        engine = app.get(WorkflowEngine)
        with bind(actor="eva"):
            await shop.asker.start(1, id="asker")
            await eventually(engine.approvals.waiting, seconds=WAIT)
            await shop.everything.start(id="o")
        original = await shop.to_its_end(app, "o")
        records = (await engine.history("o")).records
        for number, (name, place) in enumerate(PRIMITIVES.items()):
            new_id = f"n{number}"
            await engine.fork("o", before=place, new_id=new_id)
            result = await shop.to_its_end(app, new_id)
            assert result[:number] == original[:number], name
            assert len(result) == len(original), name
            assert (await engine.history(new_id)).records.keys() == records.keys(), name
            assert (await engine.run(new_id)).status is RunStatus.COMPLETED
        for place, remedy in IN_BETWEEN.items():
            with pytest.raises(RunStateError, match=f"fork before {remedy}"):
                await engine.fork("o", before=place, new_id="no")
