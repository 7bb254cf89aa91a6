"""A step that kills its worker, in real processes; run as a script, this file is such a worker."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import SecretStr

from mainstay.core import App
from mainstay.database import DatabaseModule, DatabaseSettings, upgrade
from mainstay.database.schema import SCHEMA as DATABASE
from mainstay.workflow import RunParked, WorkflowModule, WorkflowRouter, WorkflowSettings
from mainstay.workflow.tables import SCHEMA

_CLAIMS = 2
flows = WorkflowRouter()
ledger = Path()


@flows.step(harmless=True)
async def crash(n: int) -> int:
    """Note that it began, and end the process."""
    number = os.open(ledger, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(number, b"began\n")
    os._exit(9)


@flows.step(harmless=True)
async def work(n: int) -> int:
    """Do no harm."""
    return n


@flows.workflow(name="poison")
async def poison(n: int) -> int:
    """A step that succeeds, and one that never does."""
    return await crash(await work(n))


def _app(url: str) -> App:
    return App(
        DatabaseModule.for_root(DatabaseSettings(url=SecretStr(url))),
        WorkflowModule.for_root(WorkflowSettings(lease_seconds=0.5, poll_seconds=0.02, max_attempts=_CLAIMS)),
        WorkflowModule.for_feature(flows),
    )


@pytest.mark.parametrize("kind", ["file", "postgres"])
async def test_trap_9_a_step_that_kills_its_worker_is_parked(kind, request, tmp_path):
    """Each claim lets the step begin once more, which is no progress: after so many the run waits for a person."""
    url = f"sqlite+aiosqlite:///{tmp_path / 'test.db'}"
    if kind == "postgres":
        url = request.getfixturevalue("postgres")
        await upgrade(url, [DATABASE, SCHEMA])
    async with _app(url).running():
        run = await poison.start(1, id="poison")
    began = tmp_path / "ledger"
    for _ in range(_CLAIMS + 1):  # the first has one claim more, since `work` got the run further
        worker = await asyncio.to_thread(
            subprocess.run, [sys.executable, __file__, url, began], timeout=60, check=False, capture_output=True
        )
        assert worker.returncode == 9, worker.stderr.decode()[-2000:]
    app = _app(url)
    async with app.running(serve=True):
        run = poison.handle("poison")
        with pytest.raises(RunParked, match="its worker died each time"):
            await run.result(30)
    assert began.read_text().count("began") == _CLAIMS + 1


if __name__ == "__main__":
    ledger = Path(sys.argv[2])
    _app(sys.argv[1]).run()
