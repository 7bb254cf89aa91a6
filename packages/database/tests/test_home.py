"""Another event loop, another thread, a forked child: an error at once, and no harm to the owner's connections."""

import asyncio
import os
import threading
import traceback
from contextlib import asynccontextmanager

import pytest
import sqlalchemy as sa

from mainstay.core import App
from mainstay.database import Database, DatabaseModule, DatabaseSettings, WrongEventLoop


def ways(db, tables):
    """Every way to the database, as functions of no arguments."""

    async def unit() -> None:
        async with db.transaction():
            pass

    async def batch() -> None:
        async with db.batch():
            await db.write(tables.add, {"id": 1, "text": "x"})

    async def engine() -> None:
        async with db.engine.connect() as connection:
            await connection.execute(sa.select(1))

    return {
        "write": lambda: db.write(tables.add, {"id": 1, "text": "x"}),
        "read": lambda: db.read(sa.select(1)),
        "unit": unit,
        "batch": batch,
        "engine": engine,
        "lease": lambda: db.lease("x"),
        "health": db.health,
    }


def refusals(db, tables) -> dict[str, str]:
    """Try each way on an event loop of its own; what each says."""
    said: dict[str, str] = {}
    for name, call in ways(db, tables).items():

        async def bounded(call=call):
            async with asyncio.timeout(30):
                await call()

        try:
            asyncio.run(bounded())
            said[name] = "nothing"
        except WrongEventLoop as error:
            said[name] = str(error)
        except BaseException as error:  # noqa: BLE001  the test tells them apart
            said[name] = f"{type(error).__name__}: {error}"
    return said


async def test_another_loop_is_refused_at_once(db, tables, count):
    """A thread with an event loop of its own gets an error that names the remedy; here all goes on."""
    for name, text in (await asyncio.to_thread(refusals, db, tables)).items():
        assert "started on another event loop" in text, name
        assert "run_coroutine_threadsafe" in text, name
    await db.write(tables.add, {"id": 1, "text": "x"})
    assert await count(db) == 1


async def test_the_remedy_for_a_thread_works(db, tables, count):
    """Work that is handed to the database's own loop is done there."""
    loop = asyncio.get_running_loop()

    def hand_over() -> None:
        asyncio.run_coroutine_threadsafe(db.write(tables.add, {"id": 1, "text": "x"}), loop).result(30)

    await asyncio.to_thread(hand_over)
    assert await count(db) == 1


def test_a_loop_after_the_first_is_refused(tmp_path, tables):
    """A database that one asyncio.run started and another uses, as fixtures and tests on two loops do."""
    app = App(DatabaseModule.for_root(DatabaseSettings(url=f"sqlite:///{tmp_path / 'x.db'}")))
    with asyncio.Runner() as first:
        first.run(app.__aenter__())
        db = app.get(Database)
        said: dict[str, str] = {}
        thread = threading.Thread(target=lambda: said.update(refusals(db, tables)))
        thread.start()
        thread.join(60)
        first.run(app.__aexit__(None, None, None))
    assert said
    assert all("started on another event loop" in text for text in said.values()), said


@asynccontextmanager
async def forked(work):
    """A forked child that does the work and tells what it returns; its exit status is 0 then."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, repr(work()).encode())
            os._exit(0)
        except BaseException:  # noqa: BLE001  nothing of the child may come back into pytest
            traceback.print_exc()
            os._exit(1)
    os.close(writing)
    try:
        _, status = await asyncio.to_thread(os.waitpid, child, 0)
        text = await asyncio.to_thread(os.read, reading, 100_000)
        yield status, text.decode()
    finally:
        os.close(reading)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
async def test_a_forked_child_is_refused_and_harms_nothing(db, tables, count):
    """The child is told to start an App of its own; what it leaves behind closes none of the parent's connections."""
    backend = sa.select(sa.func.pg_backend_pid()) if db.dialect == "postgresql" else sa.select(1)
    await db.write(tables.add, {"id": 1, "text": "x"})
    async with db.engine.connect() as connection:
        before = (await connection.execute(backend)).scalar_one()

        def child() -> dict[str, str]:
            asyncio._set_running_loop(None)  # a child of `os.fork` inside a coroutine believes that the loop goes on
            return refusals(db, tables)

        async with forked(child) as (status, text):
            assert status == 0
            for refusal in eval(text).values():  # noqa: S307  the text of our own child
                assert "before the process was forked" in refusal
        assert (await connection.execute(backend)).scalar_one() == before
    async with db.transaction():
        await db.write(tables.add, {"id": 2, "text": "x"})
    await db.write(tables.add, {"id": 3, "text": "x"})
    assert await count(db) == 3
