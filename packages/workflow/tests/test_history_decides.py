"""What user code and the database do meanwhile decides nothing against the record of a run, nor for money."""

import asyncio
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest
from pydantic_core import core_schema

from mainstay.core import App, Drain, FullJitter, MainstayError, Retry, once
from mainstay.core.testing import VirtualClock
from mainstay.database import CommitUnknown, Database, DatabaseBusy, DatabaseUnavailable
from mainstay.workflow import Done, RunStatus, Unknown, WorkflowEngine, WorkflowFailed, WorkflowRouter
from mainstay.workflow._attempts import EFFECT
from mainstay.workflow.testing import workflows

WAIT = 30.0
QUICK = Retry(attempts=2, wait=FullJitter(0.001, 0.002))


class Ledger:
    """What a step has done, and what was given back."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.flows = WorkflowRouter()

    def charge(self, body: Callable[[], Awaitable[None]] | None = None, **options: Any) -> Any:
        """A step that charges, and gives back in its compensation."""
        options.setdefault("retry", QUICK)

        @self.flows.step(**options)
        async def charge(n: int) -> int:
            self.lines.append("charge")
            if body is not None:
                await body()
            return n

        @charge.compensation
        async def refund(outcome: Done[int] | Unknown, n: int) -> None:
            self.lines.append(f"refund {type(outcome).__name__}")

        return charge


@asynccontextmanager
async def interrupted(
    app: App, gate: asyncio.Event, meanwhile: Callable[[], object] = lambda: None
) -> AsyncGenerator[WorkflowEngine]:
    """Cancel a worker once `gate` is set, do something `meanwhile`, and let another one go on inside the block."""
    engine = app.get(WorkflowEngine)
    first = asyncio.create_task(engine.worker.work(Drain(app.clock)))
    await asyncio.wait_for(gate.wait(), WAIT)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    meanwhile()
    drain = Drain(app.clock)
    second = asyncio.create_task(engine.worker.work(drain))
    try:
        yield engine
    finally:
        drain.begin()
        await second


async def parked_note(app: App, run: Any) -> str:
    """Why the run waits for a person."""
    async with asyncio.timeout(WAIT):
        while not (await run.status()).waits_for_a_person:  # noqa: ASYNC110  the worker's doing
            await asyncio.sleep(0.01)
    assert await run.status() is RunStatus.PARKED
    return (await app.get(WorkflowEngine).run(run.id)).note or ""


def hanging(gate: asyncio.Event) -> Callable[[], Awaitable[None]]:
    """Say that it began, and hang the first time."""

    async def hang() -> None:
        if not gate.is_set():
            gate.set()
            await asyncio.sleep(3600)

    return hang


async def changed(before: str, after: str, expected: str) -> None:
    """Interrupt a run of one form of the function, and replay it with the other."""
    ledger, gate, form = Ledger(), asyncio.Event(), [before]
    charge, hang = ledger.charge(), hanging(gate)

    @ledger.flows.step(harmless=True)
    async def price(of: str) -> str:
        return f"price of {of}"

    @ledger.flows.step(harmless=True)
    async def ship(n: int) -> int:
        await hang()
        return n

    @ledger.flows.workflow(name="sell", version=1)
    async def sell(n: int) -> str:
        await charge(n)
        if form[0] == "gathers":
            await ledger.flows.gather(price("a"), price("b"))
        names = ["x", "y"] if form[0] != "other order" else ["y", "x"]
        got = [await price(name) for name in names]
        if form[0] == "raises":
            msg = "a mistake of the new release"
            raise KeyError(msg)
        if form[0] == "returns":
            return "early"
        await ship(n)
        return ", ".join(got)

    async with workflows(ledger.flows, serve=False) as app:
        run = await sell.start(1, id="r")
        async with interrupted(app, gate, meanwhile=lambda: form.__setitem__(0, after)) as engine:
            assert expected in await parked_note(app, run)
            assert ledger.lines == ["charge"]
            form[0] = before
            await engine.resume("r")
            assert await run.result(WAIT) == "price of x, price of y"
    assert ledger.lines == ["charge"]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("", "raises", "KeyError"),
        ("", "returns", "ship:1"),
        ("gathers", "", "price"),
        ("", "other order", "price:1"),
    ],
)
async def test_a_changed_function_parks_and_never_compensates(before: str, after: str, expected: str) -> None:
    """An end before the record's end, a removed gather, other arguments; and the old code takes the run to its end."""
    await changed(before, after, expected)


