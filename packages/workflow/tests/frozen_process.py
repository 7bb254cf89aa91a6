"""A worker that freezes in the middle of a transaction: `python frozen_process.py URL DIRECTORY`.

Each of its runs notes that it is there. The first one then locks its own row, as a fenced write does until its commit,
and stops the whole process.
"""

import asyncio
import os
import signal
import sys
from pathlib import Path

import sqlalchemy as sa
from pydantic import SecretStr

from mainstay.core import App
from mainstay.database import Database, DatabaseModule, DatabaseSettings
from mainstay.workflow import WorkflowModule, WorkflowRouter, WorkflowSettings, current_step
from mainstay.workflow.tables import runs

flows = WorkflowRouter()
directory = Path()
RUNS = 13
freezes = False


@flows.step(harmless=True)
async def stay(n: int) -> int:
    """Say that it is here; in the process that freezes stay for ever, in another do no more."""
    (directory / f"at-{n}").touch()
    if not freezes:
        return n
    if n == 0:
        while len(list(directory.glob("at-*"))) < RUNS:  # noqa: ASYNC110  the other runs make it true
            await asyncio.sleep(0.01)
        async with app.get(Database).transaction() as session:
            await session.execute(
                sa.select(runs.c.id).where(runs.c.id == current_step().run_id).with_for_update(read=True)
            )
            (directory / "locked").touch()
            os.kill(os.getpid(), signal.SIGSTOP)
    await asyncio.sleep(3_600)
    return n


@flows.workflow(name="w")
async def w(n: int) -> int:
    """One step."""
    return await stay(n)


def app_for(url: str) -> App:
    """The App of both processes; the server's bound of idle transactions is too long to help."""
    return App(
        DatabaseModule.for_root(DatabaseSettings(url=SecretStr(url), idle_transaction_seconds=120.0)),
        WorkflowModule.for_root(WorkflowSettings(lease_seconds=1.0, poll_seconds=0.02)),
        WorkflowModule.for_feature(flows),
    )


if __name__ == "__main__":
    directory, freezes = Path(sys.argv[2]), True
    app = app_for(sys.argv[1])
    app.run()
