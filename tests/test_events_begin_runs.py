"""Handlers with an inbox start runs and send them signals: once for each event, whatever is killed on the way."""

import importlib.util
import json
import subprocess
import sys
import uuid
from pathlib import Path
from types import ModuleType

import pytest
import sqlalchemy as sa

from mainstay.core import bind
from mainstay.core.testing import eventually
from mainstay.database import Database
from mainstay.database.schema import installed, upgrade

SCRIPT = Path(__file__).with_name("join_process.py")
WAIT = 120.0
ORDERS = 40
NUMBERS = [f"{n:02}" for n in range(ORDERS)]

ENDED = sa.text("SELECT count(*) FROM mainstay_workflow_runs WHERE status = 'completed'")
RUNS = sa.text("SELECT input, context FROM mainstay_workflow_runs ORDER BY input")
SIGNALS = sa.text("SELECT count(*) FROM mainstay_workflow_signals")


def _service() -> ModuleType:
    spec = importlib.util.spec_from_file_location("join_process", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["join_process"] = module  # annotations are looked up there
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("engine", "kills"), [("embedded", 6), ("kafka and postgres", 2)])
async def test_each_event_begins_one_run_and_sends_one_signal(
    engine: str, kills: int, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And each run publishes one event: nothing of it is lost or doubled, and all of it is one conversation."""
    topic = f"join-{uuid.uuid4().hex[:8]}"
    settings = {
        "JOIN_GROUP": topic,
        "MAINSTAY_EVENTS_LEASE_SECONDS": "1",
        "MAINSTAY_WORKFLOW_LEASE_SECONDS": "1",
        "MAINSTAY_DATABASE_URL": f"sqlite+aiosqlite:///{tmp_path}/join.db",
    }
    if engine != "embedded":
        settings["MAINSTAY_DATABASE_URL"] = request.getfixturevalue("postgres")
        settings["MAINSTAY_EVENTS_TRANSPORT"] = "kafka"
        settings["MAINSTAY_EVENTS_SOURCE"] = "join"
        settings["MAINSTAY_EVENTS_KAFKA_SERVERS"] = request.getfixturevalue("kafka")
    settings["MAINSTAY_EVENTS_TOPICS"] = json.dumps(dict.fromkeys(("join.placed", "join.packed", "join.done"), topic))
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    service = _service()

    await upgrade(settings["MAINSTAY_DATABASE_URL"], installed())
    async with service.service() as app:
        database = app.get(Database)
        async with database.transaction() as session:
            await (await session.connection()).run_sync(service.LEDGER.metadata.create_all)
        with bind(correlation_id="one-conversation", actor="ann"):
            for number in NUMBERS:
                await service.events.publish(service.OrderPlaced(order_id=number))
                await service.events.publish(service.OrderPacked(order_id=number))

        async def ended() -> int:
            return int((await database.read(ENDED))[0][0])

        async def told() -> bool:
            return len(await database.read(sa.select(service.LEDGER.c.id))) >= ORDERS

        process = subprocess.Popen([sys.executable, str(SCRIPT)])  # noqa: ASYNC220  it takes no time
        try:
            for _ in range(kills):
                before = await ended()

                async def further(before: int = before) -> bool:
                    return await ended() > before or before == ORDERS

                await eventually(further, seconds=WAIT)
                process.kill()
                process.wait()
                process = subprocess.Popen([sys.executable, str(SCRIPT)])  # noqa: ASYNC220  it takes no time
            await eventually(told, seconds=WAIT)
            assert await ended() == ORDERS
        finally:
            process.kill()
            process.wait()

        runs = await database.read(RUNS)
        assert [json.loads(run.input)["order_id"] for run in runs] == NUMBERS
        contexts = [json.loads(run.context) for run in runs]
        assert {(context["correlation_id"], context["actor"]) for context in contexts} == {("one-conversation", "ann")}
        assert (await database.read(SIGNALS))[0][0] == ORDERS
        ledger = await database.read(sa.select(service.LEDGER.c.order_id).order_by(service.LEDGER.c.order_id))
        assert [row.order_id for row in ledger] == NUMBERS
