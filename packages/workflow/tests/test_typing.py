"""What application code writes type-checks, and what it gets wrong does not."""

import subprocess
import sys
from pathlib import Path

import pytest

_RULES = "# pyright: strict, reportUnusedFunction=false, reportUnusedImport=false\n"
_HEADER = """
from typing import assert_type
from mainstay.workflow import Done, Failed, Handle, RunInput, Unknown, Workflow, WorkflowEngine, WorkflowRouter
from mainstay.workflow import Group, class_step, diagram, parallel, saga, sequence, when

flows = WorkflowRouter()


@flows.step()
async def charge(order: str, amount: int = 1) -> float:
    return 1.0


@charge.compensation
async def refund(outcome: Done[float] | Unknown, order: str, amount: int = 1) -> None:
    if isinstance(outcome, Done):
        assert_type(outcome.result, float)


@flows.workflow(name="buy")
async def buy(order: str, amount: int) -> float:
    return await charge(order, amount)


@flows.workflow(name="send")
async def send(order: str, gifts: int = 0, *, express: bool = False) -> bytes:
    return b""


@flows.workflow(name="sweep")
async def sweep() -> None: ...


async def hold(order: str) -> int:
    return 1


async def release(outcome: Done[int] | Unknown, order: str) -> None: ...


class Pay:
    async def execute(self, amount: int) -> float:
        return 1.0

    async def compensate(self, outcome: Done[float] | Unknown, amount: int) -> None: ...


@flows.workflow(name="poll")
async def poll(cursor: int) -> float:
    await poll.continue_with(cursor + 1)


def large(amount: int) -> bool:
    return amount > 10


@flows.step(harmless=True)
async def note(amount: int) -> bytes:
    return b""


"""
_GOOD = """
async def main() -> None:
    run = await buy.start("a", 1, id="x")
    assert_type(run, Handle[float])
    assert_type(await run.result(), float)
    assert_type(await charge("a"), float)
    assert_type(await flows.gather(charge("a"), buy("a", 2)), tuple[float, float])


async def starts(engine: WorkflowEngine, name: str | None) -> None:
    assert_type(await send.start("a"), Handle[bytes])
    assert_type(await send.start("a", 2), Handle[bytes])
    assert_type(await send.start("a", express=True), Handle[bytes])
    assert_type(await send.start(order="a", gifts=2, express=True), Handle[bytes])
    assert_type(await send.start("a", id="x"), Handle[bytes])
    assert_type(await send.start("a", 2, id=name), Handle[bytes])
    assert_type(await sweep.start(), Handle[None])
    assert_type(await sweep.start(id="x"), Handle[None])
    assert_type(send.input("a", express=True).named("x"), RunInput[bytes])
    assert_type(await send.input("a", express=True).named("x").start(), Handle[bytes])
    assert_type(await engine.execute(send, "a", express=True), bytes)
    assert_type(await engine.execute(send.input("a", 2)), bytes)


@flows.workflow(name="parent")
async def parent() -> bytes:
    return await send("a", express=True) + await send("a") + await send(order="a", gifts=1)


@flows.workflow(name="again")
async def again(order: str, *, count: int = 0) -> None:
    await again.continue_with(order, count=count + 1)


sell = saga(flows, "sell", sequence(hold, parallel(Pay(), note)), compensations={"hold": release})
assert_type(sell, Workflow[[str], tuple[float, bytes]])
assert_type(sequence(hold, when(large, Pay())), Group[str, int | float])
assert_type(sequence(hold, when(lambda amount: amount > 1, Pay(), otherwise=note)), Group[str, float | bytes])
paid = class_step(Pay(), flows.step(timeout_seconds=2))
assert_type(saga(flows, "pay", paid), Workflow[[int], float])
assert_type(diagram(sell), str)


@flows.step()
def weigh(order: str) -> int:
    return len(order)


@weigh.compensation
def unweigh(outcome: Done[int] | Unknown, order: str) -> None: ...


async def sold() -> None:
    assert_type(await weigh("a"), int)
    assert_type(await (await sell.start("a")).result(), tuple[float, bytes])
"""
_BAD = {
    "a missing argument of start": 'async def main() -> None:\n    await buy.start("a")\n',
    "a wrong argument beside an id": 'async def main() -> None:\n    await buy.start(1, 1, id="x")\n',
    "a missing argument beside an id": 'async def main() -> None:\n    await buy.start("a", id="x")\n',
    "an argument too many beside an id": 'async def main() -> None:\n    await buy.start("a", 1, 2, id="x")\n',
    "an argument too many": 'async def main() -> None:\n    await buy.start("a", 1, 2)\n',
    "an argument where there is no parameter": 'async def main() -> None:\n    await sweep.start(1, id="x")\n',
    "an id that is no text": 'async def main() -> None:\n    await buy.start("a", 1, id=3)\n',
    "a wrong default": 'async def main() -> None:\n    await send.start("a", "b", id="x")\n',
    "a wrong keyword": 'async def main() -> None:\n    await send.start("a", express="yes")\n',
    "a keyword that is no parameter": 'async def main() -> None:\n    await send.start("a", fast=True)\n',
    "a keyword-only parameter by its place": 'async def main() -> None:\n    await send.start("a", 1, True)\n',
    "a wrong keyword of a child": (
        '@flows.workflow(name="p")\nasync def p() -> bytes:\n    return await send("a", express="yes")\n'
    ),
    "a wrong keyword of an input": 'send.input("a", express="yes")\n',
    "a wrong argument of execute": (
        "async def main(engine: WorkflowEngine) -> None:\n    await engine.execute(send, 1)\n"
    ),
    "a wrong argument of start": "async def main() -> None:\n    await buy.start(1, 1)\n",
    "a wrong argument of continue_with": 'async def main() -> None:\n    await poll.continue_with("a")\n',
    "a wrong argument of a step": "async def main() -> None:\n    await charge(1)\n",
    "a result of another type": 'async def main() -> None:\n    text: str = await (await buy.start("a", 1)).result()\n',
    "a compensation without the outcome": (
        "@charge.compensation\nasync def undo(order: str, amount: int = 1) -> None: ...\n"
    ),
    "a compensation for another result": (
        "@charge.compensation\nasync def undo(outcome: Done[str] | Unknown, order: str, amount: int = 1) -> None: ...\n"
    ),
    "a wrong argument of a plain step": (
        "@flows.step()\ndef plain(order: str) -> float:\n    return 1.0\n\n\n"
        "async def main() -> None:\n    await plain(1)\n"
    ),
    "a probe that answers otherwise": (
        "@charge.probe\nasync def ask(order: str, amount: int = 1) -> bool:\n    return True\n"
    ),
    "a step of a saga that takes another type": "sequence(Pay(), note)\n",
    "branches of a saga that take different types": "sequence(hold, parallel(note, hold))\n",
    "a condition for another type": "sequence(hold, when(lambda order: order.upper() == order, note))\n",
    "an input of another type": 'async def main() -> None:\n    await saga(flows, "x", note).start("a")\n',
    "a class without execute": "class Nothing: ...\n\n\nsequence(hold, Nothing())\n",
    "a misspelt word of a compensation": 'saga(flows, "x", hold, compensations={"hold": "harmles"})\n',
    "a compensation that is not async": (
        'def undo(outcome: object, order: str) -> None: ...\n\n\nsaga(flows, "x", hold, compensations={"hold": undo})\n'
    ),
}


