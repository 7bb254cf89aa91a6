"""DBOS and absurd, with the same three empty steps; runs in the peers' environment."""

import asyncio
import itertools
import sys
import time
from typing import Any

import pysqlite3  # DBOS needs a newer SQLite than many systems have
import pysqlite3.dbapi2

sys.modules["sqlite3"] = pysqlite3
sys.modules["sqlite3.dbapi2"] = pysqlite3.dbapi2

import psycopg  # noqa: E402  after the newer SQLite is in place
from absurd_sdk import AsyncAbsurd  # noqa: E402  after the newer SQLite is in place
from absurdctl import BUNDLED_SCHEMA_SQL  # noqa: E402  after the newer SQLite is in place
from dbos import DBOS, DBOSConfig  # noqa: E402  after the newer SQLite is in place

from benchmarks.peer import serve  # noqa: E402  see above

_launched: list[str] = []


@DBOS.step()
async def first(n: int) -> int:
    return n + 1


@DBOS.step()
async def second(n: int) -> int:
    return n + 1


@DBOS.step()
async def third(n: int) -> int:
    return n + 1


@DBOS.workflow()
async def three(n: int) -> int:
    return int(await third(await second(await first(n))))


async def runs(url: str, at_once: int, count: int) -> float:
    if _launched != [url]:
        config: Any = DBOSConfig(name="bench", system_database_url=url, log_level="ERROR", application_version="v1")
        DBOS(config=config)
        DBOS.launch()
        _launched.append(url)
    numbers = itertools.count()

    async def caller() -> None:
        for n in numbers:
            if n >= count:
                return
            assert await three(n) == n + 3

    started = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(at_once)))
    return count / (time.perf_counter() - started)


# A client has one connection, on which its tasks take turns.
_CLIENTS = 8


async def absurd_runs(url: str, at_once: int, count: int) -> float:
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        known = await connection.execute("SELECT to_regnamespace('absurd')")
        if (await known.fetchone()) == (None,):
            await connection.execute(BUNDLED_SCHEMA_SQL)
        queue = f"bench{time.monotonic_ns()}"
        await connection.execute("SELECT absurd.create_queue(%s)", (queue,))
        clients = [AsyncAbsurd(url, queue_name=queue) for _ in range(min(_CLIENTS, at_once))]

        async def task(params: Any, ctx: Any) -> int:
            n = int(params)
            for name in ("first", "second", "third"):

                async def step(n: int = n) -> int:
                    return n + 1

                n = int(await ctx.step(name, step))
            return n

        for client in clients:
            client.register_task("three")(task)
        spawners = [AsyncAbsurd(url, queue_name=queue) for _ in clients]
        await spawners[0].spawn("three", 0, queue=queue)
        share = -(-at_once // len(clients))
        workers = [
            asyncio.create_task(client.start_worker(concurrency=share, poll_interval=0.005)) for client in clients
        ]
        await _completed(connection, queue, 1)
        started = time.perf_counter()
        numbers = itertools.count()
        if at_once == 1:
            for n in range(count):
                await spawners[0].spawn("three", n, queue=queue)
                await _completed(connection, queue, n + 2)
        else:

            async def spawn(client: AsyncAbsurd) -> None:
                for n in numbers:
                    if n >= count:
                        return
                    await client.spawn("three", n, queue=queue)

            await asyncio.gather(*(spawn(client) for client in spawners))
            await _completed(connection, queue, count + 1)
        seconds = time.perf_counter() - started
        for client in clients:
            client.stop_worker()
        await asyncio.gather(*workers)
        for client in (*clients, *spawners):
            await client.close()
    return count / seconds


async def _completed(connection: Any, queue: str, count: int) -> None:
    while True:
        found = await connection.execute(f"SELECT count(*) FROM absurd.t_{queue} WHERE state = 'completed'")  # noqa: S608  a name of ours
        if (await found.fetchone())[0] >= count:
            return
        await asyncio.sleep(0.002)


if __name__ == "__main__":
    serve({"runs": runs, "absurd_runs": absurd_runs})
