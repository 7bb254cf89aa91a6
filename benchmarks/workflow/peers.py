"""DBOS, with the same three empty steps; runs in the peers' environment."""

import asyncio
import itertools
import sys
import time
from typing import Any

import pysqlite3  # DBOS needs a newer SQLite than many systems have
import pysqlite3.dbapi2

sys.modules["sqlite3"] = pysqlite3
sys.modules["sqlite3.dbapi2"] = pysqlite3.dbapi2

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


if __name__ == "__main__":
    serve({"runs": runs})