@pytest.mark.parametrize("error", [DatabaseUnavailable, DatabaseBusy, CommitUnknown])
async def test_a_database_that_is_away_is_no_failure_of_a_transactional_step(error: type[MainstayError]) -> None:
    """The transaction is repeated for as long as it takes, and the step keeps all of its attempts."""
    ledger = Ledger()
    charge = ledger.charge()

    @ledger.flows.step(transactional=True, harmless=True, retry=Retry(attempts=1))
    async def book(n: int) -> int:
        ledger.lines.append("book")
        return n

    @ledger.flows.workflow(name="sell", version=1)
    async def sell(n: int) -> int:
        await charge(n)
        return await book(n)

    async with workflows(ledger.flows) as app:
        with away(app.get(Database), error, 5, lambda: "charge" in ledger.lines):
            run = await sell.start(1, id="r")
            assert await run.result(WAIT) == 1
    assert "refund Done" not in ledger.lines


@pytest.mark.parametrize("error", [DatabaseUnavailable, DatabaseBusy, CommitUnknown])
@pytest.mark.parametrize("transactional", [False, True])
async def test_a_database_that_is_away_is_no_failure_of_an_effect(
    error: type[MainstayError], transactional: bool
) -> None:
    """What a run tells others, a signal or an event, is told again for as long as it takes, under the same key."""
    ledger = Ledger()
    charge = ledger.charge()
    keys: list[str | None] = []

    async def tell(key: str | None) -> None:
        keys.append(key)
        if len(keys) <= EFFECT.retry.attempts:
            msg = "away"
            raise error(msg)

    @ledger.flows.workflow(name="sell", version=1)
    async def sell(n: int) -> int:
        await charge(n)
        await once("tell", tell, transactional=transactional)
        return n

    clock = VirtualClock()
    async with workflows(ledger.flows, clock=clock):
        run = await sell.start(1, id="r")
        await clock.advance(600)
        assert await run.status() is RunStatus.COMPLETED
    assert keys == [keys[0]] * (EFFECT.retry.attempts + 1)
    assert "refund Done" not in ledger.lines


@contextmanager
def away(database: Database, error: type[MainstayError], times: int, since: Callable[[], bool]) -> Generator[None]:
    """Let units of work fail `times` times at their end, once `since()` is true."""
    real, left = database.transaction, [times]

    @asynccontextmanager
    async def transaction(*args: Any, **kwargs: Any) -> Any:
        async with real(*args, **kwargs) as session:
            yield session
            if since() and left[0]:
                left[0] -= 1
                msg = "away"
                raise error(msg)

    database.transaction = transaction  # type: ignore[method-assign]  # the database of this test
    try:
        yield
    finally:
        database.transaction = real  # type: ignore[method-assign]  # as it was


async def ends(ledger: Ledger, charge: Any) -> None:
    """A run of one charge that fails."""

    @ledger.flows.workflow(name="sell", version=1)
    async def sell(n: int) -> int:
        return int(await charge(n))

    async with workflows(ledger.flows):
        run = await sell.start(1, id="r")
        with pytest.raises(WorkflowFailed):
            await run.result(WAIT)


async def _later_call() -> None:
    msg = "our own ledger is away"
    raise DatabaseUnavailable(msg)


async def test_a_later_calls_no_effect_does_not_speak_for_the_whole_step() -> None:
    """The provider was charged before the write that did nothing: it is refunded."""
    ledger = Ledger()
    await ends(ledger, ledger.charge(_later_call, retry=Retry(attempts=1)))
    assert ledger.lines == ["charge", "refund Unknown"]


async def test_a_step_of_one_call_lets_that_call_speak() -> None:
    """It says so where it is declared: then nothing happened, and nothing is undone."""
    ledger = Ledger()
    await ends(ledger, ledger.charge(_later_call, retry=Retry(attempts=1), one_call=True))
    assert ledger.lines == ["charge"]


class Abort(BaseException):
    """What some libraries end a test or a command with."""


class Wordless(Exception):
    """An error without a text."""

    def __str__(self) -> str:
        raise self.args[0]


async def _abort() -> None:
    raise Abort


async def _exit() -> None:
    sys.exit("bad configuration")


async def _wordless() -> None:
    raise Wordless(RuntimeError())


async def _exits_for_a_text() -> None:
    raise Wordless(SystemExit())


async def _group() -> None:
    msg = "several"
    raise BaseExceptionGroup(msg, [Abort()])


@pytest.mark.parametrize("body", [_abort, _exit, _wordless, _exits_for_a_text, _group])
async def test_what_is_no_exception_ends_a_step_like_one(body: Callable[[], Awaitable[None]]) -> None:
    """It may have happened, and spends an attempt: the run is undone, and the worker lives."""
    ledger = Ledger()
    await ends(ledger, ledger.charge(body))
    assert ledger.lines == ["charge", "charge", "refund Unknown"]


