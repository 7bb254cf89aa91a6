"""What is wrong with steps and workflows is said before anything runs."""

import asyncio
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
from pydantic import SecretStr

from mainstay.core import App, ConfigurationError, NotBoundError, Retry
from mainstay.database import DatabaseModule, DatabaseSettings
from mainstay.workflow import (
    Done,
    Failed,
    NotInRun,
    PayloadCodec,
    Unknown,
    WorkflowModule,
    WorkflowRouter,
    current_step,
)


def app_with(*routers):
    return App(
        DatabaseModule.for_root(DatabaseSettings(url="sqlite+aiosqlite:///:memory:")),
        WorkflowModule.for_root(),
        WorkflowModule.for_feature(*routers),
    )


def test_trap_19_a_missing_compensation_stops_the_construction_of_the_app():
    """A step that nothing undoes is an error where the App is built, and it names both remedies."""
    flows = WorkflowRouter()

    @flows.step()
    async def charge(n: int) -> int:
        return n

    with pytest.raises(
        ConfigurationError, match=r"charge has no compensation: add @charge\.compensation.*harmless=True"
    ):
        app_with(flows)


def test_a_compensation_by_decorator_is_enough():
    """A compensation that follows the step's definition satisfies the App."""
    flows = WorkflowRouter()

    @flows.step()
    async def charge(n: int) -> int:
        return n

    @charge.compensation
    async def refund(outcome: Done[int] | Unknown, n: int) -> None: ...

    app_with(flows)


def test_the_module_requires_the_database():
    """Without a database the error names the line to write."""
    with pytest.raises(ConfigurationError, match=r"add DatabaseModule\.for_root\(\)"):
        App(WorkflowModule.for_root())


def test_a_workflow_that_is_not_async_is_refused():
    """A plain function cannot be a workflow."""
    flows = WorkflowRouter()
    with pytest.raises(TypeError, match="workflow buy must be an `async def`"):

        @flows.workflow(name="buy")  # type: ignore[arg-type]  # what the test is about
        def buy(n: int) -> int:
            return n


def test_star_arguments_are_refused():
    """An input that cannot be kept by name is refused at the definition."""
    flows = WorkflowRouter()
    with pytest.raises(TypeError, match=r"takes \*args: name each parameter"):

        @flows.step(harmless=True)
        async def charge(*args: int) -> int:
            return len(args)


@pytest.mark.parametrize("missing", ["parameter", "result"])
def test_a_missing_annotation_is_named(missing):
    """A parameter or result without a type is named when the App is built."""
    flows = WorkflowRouter()

    async def charge(n: int) -> int:
        return n

    del charge.__annotations__["n" if missing == "parameter" else "return"]
    flows.step(harmless=True)(charge)
    with pytest.raises(ConfigurationError, match=f"step charge: annotate its {missing}"):
        app_with(flows)


def test_an_annotation_that_names_nothing_is_named():
    """A forward reference that never resolves is an error of the App, not of the first run."""
    flows = WorkflowRouter()

    async def charge(n: int) -> int:
        return n

    charge.__annotations__["n"] = "Nowhere"
    flows.step(harmless=True)(charge)
    with pytest.raises(ConfigurationError, match="name 'Nowhere', which its module does not define"):
        app_with(flows)


def test_a_type_that_is_no_json_is_named():
    """A type that pydantic cannot write is an error of the App."""
    flows = WorkflowRouter()

    class Opaque:
        pass

    async def charge(n: Opaque) -> int:
        return 1

    charge.__annotations__["n"] = Opaque
    flows.step(harmless=True)(charge)
    with pytest.raises(ConfigurationError, match="step charge: its arguments cannot be kept as JSON"):
        app_with(flows)


def test_names_are_unique_within_a_router():
    """A second step or workflow of the same name is refused at its definition."""
    flows = WorkflowRouter()

    async def charge(n: int) -> int:
        return n

    flows.step(harmless=True)(charge)
    with pytest.raises(ValueError, match="already has a step charge"):
        flows.step(harmless=True)(charge)
    flows.workflow(name="buy")(charge)
    flows.workflow(name="buy", version=2)(charge)
    with pytest.raises(ValueError, match="already has version 2 of workflow 'buy'"):
        flows.workflow(name="buy", version=2)(charge)


def test_names_are_unique_within_an_app():
    """Records know a step by its name, so two routers of one App cannot share one."""
    one, two = WorkflowRouter(), WorkflowRouter()

    async def charge(n: int) -> int:
        return n

    one.step(harmless=True)(charge)
    two.step(harmless=True)(charge)
    with pytest.raises(ConfigurationError, match="two routers have a step charge"):
        app_with(one, two)
    three, four = WorkflowRouter(), WorkflowRouter()
    three.workflow(name="buy")(charge)
    four.workflow(name="buy")(charge)
    with pytest.raises(ConfigurationError, match="two routers have version 1 of workflow 'buy'"):
        app_with(three, four)


