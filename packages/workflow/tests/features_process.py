"""A worker of sagas that ask people, have children, publish values and live for several generations; to be killed.

`python features_process.py URL DIRECTORY`; `DIRECTORY/ledger` is the other side, which honours keys.
"""

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from mainstay.core import App, FullJitter, Retry
from mainstay.database import DatabaseModule, DatabaseSettings
from mainstay.workflow import Done, Unknown, WorkflowModule, WorkflowRouter, WorkflowSettings, current_step

flows = WorkflowRouter()
directory = Path()
QUICK = Retry(attempts=3, wait=FullJitter(0.01, 0.05))


def write(what: str, key: str | None) -> None:
    """A line that outlives the process: the other side has done, or undone, what the key names."""
    line = os.open(directory / "ledger", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        os.write(line, f"{what} {key}\n".encode())
    finally:
        os.close(line)


def effect(name: str) -> Any:
    """A step that does something elsewhere, and can undo it."""

    async def act(n: int) -> int:
        await asyncio.sleep(0.005)
        write("do", current_step().key)
        return n

    async def undo(outcome: Done[int] | Unknown, n: int) -> None:
        write("undo", current_step().undoes)

    act.__name__ = act.__qualname__ = name
    undo.__name__ = undo.__qualname__ = f"undo_{name}"
    step = flows.step(retry=QUICK)(act)
    step.compensation(undo)
    return step


charge, reserve = effect("charge"), effect("reserve")
stage = flows.value("stage", str)


@flows.step(harmless=True)
async def tell(n: int) -> None:
    """Tell somebody else."""


approve = flows.approval("approve", int, may_decide=lambda _asked, _actor: True, on_escalation=tell)


@flows.step(harmless=True, retry=Retry(attempts=1), exhausted="park")
async def ship(n: int) -> int:
    """Ship, as soon as there is a carrier."""
    if n % 6 == 1 and not (directory / "carrier").exists():
        raise OSError
    return n


@flows.workflow(name="pack")
async def pack(n: int) -> int:
    """A child."""
    return int(await reserve(n))


@flows.workflow(name="order")
async def order(n: int, left: int) -> int:
    """Charge, ask, pack, ship; and begin again."""
    await charge(n)
    await stage.set(f"asks {left}")
    decision = await approve.ask(n, escalate_after_seconds=0.05 if n % 3 == 0 else None, timeout_seconds=600)
    if not decision.approved:
        raise LookupError(n)
    await pack(n)
    await ship(n)
    if left:
        await order.continue_with(n, left - 1)
    return n


async def main(url: str) -> None:
    """Serve until killed."""
    app = App(
        DatabaseModule.for_root(DatabaseSettings(url=SecretStr(url))),
        WorkflowModule.for_root(WorkflowSettings(lease_seconds=1.0, poll_seconds=0.05, max_attempts=1_000)),
        WorkflowModule.for_feature(flows),
    )
    async with app.running(serve=True):
        await asyncio.Event().wait()


if __name__ == "__main__":
    directory = Path(sys.argv[2])
    asyncio.run(main(sys.argv[1]))