async def test_a_replay_starts_and_sends_nothing_again() -> None:
    """What a workflow function starts and sends is recorded: one child, one signal, however often it is executed."""
    flows, gate, seen = WorkflowRouter(), asyncio.Event(), list[str]()
    told = flows.signal("told", str)
    hang = hanging(gate)

    @flows.step(harmless=True)
    async def wait_a_while() -> None:
        await hang()

    @flows.workflow(name="child", version=1)
    async def child(n: int) -> str:
        seen.append(f"child {n}")
        return await told.wait()

    @flows.workflow(name="parent", version=1)
    async def parent(n: int) -> str:
        started = await child.start(n)
        await told.send(started.id, "hello")
        await wait_a_while()
        return started.id

    async with workflows(flows, serve=False) as app:
        run = await parent.start(7, id="r")
        async with interrupted(app, gate) as engine:
            started = await run.result(WAIT)
            assert await child.handle(started).result(WAIT) == "hello"
        assert len(await engine.runs(limit=10)) == 2
    assert set(seen) == {"child 7"}


class Plain:
    """A value without an equality of its own."""

    def __init__(self, text: str) -> None:
        self.text = text

    @classmethod
    def __get_pydantic_core_schema__(cls, _source: object, _handler: object) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(
            cls, core_schema.str_schema(), serialization=core_schema.plain_serializer_function_ser_schema(str)
        )

    def __str__(self) -> str:
        return self.text


async def test_equal_arguments_are_equal_by_value() -> None:
    """A mapping in another order, and a value without an equality of its own, are no other arguments."""
    flows, gate, turn = WorkflowRouter(), asyncio.Event(), [0]
    hang = hanging(gate)

    @flows.step(harmless=True)
    async def look(names: list[str], by: Plain, of: dict[str, int]) -> int:
        return len(names)

    @flows.step(harmless=True)
    async def wait_a_while() -> None:
        await hang()

    @flows.workflow(name="looks", version=1)
    async def looks(n: int) -> int:
        turn[0] += 1
        of = {"a": 1, "b": 2} if turn[0] == 1 else {"b": 2, "a": 1}
        found = await look(["a"], Plain("ann"), of)
        await wait_a_while()
        return found

    async with workflows(flows, serve=False) as app:
        run = await looks.start(1, id="r")
        async with interrupted(app, gate):
            assert await run.result(WAIT) == 1
    assert turn == [2]


@pytest.mark.parametrize("grouped", [False, True])
async def test_rejections_in_a_group_are_waited_for_as_one_alone(grouped: bool) -> None:
    """Inside a step they are attempts; the next one comes when the provider may be asked again, not before."""
    ledger, clock, at = Ledger(), VirtualClock(), list[float]()

    async def asks() -> None:
        if len(at) == 1:
            msg = "the circuit is open"
            raise MainstayError(msg, no_effect=True, retryable=True, retry_after_seconds=500.0)

    async def body() -> None:
        at.append(clock.monotonic())
        if not grouped:
            await asks()
        async with asyncio.TaskGroup() as group:
            group.create_task(asks())
            group.create_task(asks())

    charge = ledger.charge(body, retry=Retry(attempts=2, wait=FullJitter(0.001, 0.002)))

    @ledger.flows.workflow(name="sell", version=1)
    async def sell(n: int) -> int:
        return int(await charge(n))

    async with workflows(ledger.flows, clock=clock):
        run = await sell.start(1)
        await clock.advance(2_000.0)
        assert await run.status() is RunStatus.COMPLETED
    assert len(at) == 2
    assert at[1] - at[0] >= 500.0


class Declined(Exception):
    """The provider says no."""


@pytest.mark.parametrize("grouped", [False, True])
async def test_an_error_that_fails_the_step_does_so_in_a_group_as_well(grouped: bool) -> None:
    """`failed_on` ends the step at once, whether the error comes alone or out of a TaskGroup; nothing is undone."""
    ledger = Ledger()

    async def declines() -> None:
        raise Declined

    async def body() -> None:
        if not grouped:
            await declines()
        async with asyncio.TaskGroup() as group:
            group.create_task(declines())

    charge = ledger.charge(body, failed_on=(Declined,))

    @ledger.flows.workflow(name="sell", version=1)
    async def sell(n: int) -> int:
        return int(await charge(n))

    async with workflows(ledger.flows):
        with pytest.raises(WorkflowFailed, match="nothing happened"):
            await (await sell.start(1)).result(WAIT)
    assert ledger.lines == ["charge"]