CHECKERS = {
    "mypy": (["mypy", "--config-file", "pyproject.toml"], ": error:"),
    # By itself it would look for an environment named .venv.
    "pyright": (["basedpyright", "--pythonpath", sys.executable, "--level", "error"], " - error: "),
}


@pytest.fixture(scope="module", params=sorted(CHECKERS))
def findings(request, tmp_path_factory):
    """The lines with errors, by case, of one run of a type checker over all of them."""
    directory = tmp_path_factory.mktemp("typing")
    cases = {"good": _GOOD, **_BAD}
    paths = {case: directory / f"case_{number}.py" for number, case in enumerate(cases)}
    for case, path in paths.items():
        path.write_text(
            "# pyright: strict, reportUnusedFunction=false, reportUnusedImport=false" + _HEADER + cases[case]
        )
    root = Path(__file__).parents[3]
    (name, *options), mark = CHECKERS[request.param]
    command = [sys.executable, "-m", name, *options, *paths.values()]
    output = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False).stdout
    lines = [line for line in output.splitlines() if mark in line]
    return {case: [line for line in lines if path.name in line] for case, path in paths.items()}


def test_right_code_type_checks(findings):
    """Arguments, results, outcomes and branches have the types that the functions state."""
    assert findings["good"] == []


@pytest.mark.parametrize("case", sorted(_BAD))
def test_wrong_code_does_not(findings, case):
    """The mistake is an error of the type checker."""
    assert findings[case]
