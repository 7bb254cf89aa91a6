"""Workers that die often: `python storm_process.py URL DIRECTORY` starts one for each line that it reads.

They are forks of a process that has imported everything, so that a hundred of them cost little; the process id of each
is printed. `DIRECTORY/lease-PID` names the lease of each worker, once it serves.
"""

import asyncio
import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from pydantic import SecretStr

from mainstay.core import App, Drain, FullJitter, MainstayError, Retry, given
from mainstay.database import Database, DatabaseModule, DatabaseSettings
from mainstay.workflow import (
    Done,
    Failed,
    Unknown,
    WorkflowEngine,
    WorkflowModule,
    WorkflowRouter,
    WorkflowSettings,
    current_step,
)

EXECUTING, UNRECORDED = 16, 16
flows = WorkflowRouter()
directory = Path()
books = sa.Table(
    "storm_books",
    sa.MetaData(),
    sa.Column("sale", sa.Integer, primary_key=True),
    sa.Column("cents", sa.Integer, nullable=False),
)


class Rejected(MainstayError):
    """The provider was too busy to do anything."""

    code = "EXT_STORM_REJECTED"
    status = 503
    title = "Storm rejected"
    no_effect = True


class Declined(Exception):
    """The provider will not do that."""


async def ask(**request: Any) -> dict[str, Any]:
    """Ask the provider."""
    port = int((directory / "port").read_text())
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(json.dumps(request).encode() + b"\n")
        line = await reader.readline()
    finally:
        writer.close()
    if not line:
        raise ConnectionResetError
    answer: dict[str, Any] = json.loads(line)
    if "rejected" in answer:
        raise Rejected(retry_after_seconds=answer["rejected"])
    if "declined" in answer:
        raise Declined
    if "error" in answer:
        raise OSError(answer["error"])
    return answer


async def effect(kind: str, cents: int = 0, *, declined: bool = False) -> int:
    """Have the provider do something, once for the key of the step."""
    answer = await ask(what="do", key=current_step().key, kind=kind, cents=cents, declined=declined)
    number: int | None = answer["number"]
    if number is None:
        msg = "it came after it had been undone"
        raise OSError(msg)
    return number


async def undo() -> None:
    """Have the provider undo what the step did, or forbid it if it comes yet."""
    await ask(what="undo", key=current_step().undoes)


_AGAIN = Retry(attempts=60, wait=FullJitter(0.005, 0.1))
_SECONDS = 0.5


@flows.step(retry=_AGAIN, timeout_seconds=_SECONDS, on_unknown="probe", one_call=True)
async def hold(n: int, item: str) -> int:
    """Hold an item."""
    return await effect(f"hold {item}")


@hold.probe
async def held(n: int, item: str) -> Done[int] | Failed | Unknown:
    """Ask whether it is held."""
    number = (await ask(what="find", key=current_step().key))["number"]
    return Failed("nothing is held") if number is None else Done(number)


@hold.compensation
async def release(outcome: Done[int] | Unknown, n: int, item: str) -> None:
    """Let it go."""
    await undo()


@flows.step(retry=_AGAIN, timeout_seconds=_SECONDS, one_call=True)
async def charge(n: int, cents: int) -> int:
    """Charge."""
    return await effect("charge", cents)


@charge.compensation
async def refund(outcome: Done[int] | Unknown, n: int, cents: int) -> None:
    """Give it back."""
    await undo()


@flows.step(transactional=True)
async def book(n: int, cents: int, *, db: Database = given(Database)) -> None:
    """Write down what was sold, in the service's own database."""
    await db.write(sa.insert(books), {"sale": n, "cents": cents})


@book.compensation
async def unbook(outcome: Done[None] | Unknown, n: int, cents: int, *, db: Database = given(Database)) -> None:
    """Strike it out."""
    await db.write(sa.delete(books).where(books.c.sale == n))


@flows.step(retry=_AGAIN, timeout_seconds=_SECONDS, one_call=True)
async def pack(n: int) -> int:
    """Pack it."""
    return await effect("pack")


@pack.compensation
async def unpack(outcome: Done[int] | Unknown, n: int) -> None:
    """Unpack it."""
    await undo()


@flows.step(retry=_AGAIN, timeout_seconds=_SECONDS, one_call=True, harmless=True, failed_on=(Declined,))
async def ship(n: int) -> int:
    """Ship it, if the provider does."""
    return await effect("ship", declined=fails(n))


@flows.workflow(name="packing")
async def packing(n: int) -> int:
    """A child."""
    return await pack(n)


def cents_of(n: int) -> int:
    """What a sale costs."""
    return 100 + n * 7_919 % 10_007


def fails(n: int) -> bool:
    """Whether a sale is declined at its end."""
    return n % 5 == 0


def packs(n: int) -> bool:
    """Whether a sale has a child."""
    return n % 3 == 0


@flows.workflow(name="sale")
async def sale(n: int) -> int:
    """A sale; what it came to in cents."""
    await flows.gather(hold(n, "seat"), hold(n, "meal"))
    await charge(n, cents_of(n))
    await book(n, cents_of(n))
    if packs(n):
        await packing(n)
    if n % 4 == 0:
        await flows.sleep(0.05)
    await ship(n)
    return cents_of(n)


def app_for(url: str) -> App:
    """The App of every process in these tests."""
    settings = WorkflowSettings(
        lease_seconds=1.0,
        poll_seconds=0.05,
        max_runs=60,
        max_executing=EXECUTING,
        max_unrecorded=UNRECORDED,
        max_attempts=1_000,
    )
    return App(
        DatabaseModule.for_root(DatabaseSettings(url=SecretStr(url), idle_transaction_seconds=2.0)),
        WorkflowModule.for_root(settings),
        WorkflowModule.for_feature(flows),
        drain_seconds=20.0,
    )


def work(url: str) -> None:
    """Be a worker, and say under which lease."""
    app = app_for(url)

    async def tell(drain: Drain) -> None:
        told = directory / f"lease-{os.getpid()}"
        while not drain.begun:
            identity = app.get(WorkflowEngine).worker.takes()
            if identity is not None:
                told.with_suffix(".new").write_text(identity.lease.name)
                told.with_suffix(".new").rename(told)
            await drain.pause(0.05)

    app.serve("tell", tell)
    app.run()


def nursery(url: str) -> None:
    """Start a worker for each line that comes in; it ends with its input."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the dead
    for _ in sys.stdin:
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            try:
                work(url)
            finally:
                os._exit(0)
        print(child, flush=True)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    directory = Path(sys.argv[2])
    nursery(sys.argv[1])
