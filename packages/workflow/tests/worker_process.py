"""A worker in a process of its own, to be killed, stopped and asked to end: `python worker_process.py URL DIRECTORY`.

Its steps write what they do to `DIRECTORY/ledger`, one line each, which is all that the outside world knows of them.
"""

import asyncio
import logging
import os
import sys
from pathlib import Path

from pydantic import SecretStr

from mainstay.core import App, Drain, FullJitter, Retry
from mainstay.database import DatabaseModule, DatabaseSettings
from mainstay.workflow import Done, Unknown, WorkflowModule, WorkflowRouter, WorkflowSettings, current_step

flows = WorkflowRouter()
directory = Path()


def note(*words: str) -> None:
    """Append a line that is there also if the process is killed right after."""
    ledger = os.open(directory / "ledger", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(ledger, (" ".join([*words, str(os.getpid())]) + "\n").encode())
    os.close(ledger)


async def do() -> None:
    """Take a little time before and after the effect, so that a kill hits either."""
    await asyncio.sleep(0.002)
    note("do", current_step().key)
    await asyncio.sleep(0.002)


@flows.step(retry=Retry(2, FullJitter(0.001)))
async def hold(n: int) -> int:
    """Hold."""
    await do()
    return n


@hold.compensation
async def release(outcome: Done[int] | Unknown, n: int) -> None:
    """Undo it."""
    note("undo", str(current_step().undoes))


@flows.step(retry=Retry(2, FullJitter(0.001)))
async def charge(n: int) -> int:
    """Charge."""
    await do()
    return n


@charge.compensation
async def refund(outcome: Done[int] | Unknown, n: int) -> None:
    """Undo it."""
    note("undo", str(current_step().undoes))


@flows.step(harmless=True, failed_on=(LookupError,))
async def ship(n: int) -> int:
    """Ship, if it can be."""
    if n % 3 == 0:
        raise LookupError(n)
    await do()
    return n


@flows.workflow(name="buy")
async def buy(n: int) -> int:
    """Buy."""
    await flows.gather(hold(n), hold(n + 1))
    return await ship(await charge(n))


@flows.step(harmless=True)
async def gate(name: str) -> str:
    """Say that it is here, and stay until the file `open` is there."""
    note("at", name)
    while not (directory / "open").exists():  # noqa: ASYNC110  another process opens it
        await asyncio.sleep(0.01)
    note("through", name)
    return name


@flows.workflow(name="gated")
async def gated(name: str) -> str:
    """Two gates."""
    await gate(f"{name}-1")
    return await gate(f"{name}-2")


def app_for(url: str) -> App:
    """The App of every process in these tests."""
    return App(
        DatabaseModule.for_root(DatabaseSettings(url=SecretStr(url))),
        WorkflowModule.for_root(
            WorkflowSettings(lease_seconds=1.0, poll_seconds=0.02, max_executing=8, max_unrecorded=8, max_attempts=50)
        ),
        WorkflowModule.for_feature(flows),
        drain_seconds=10.0,
    )


async def tell(drain: Drain) -> None:
    """Note that the process serves, and that it was told to stop: a signal that was sent has not arrived yet."""
    (directory / f"serves-{os.getpid()}").touch()
    await drain.wait()
    (directory / "told").touch()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    directory = Path(sys.argv[2])
    app = app_for(sys.argv[1])
    app.serve("tell", tell)
    app.run()
