"""Handlers that fit their events type-check, and those that do not are errors of the type checkers."""

import subprocess
import sys
from pathlib import Path

import pytest

_HEADER = """# pyright: strict, reportUnusedFunction=false, reportUnusedClass=false
from collections.abc import Sequence
from typing import assert_type
from mainstay.core import given
from mainstay.events import Event, EventRouter, Metadata

events = EventRouter()


class Paid(Event, type="paid", key="order"):
    order: str


class Refunded(Event, type="refunded", key="order"):
    order: str


class Clock: ...


"""
_GOOD = """
@events.on(Paid, group="a", concurrency=2, order="none")
async def one(event: Paid) -> None: ...


@events.on(Paid, Refunded, group="b")
async def either(event: Paid | Refunded, meta: Metadata) -> None: ...


@events.on_batch(Paid, group="c", size=10, wait_seconds=0.1, by="key")
async def many(paid: list[Paid]) -> None: ...


@events.on_batch(Paid, group="d")
async def with_metadata(paid: list[Paid], metas: list[Metadata], *, clock: Clock = given(Clock)) -> None: ...


@events.on_batch(Paid, Refunded, group="e")
async def mixed(some: list[Paid | Refunded]) -> None: ...


@events.on_batch(Paid, group="f")
async def general(some: Sequence[Event], metas: Sequence[Metadata]) -> None: ...


@events.on_batch(Paid, group="g")
class Handler:
    async def handle(self, paid: list[Paid]) -> None: ...


async def main(meta: Metadata) -> None:
    await one(Paid(order="a"))
    await many([Paid(order="a")])
    await with_metadata([Paid(order="a")], [meta], clock=Clock())
    await mixed([Paid(order="a"), Refunded(order="a")])
    assert_type(Handler(), Handler)
"""
_BAD = {
    "an event where a list comes": """
@events.on_batch(Paid, group="g")
async def many(paid: Paid) -> None: ...
""",
    "a list where an event comes": """
@events.on(Paid, group="g")
async def one(paid: list[Paid]) -> None: ...
""",
    "a list of another type": """
@events.on_batch(Paid, group="g")
async def many(refunded: list[Refunded]) -> None: ...
""",
    "a list of one of two types": """
@events.on_batch(Paid, Refunded, group="g")
async def many(paid: list[Paid]) -> None: ...
""",
    "one Metadata for several events": """
@events.on_batch(Paid, group="g")
async def many(paid: list[Paid], meta: Metadata) -> None: ...
""",
    "a batch by something else": """
events.on_batch(Paid, group="g", by="topic")
""",
    "an order that there is not": """
events.on(Paid, group="g", order="partition")
""",
    "a handler of batches called with one event": """
@events.on_batch(Paid, group="g")
async def many(paid: list[Paid]) -> None: ...
async def main() -> None:
    await many(Paid(order="a"))
""",
}
_CHECKERS = {
    "mypy": (["mypy", "--config-file", "pyproject.toml"], ": error:"),
    # By itself it would look for an environment named .venv.
    "pyright": (["basedpyright", "--pythonpath", sys.executable, "--level", "error"], " - error: "),
}


@pytest.fixture(scope="module", params=sorted(_CHECKERS))
def findings(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The lines with errors, by case, of one run of a type checker over all of them."""
    directory = tmp_path_factory.mktemp("typing")
    cases = {"good": _GOOD, **_BAD}
    paths = {case: directory / f"case_{number}.py" for number, case in enumerate(cases)}
    for case, path in paths.items():
        path.write_text(_HEADER + cases[case])
    (name, *options), mark = _CHECKERS[request.param]
    command = [sys.executable, "-m", name, *options, *map(str, paths.values())]
    output = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False).stdout
    lines = [line for line in output.splitlines() if mark in line]
    return {case: [line for line in lines if path.name in line] for case, path in paths.items()}


def test_handlers_that_fit_type_check(findings: dict[str, list[str]]) -> None:
    """Functions and classes, of one event and of many, with metadata and services."""
    assert findings["good"] == []


def test_handlers_that_do_not_fit_are_errors(findings: dict[str, list[str]]) -> None:
    """Each of the mistakes."""
    assert [case for case in _BAD if not findings[case]] == []
