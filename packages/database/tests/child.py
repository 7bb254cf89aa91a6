"""What the tests run in processes of its own, to kill and to stop them: `python child.py ROLE URL …`."""

import asyncio
import os
import sys
import time
from pathlib import Path

import sqlalchemy as sa

from mainstay.core import App
from mainstay.database import Database, DatabaseModule, DatabaseSettings, FenceLost
from mainstay.database.testing import database

notes = sa.Table(
    "notes", sa.MetaData(), sa.Column("id", sa.BigInteger), sa.Column("text", sa.Text), sa.Column("n", sa.Integer)
)
ADD = sa.insert(notes)


def say(*words: object) -> None:
    """Tell the parent; one write, so that a kill cannot tear it."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


async def write(url: str, first: int, tasks: int) -> None:
    """Write batches of three rows without end, and say the number of each that has been acknowledged."""
    async with database(url) as db:

        async def one(task: int) -> None:
            for i in range(1_000_000):
                number = first + (i * tasks + task) * 3
                await db.write(ADD, [{"id": number + j, "text": "x", "n": 0} for j in range(3)])
                say(number)

        await asyncio.gather(*(one(task) for task in range(tasks)))


async def units(url: str, first: int, rounds: int) -> None:
    """Read and write in units of work while others do."""
    async with database(url) as db:
        for i in range(rounds):
            async with db.transaction():
                await db.read(sa.select(sa.func.max(notes.c.id)))
                await db.write(ADD, {"id": first + i, "text": "unit", "n": 0})
            await db.write(ADD, {"id": first + rounds + i, "text": "alone", "n": 0})
        say("done")


async def hold(url: str, name: str, seconds: float) -> None:
    """Take a lease as soon as it is free, then say, whenever asked by a line, whether it is held and its fence good."""
    async with database(url) as db:
        lease = await db.lease(name, seconds=seconds)
        if lease is None:
            sys.exit("the lease was not free")
        say("epoch", lease.epoch)
        reader = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        while line := await reader.readline():
            held = lease.held
            try:
                await db.write(ADD, {"id": int(line), "text": "held", "n": lease.epoch}, fence=lease.fence)
            except FenceLost:
                say(held, "lost")
            else:
                say(held, "written")


async def stay(url: str, seconds: float) -> None:
    """Change a row in a unit of work, say so, and never come to its end; the server may end it after that time."""
    async with database(url, idle_transaction_seconds=seconds) as db, db.transaction():
        await db.write(sa.update(notes).where(notes.c.id == sa.bindparam("which")).values(text="held"), {"which": 1})
        say("holding")
        await asyncio.Event().wait()


async def start(url: str, at: float) -> None:
    """Start an App at the given moment and write a row."""
    from pydantic import SecretStr

    time.sleep(max(0.0, at - time.time()))  # noqa: ASYNC251  all processes at the same moment
    async with App(DatabaseModule.for_root(DatabaseSettings(url=SecretStr(url)))) as app:
        db = app.get(Database)
        lease = await db.lease(f"process {os.getpid()}")
        say("started", lease is not None)


if __name__ == "__main__":
    role, url, *rest = sys.argv[1:]
    numbers = [float(word) if "." in word else int(word) if word.isdigit() else word for word in rest]
    sys.path.insert(0, str(Path(__file__).parent))
    asyncio.run({"write": write, "units": units, "hold": hold, "stay": stay, "start": start}[role](url, *numbers))  # type: ignore[operator]  # roles differ in their arguments
