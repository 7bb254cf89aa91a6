"""A service of its own process, to be killed. Not a test."""

import asyncio
import os
import signal
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from pydantic import SecretStr

from mainstay.core import App
from mainstay.database import Database, DatabaseModule, DatabaseSettings, Lease
from mainstay.events import Event, EventRouter, EventsModule, EventsSettings, _outbox
from mainstay.events._aiokafka import producer
from mainstay.events._confluent import carrier as confluent_carrier
from mainstay.events._parking import Parking
from mainstay.events._schedule import ScheduleMover
from mainstay.events.metadata import Outgoing

EFFECTS = sa.Table(
    "effects",
    sa.MetaData(),
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("key", sa.Text),
    sa.Column("number", sa.Integer),
    sa.Column("pid", sa.Integer),
)


REPAIRED = "repaired"
"""The key of the effect after which what fails fails no longer."""


class Step(Event, type="fault.step", version="1.0", key="key"):
    key: str
    number: int


class Loose(Event, type="fault.loose", version="1.0"):
    key: str
    number: int


class Leap(Event, type="fault.leap", version="1.0", key="key"):
    key: str | None
    number: int


class LongStep(Event, type="fault.step", version="2.0", key="key"):
    key: str | None
    number: int
    metres: float


RELEASES: dict[str, tuple[type[Event], ...]] = {"old": (Step,), "new": (Step, LongStep, Leap)}
"""What the releases of the service handle."""


def service(options: dict[str, Any], *routers: EventRouter, **more: Any) -> App:
    topics = dict.fromkeys(("fault.step", "fault.loose", "fault.leap"), options["topic"])
    settings = EventsSettings(topics=topics, **{**options["events"], **more})
    modules: list[Any] = [EventsModule.for_root(settings), EventsModule.for_feature(*routers)]
    if options["url"]:
        database = DatabaseSettings(url=SecretStr(options["url"]), **options.get("database", {}))
        modules.insert(0, DatabaseModule.for_root(database))
    return App(*modules)


def batcher(options: dict[str, Any], app: list[App]) -> EventRouter:
    """What only writes, so that its effects are committed with those of others."""
    events = EventRouter()

    @events.on(Step, group=options["group"], inbox="batch")
    async def record(event: Step) -> None:
        row = {"key": event.key, "number": event.number, "pid": os.getpid()}
        await app[0].get(Database).write(sa.insert(EFFECTS), row)
        await asyncio.sleep(options.get("pause", 0.005))

    return events


def gatherer(options: dict[str, Any], app: list[App]) -> EventRouter:
    """Whose handler takes many events at once, and takes its time with each."""
    events = EventRouter()

    @events.on_batch(Step, group=options["group"], inbox=True, **options["together"], **options.get("on", {}))
    async def record(steps: list[Step]) -> None:
        async with app[0].get(Database).transaction() as session:
            for step in steps:
                if step.number == options.get("fails at"):
                    repaired = await session.execute(sa.select(EFFECTS.c.id).where(EFFECTS.c.key == REPAIRED))
                    if repaired.first() is None:
                        msg = "out of order"
                        raise RuntimeError(msg)
                row = {"key": step.key, "number": step.number, "pid": os.getpid()}
                await session.execute(sa.insert(EFFECTS).values(row))
                await asyncio.sleep(options.get("pause", 0.005))

    return events


def recorder(options: dict[str, Any], app: list[App]) -> EventRouter:
    if options.get("inbox") == "batch":
        return batcher(options, app)
    if "together" in options:
        return gatherer(options, app)
    events = EventRouter()

    @events.on(*RELEASES[options.get("release", "old")], group=options["group"], inbox=True, **options.get("on", {}))
    async def record(event: Step | LongStep | Leap) -> None:
        async with app[0].get(Database).transaction() as session:
            if event.number == options.get("fails at"):
                repaired = await session.execute(sa.select(EFFECTS.c.id).where(EFFECTS.c.key == REPAIRED))
                if repaired.first() is None:
                    msg = "out of order"
                    raise RuntimeError(msg)
            row = {"key": event.key, "number": event.number, "pid": os.getpid()}
            await session.execute(sa.insert(EFFECTS).values(row))
            await asyncio.sleep(options.get("pause", 0.005))

    return events


