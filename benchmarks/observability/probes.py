"""Probes while the database hangs: 1,000 a second, each on a connection of its own, by turns of liveness and readiness.

The load comes from another process, and is open-loop: a probe's time runs from the moment at which it was due, so a
server that stands still is not asked less often. `python -m benchmarks.observability.probes PORT SECONDS` is that
process; it prints the slowest answer in milliseconds.
"""

import asyncio
import sys
import time
from typing import Any

from pydantic import SecretStr

from mainstay.core import App
from mainstay.core.testing import eventually
from mainstay.database import Database, DatabaseModule, DatabaseSettings, upgrade
from mainstay.database.schema import SCHEMA
from mainstay.observability import HealthWatch, ObservabilityModule, ObservabilitySettings, ProbeServer
from mainstay_servers import Postgres
from mainstay_servers.postgres import fresh_database

A_SECOND = 1_000
_PATHS = ("/health/live", "/health/ready")


async def slowest_answer(server: Postgres, seconds: float) -> float:
    """Return the milliseconds of the slowest of all answers in `seconds`, with a database that does not answer."""
    with fresh_database(server.url) as url:
        await upgrade(url, [SCHEMA])
        settings = ObservabilitySettings(service_name="orders", http_port=0, health_interval_seconds=0.5)
        app = App(
            ObservabilityModule.for_root(settings),
            DatabaseModule.for_root(DatabaseSettings(url=SecretStr(url))),
            health_seconds=1.0,
        )
        async with app:
            await asyncio.to_thread(server.pause)
            try:
                part = f"database.{Database.__name__}"

                def hangs() -> bool:
                    health = app.get(HealthWatch).latest.get(part)
                    return health is not None and health.status == "down"

                await eventually(hangs)
                return await _under_load(app.get(ProbeServer).port, seconds)
            finally:
                await asyncio.to_thread(server.resume)


async def _under_load(port: int | None, seconds: float) -> float:
    load = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.observability.probes", str(port), str(seconds)),
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await load.communicate()
    assert load.returncode == 0, "a probe was not answered with 200"
    return float(out)


async def _load(port: int, seconds: float) -> float:
    taken: list[float] = []
    count = int(A_SECOND * seconds)
    begin = time.perf_counter() + 0.1

    async def probe(number: int) -> None:
        due = begin + number / A_SECOND
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"GET {_PATHS[number % len(_PATHS)]} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
        answer = await reader.read()
        taken.append(time.perf_counter() - due)
        writer.close()
        assert answer.startswith(b"HTTP/1.1 200 "), answer

    # Some seconds' probes as tasks at once; each waits for its own moment.
    await asyncio.gather(*(probe(number) for number in range(count)))
    assert len(taken) == count
    return max(taken) * 1_000


def main(arguments: list[str]) -> Any:
    port, seconds = arguments
    print(asyncio.run(_load(int(port), float(seconds))))


if __name__ == "__main__":
    main(sys.argv[1:])
