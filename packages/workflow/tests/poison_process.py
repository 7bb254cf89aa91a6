"""A worker with a step that ends its process: `python poison_process.py URL DIRECTORY`.

A line of `DIRECTORY/ledger` says that the step began.
"""

import asyncio
import os
import sys
from pathlib import Path

from pydantic import SecretStr

from mainstay.core import App
from mainstay.database import DatabaseModule, DatabaseSettings
from mainstay.workflow import WorkflowModule, WorkflowRouter, WorkflowSettings

CLAIMS = 2
SLOW_SECONDS = 1.0
flows = WorkflowRouter()
directory = Path()


def note(word: str) -> None:
    """Append a word that is there also when the process ends right after."""
    number = os.open(directory / "ledger", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(number, f"{word}\n".encode())
    os.close(number)


@flows.step(harmless=True)
async def crash(n: int) -> int:
    """Note that it began, and end the process as soon as everything else that was claimed with it has begun."""
    note("crash")
    await asyncio.sleep(0.1)
    os._exit(9)


@flows.step(harmless=True)
async def work(n: int) -> int:
    """Do no harm."""
    return n


@flows.step(harmless=True)
async def slowly(n: int) -> int:
    """Do no harm, and take longer than a worker lives beside the other."""
    await asyncio.sleep(SLOW_SECONDS)
    return n


@flows.workflow(name="poison")
async def poison(n: int) -> int:
    """A step that succeeds, and one that never does."""
    return await crash(await work(n))


@flows.workflow(name="venom")
async def venom(n: int) -> int:
    """A step that never succeeds."""
    return await crash(n)


@flows.workflow(name="slow")
async def slow(n: int) -> int:
    """A step that succeeds late."""
    return await slowly(n)


def app_for(url: str) -> App:
    """The App of every process in these tests."""
    return App(
        DatabaseModule.for_root(DatabaseSettings(url=SecretStr(url))),
        WorkflowModule.for_root(WorkflowSettings(lease_seconds=0.5, poll_seconds=0.02, max_attempts=CLAIMS)),
        WorkflowModule.for_feature(flows),
    )


if __name__ == "__main__":
    directory = Path(sys.argv[2])
    app_for(sys.argv[1]).run()
