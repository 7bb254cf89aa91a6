"""Steps are given services, and a mistake in the configuration decides nothing about a run."""

import pytest

from mainstay.core import App, ConfigurationError, MainstayError, NotBoundError, given
from mainstay.database import Database, DatabaseModule
from mainstay.workflow import Done, Failed, RunParked, Unknown, WorkflowFailed, WorkflowModule, WorkflowRouter
from mainstay.workflow.engine import WorkflowEngine
from mainstay.workflow.testing import workflows
from mainstay.workflow.workflow import RunStatus

WAIT = 30.0


class Refused(MainstayError):
    code = "BIZ_REFUSED"
    status = 409
    title = "Refused"
    no_effect = True


async def test_steps_and_compensations_are_given_the_services_of_their_app() -> None:
    """They are no part of what is kept, and callers do not pass them."""
    flows = WorkflowRouter()
    seen: list[object] = []

    @flows.step()
    async def charge(amount: int, *, db: Database = given(Database)) -> int:
        seen.append(db)
        return amount

    @charge.compensation
    async def refund(outcome: Done[int] | Unknown, amount: int, *, db: Database = given(Database)) -> None:
        seen.append(db)

    @flows.step(harmless=True, failed_on=(Refused,))
    async def deliver() -> None:
        raise Refused

    @flows.workflow(name="buy")
    async def buy(amount: int) -> None:
        await charge(amount)
        await deliver()

    async with workflows(flows) as app:
        run = await buy.start(3)
        with pytest.raises(WorkflowFailed):
            await run.result(WAIT)
        assert seen == [app.get(Database), app.get(Database)]


async def test_a_probe_is_given_the_services_of_its_app() -> None:
    """It looks where the step has acted, so it needs what the step needs."""
    flows = WorkflowRouter()
    seen: list[object] = []

    @flows.step(on_unknown="probe", harmless=True)
    async def send(letter: str, *, db: Database = given(Database)) -> str:
        raise TimeoutError

    @send.probe
    async def was_it_sent(letter: str, *, db: Database = given(Database)) -> Done[str] | Failed | Unknown:
        seen.append(db)
        return Done(f"{letter} was there")

    @flows.workflow(name="write")
    async def write(letter: str) -> str:
        return await send(letter)

    async with workflows(flows) as app:
        run = await write.start("hello")
        assert await run.result(WAIT) == "hello was there"
        assert seen == [app.get(Database)]


def test_a_workflow_function_is_given_nothing() -> None:
    """A replay must not depend on it."""
    flows = WorkflowRouter()
    with pytest.raises(TypeError, match="is given db, which a replay must not depend on: give it to its steps"):

        @flows.workflow(name="buy")
        async def buy(amount: int, *, db: Database = given(Database)) -> None: ...


def test_a_step_of_a_forgotten_router_is_an_error_at_construction() -> None:
    """The App finds it in the workflow's code."""
    flows, forgotten = WorkflowRouter(), WorkflowRouter()

    @forgotten.step(harmless=True)
    async def charge(amount: int) -> int:
        return amount

    @flows.workflow(name="buy")
    async def buy(amount: int) -> int:
        return await charge(amount)

    roots = DatabaseModule.for_root(), WorkflowModule.for_root()
    with pytest.raises(ConfigurationError, match=r"buy uses the WorkflowRouter made at .*WorkflowModule\.for_feature"):
        App(*roots, WorkflowModule.for_feature(flows))
    App(*roots, WorkflowModule.for_feature(flows, forgotten))


@pytest.mark.parametrize("where", ["step", "function"])
async def test_a_mistake_in_the_configuration_parks_and_never_compensates(where: str) -> None:
    """The run waits for the mend, then goes on where it was."""
    flows = WorkflowRouter()
    log: list[str] = []
    broken = True

    def fail_if_broken() -> None:
        if broken:
            msg = "the line is missing"
            raise NotBoundError(msg)

    @flows.step()
    async def charge(amount: int) -> int:
        log.append("charge")
        return amount

    @charge.compensation
    async def refund(outcome: Done[int] | Unknown, amount: int) -> None:
        log.append("refund")

    @flows.step(harmless=True)
    async def deliver() -> None:
        if where == "step":
            fail_if_broken()

    @flows.workflow(name="buy")
    async def buy(amount: int) -> int:
        await charge(amount)
        if where == "function":
            fail_if_broken()
        await deliver()
        return amount

    async with workflows(flows) as app:
        run = await buy.start(3)
        with pytest.raises(RunParked, match="a mistake in the configuration: NotBoundError: the line is missing"):
            await run.result(WAIT)
        assert log == ["charge"]
        broken = False
        await app.get(WorkflowEngine).resume(run.id)
        assert await run.result(WAIT) == 3
        assert await run.status() is RunStatus.COMPLETED
        assert log == ["charge"]