ENDS = "ends its process"
"""The key of what no process survives."""


def noting(options: dict[str, Any]) -> EventRouter:
    """Handlers that note each call in a file before anything else."""
    events = EventRouter()

    calls = Path(options["calls"]).open("a", buffering=1)  # noqa: SIM115  for as long as the process lives

    async def note(event: Step | Loose) -> None:
        calls.write(f"{event.key} {event.number}\n")
        if event.key == ENDS:
            os._exit(1)
        await asyncio.sleep(options["slow"] if event.key == "slow" else 0)

    if "together" in options:

        @events.on_batch(Step, group=options["group"], **options["together"], **options.get("on", {}))
        async def together(some: list[Step]) -> None:
            for event in some:
                await note(event)
    else:

        @events.on(Step, group=options["group"], **options.get("on", {}))
        async def keyed(event: Step) -> None:
            await note(event)

    @events.on(Loose, group=options["group"], **options.get("on", {}))
    async def keyless(event: Loose) -> None:
        await note(event)

    return events


async def main(options: dict[str, Any], told: Connection) -> None:
    if options.get("hang") == "after sending":

        async def never(*_arguments: object) -> None:
            told.send("sent")
            await asyncio.sleep(3600)

        # The moment between sending and deleting.
        _outbox.OutboxRows.delete = never  # type: ignore[method-assign, assignment]
    if options.get("hang") == "before sending":
        guarded = producer.Carrier._guarded

        async def frozen(self: producer.Carrier, node_id: int, request: Any, **more: Any) -> object:
            if hasattr(request, "required_acks"):
                told.send("handed over")
                os.kill(os.getpid(), signal.SIGSTOP)  # the client has the batch, and no byte of it is out
            return await guarded(self, node_id, request, **more)

        producer.Carrier._guarded = frozen  # type: ignore[method-assign]
        flush = confluent_carrier.Carrier._flush

        def frozen_as_well(self: confluent_carrier.Carrier, *more: Any) -> None:
            told.send("handed over")
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)  # this thread takes no further step
            flush(self, *more)

        confluent_carrier.Carrier._flush = frozen_as_well  # type: ignore[method-assign, assignment]  # the moment to stop at
    if options.get("hang") == "before parking":
        park = Parking.park

        async def late(*arguments: Any) -> None:
            told.send("parks")
            os.kill(os.getpid(), signal.SIGSTOP)
            try:
                await park(*arguments)
            except BaseException:  # refused, or told before that that the partition is lost
                told.send("refused")
                raise
            told.send("parked")

        Parking.park = late  # type: ignore[method-assign, assignment]  # the moment to stop at
    if options.get("hang") in {"before handing on", "handing on"}:
        move = ScheduleMover._move

        def stop() -> None:
            told.send("hands on")
            os.kill(os.getpid(), signal.SIGSTOP)

        async def hanging(self: ScheduleMover, lease: Lease) -> int:
            send = self._send

            async def send_and_stop(batch: Sequence[Outgoing]) -> None:
                await send(batch)
                stop()  # the page is out of the table and in the log, and not committed

            if options["hang"] == "handing on":
                self._send = send_and_stop
            else:
                stop()
            try:
                return await move(self, lease)
            except Exception:
                told.send("refused")
                raise

        ScheduleMover._move = hanging  # type: ignore[method-assign]  # the moment to stop at
    holder: list[App] = []
    routers = (
        [] if options.get("relay only") else [noting(options) if "calls" in options else recorder(options, holder)]
    )
    app = service(options, *routers)
    holder.append(app)
    async with app.running(serve=True):
        told.send("serving")
        await asyncio.sleep(3600)


def run(options: dict[str, Any], told: Connection) -> None:
    asyncio.run(main(options, told))