def test_versions_begin_at_one():
    """An impossible version is refused at the definition."""
    with pytest.raises(ValueError, match="a version is 1 or more"):
        WorkflowRouter().workflow(name="buy", version=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"failed_on": OSError}, None),
        ({"failed_on": [OSError]}, None),
        ({"failed_on": (OSError, "Declined")}, r"failed_on=.*: it is a tuple of subclasses of Exception"),
        ({"failed_on": (asyncio.CancelledError,)}, r"failed_on=.*: it is a tuple of subclasses of Exception"),
        ({"on_unknown": "retry"}, "on_unknown='retry': it is one of 'compensate', 'probe', 'park'"),
        ({"exhausted": "fail"}, "exhausted='fail': it is one of 'compensate', 'park'"),
    ],
)
def test_an_option_that_is_none_is_refused_where_the_step_is_declared(options, message):
    """And not when a step has failed and somebody's money depends on it."""
    flows = WorkflowRouter()
    with pytest.raises(TypeError, match=message) if message else nullcontext():
        flows.step(harmless=True, **options)


def test_options_that_contradict_each_other_are_refused():
    """A pivot that could be undone, a transactional step that could be unknown, and a timeout of nothing."""
    flows = WorkflowRouter()
    with pytest.raises(TypeError, match="a pivot cannot be undone"):
        flows.step(pivot=True)
    with pytest.raises(TypeError, match="harmless=True and pivot=True: each says why"):
        flows.step(pivot=True, harmless=True, on_unknown="park")
    with pytest.raises(TypeError, match="harmless=True and after_pivot=True: each says why"):
        flows.step(after_pivot=True, harmless=True)
    flows.step(pivot=True, transactional=True)
    with pytest.raises(TypeError, match="never unknown"):
        flows.step(transactional=True, on_unknown="park")
    with pytest.raises(ValueError, match="timeout_seconds=0"):
        flows.step(timeout_seconds=0)


@pytest.mark.parametrize("reason", ["harmless", "pivot", "after_pivot"])
def test_a_step_says_why_nothing_undoes_it(reason):
    """Each of the three words stands for a compensation, and is in the step's policy."""
    flows = WorkflowRouter()

    @flows.step(
        transactional=True,
        retry=Retry(attempts=8),
        exhausted="park",
        harmless=reason == "harmless",
        pivot=reason == "pivot",
        after_pivot=reason == "after_pivot",
    )
    async def note(n: int) -> int:
        return n

    app = app_with(flows)
    assert note.policy.uncompensated == (reason,)
    (said,) = next(module for module in app.modules if isinstance(module, WorkflowModule)).describe()["steps"]
    assert said == f"note: 8 attempts, transactional, then parked, {reason}"


def test_what_a_module_says_of_its_other_parts():
    """Signals, values, approvals and the codec by name, and nothing where there are none."""
    flows = WorkflowRouter()
    flows.signal("paid", int)
    flows.signal("cancelled", str)
    flows.value("progress", int)
    flows.approval("refund", int, may_decide=lambda _asked, _actor: True)

    class Sealed(PayloadCodec):
        name = "aes"

        def encode(self, payload: bytes, run_id: str) -> bytes:
            return payload

        def decode(self, stored: bytes, run_id: str) -> bytes:
            return stored

    def said_of(*parts):
        (module,) = (module for module in app_with(*parts).modules if isinstance(module, WorkflowModule))
        return module.describe()

    assert said_of(WorkflowRouter()) == {"workflows": [], "steps": []}
    others = {"signals": ["cancelled", "paid"], "values": ["progress"], "approvals": ["refund"], "codec": ["aes"]}
    assert said_of(flows, Sealed()) == {"workflows": [], "steps": [], **others}


def test_a_compensation_fits_its_step():
    """Its parameters are the outcome and the step's own, by name; a second one, or one nobody needs, is refused."""
    flows = WorkflowRouter()

    @flows.step()
    async def charge(n: int) -> int:
        return n

    async def wrong(outcome: Done[int] | Unknown, m: int) -> None: ...

    with pytest.raises(
        TypeError, match=r"compensation wrong takes \(outcome, m\); that of step charge takes \(outcome, n\)"
    ):
        charge.compensation(wrong)  # type: ignore[arg-type]  # what the test is about

    async def right(outcome: Done[int] | Unknown, n: int) -> None: ...

    assert charge.compensation(right) is right
    with pytest.raises(TypeError, match="already has a compensation"):
        charge.compensation(right)

    @flows.step(harmless=True)
    async def notify(n: int) -> None: ...

    with pytest.raises(TypeError, match=r"nothing undoes it: remove harmless=True, or right"):
        notify.compensation(right)  # type: ignore[arg-type]  # what the test is about


def test_a_probe_is_needed_and_fits():
    """`on_unknown="probe"` asks for a probe when the App is built, and a probe for `on_unknown="probe"`."""
    flows = WorkflowRouter()

    @flows.step(harmless=True, on_unknown="probe")
    async def charge(n: int) -> int:
        return n

    with pytest.raises(ConfigurationError, match=r"add @charge\.probe"):
        app_with(flows)

    async def wrong(m: int) -> Done[int] | Failed | Unknown:
        return Failed()

    with pytest.raises(TypeError, match=r"probe wrong takes \(m\)"):
        charge.probe(wrong)  # type: ignore[arg-type]  # what the test is about

    @charge.probe
    async def ask(n: int) -> Done[int] | Failed | Unknown:
        return Failed()

    app_with(flows)

    @flows.step(harmless=True)
    async def notify(n: int) -> int:
        return n

    with pytest.raises(TypeError, match="would never use a probe"):
        notify.probe(ask)


async def test_outside_a_run_the_remedy_is_named():
    """A workflow, a step, a gather and `current_step` outside a run say what to call instead."""
    flows = WorkflowRouter()

    @flows.step(harmless=True)
    async def charge(n: int) -> int:
        return n

    @flows.workflow(name="buy")
    async def buy(n: int) -> int:
        return await charge(n)

    with pytest.raises(NotInRun, match=r"await buy\.start\(…, id=…\)"):
        await buy(1)
    with pytest.raises(NotInRun, match=r"charge\.function is the plain function"):
        await charge(1)
    assert await charge.function(1) == 1
    with pytest.raises(NotInRun, match=r"asyncio\.gather"):
        await flows.gather(charge(1), charge(2))
    with pytest.raises(NotInRun, match="outside the code of a step"):
        current_step()
    with pytest.raises(NotBoundError, match=r"WorkflowModule\.for_feature"):
        await buy.start(1)
    with pytest.raises(NotBoundError, match=r"WorkflowModule\.for_feature"):
        buy.handle("x")


def test_definitions_show_what_they_are():
    """Steps and workflows say their names, and keep the function's documentation."""
    flows = WorkflowRouter()

    @flows.step(harmless=True)
    async def charge(n: int) -> int:
        """Charge."""
        return n

    @flows.workflow(name="buy", version=3)
    async def buy(n: int) -> int:
        """Buy."""
        return n

    assert (repr(charge), charge.__doc__) == ("<step charge>", "Charge.")
    assert (repr(buy), buy.__doc__) == ("<workflow buy version 3>", "Buy.")


def test_decorated_functions_keep_their_types():
    """A step over another decorator is described by the function inside."""
    import functools

    @dataclass
    class Order:
        n: int

    def guarded(function):
        @functools.wraps(function)
        async def inner(*args: Any, **kwargs: Any) -> Any:
            return await function(*args, **kwargs)

        return inner

    async def charge(order: Order, *, note: str = "none") -> list[Order]:
        return [order]

    charge.__annotations__ |= {"order": Order, "return": list[Order]}
    step = WorkflowRouter().step(harmless=True)(guarded(charge))
    step.check()
    signature = step.signature
    text = signature.dump_arguments(signature.bind((Order(1),), {"note": "x"}))
    assert text == '{"order":{"n":1},"note":"x"}'
    assert signature.load_arguments('{"order":{"n":2}}') == {"order": Order(2), "note": "none"}
    assert signature.keep_result([Order(3)]) == ('[{"n":3}]', [Order(3)])
    assert signature.load_result('[{"n":3}]') == [Order(3)]
    with pytest.raises(TypeError, match="step charge: missing a required argument: 'order'"):
        signature.bind((), {})
    with pytest.raises(TypeError, match="step charge: its arguments cannot be kept"):
        signature.dump_arguments({"order": "no order"})


def test_a_secret_is_refused_where_the_app_is_built():
    """It would be kept as asterisks, and the step would run with those."""
    flows = WorkflowRouter()

    @flows.step(harmless=True)
    async def sign_in(password: SecretStr) -> None: ...

    with pytest.raises(
        (ConfigurationError, TypeError), match=r"sign_in: its arguments cannot be kept: password holds a secret"
    ):
        app_with(flows)
