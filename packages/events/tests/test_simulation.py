"""The simulator finds each of a set of wrong handlers, and nothing in right ones; a seed is a run."""

from __future__ import annotations

import asyncio
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import pytest
import sqlalchemy as sa

from mainstay.core import Retry, given
from mainstay.database import Database
from mainstay.events import DecodeError, Event, EventRouter, Metadata, RetryLater
from mainstay.events.testing import OrderError, Simulation, SimulationFailedError, simulate
from mainstay.events.testing._broker import _Carrier
from mainstay.events.testing._plan import Fault, Plan, calm, plan_of
from mainstay.events.testing._processes import AT_SEND
from mainstay.events.testing._simulation import Trials

METADATA = sa.MetaData()
COUNTS = sa.Table(
    "counts", METADATA, sa.Column("name", sa.Text, primary_key=True), sa.Column("value", sa.Integer, nullable=False)
)
SEEN = sa.Table("seen", METADATA, sa.Column("id", sa.Text, primary_key=True))
ADD = sa.update(COUNTS).where(COUNTS.c.name == sa.bindparam("of")).values(value=COUNTS.c.value + 1)
SET = sa.update(COUNTS).where(COUNTS.c.name == sa.bindparam("of")).values(value=sa.bindparam("to"))
START = sa.insert(COUNTS)
NOTE = sa.insert(SEEN)
NOTED = sa.select(SEEN.c.id).where(SEEN.c.id == sa.bindparam("of"))
VALUE = sa.select(COUNTS.c.value).where(COUNTS.c.name == sa.bindparam("of"))


class Sold(Event, type="ticket.sold", version="1.0", key="ticket"):
    ticket: str
    number: int


class Mailed(Event, type="mail.sent", version="1.0", key="ticket"):
    ticket: str
    number: int


class Provider:
    """The service of a third party, which takes its time, and knows the keys of its callers."""

    def __init__(self) -> None:
        self.done: Counter[str] = Counter()
        self._keys: set[str] = set()

    async def charge(self, what: str, *, key: str | None = None) -> None:
        await asyncio.sleep(0.01)
        if key is None or key not in self._keys:
            self.done[what] += 1
        if key is not None:
            self._keys.add(key)
        await asyncio.sleep(0.01)


class Counting(Simulation):
    """Tickets that are sold are counted, each once."""

    tables: ClassVar = METADATA

    def __init__(self) -> None:
        self.provider = Provider()

    def events(self) -> Sequence[Event]:
        return [Sold(ticket=ticket, number=number) for number in range(2) for ticket in ("a", "b")]

    async def start(self, db: Database) -> None:
        await db.write(START, [{"name": name, "value": 0} for name in ("sold", "charged", "mailed")])

    async def check(self, db: Database, events: Sequence[Event]) -> None:
        assert await value(db, "sold") == len(events)


class Charging(Counting):
    """Each ticket is charged once, by a third party."""

    async def check(self, db: Database, events: Sequence[Event]) -> None:
        assert self.provider.done == Counter(name_of(event) for event in events)


def name_of(event: Event) -> str:
    assert isinstance(event, Sold)
    return f"{event.ticket}{event.number}"


async def value(db: Database, name: str) -> int:
    (row,) = await db.read(VALUE, {"of": name})
    return int(row.value)


# What is right


class CountsInTheInbox(Counting):
    def feature(self) -> EventRouter:
        events = EventRouter()

        @events.on(Sold, group="counts", inbox=True)
        async def count(event: Sold, *, db: Database = given(Database)) -> None:
            await db.write(ADD, {"of": "sold"})

        return events


class CountsInBatches(Counting):
    def feature(self) -> EventRouter:
        events = EventRouter()

        @events.on(Sold, group="counts", inbox="batch")
        async def count(event: Sold, *, db: Database = given(Database)) -> None:
            await db.write(ADD, {"of": "sold"})

        return events


class CountsManyAtOnce(Counting):
    """Two of a batch are of one key, and one of them fails at first where both are."""

    def feature(self) -> EventRouter:
        events = EventRouter()

        @events.on_batch(Sold, group="counts", size=3, wait_seconds=0.5, inbox=True, retry=Retry(attempts=10))
        async def count(sold: list[Sold], *, db: Database = given(Database)) -> None:
            if len(sold) > 1 and any(event.ticket == "b" for event in sold):
                msg = "alone or not at all"
                raise RuntimeError(msg)
            for _event in sold:
                await db.write(ADD, {"of": "sold"})

        return events


class CountsInNoOrder(Counting):
    """What was published first is tried again while the others are counted."""

    def feature(self) -> EventRouter:
        events = EventRouter()

        @events.on(Sold, group="counts", inbox=True, order="none")
        async def count(event: Sold, meta: Metadata, *, db: Database = given(Database)) -> None:
            if event.number == 0 and meta.attempt == 1:
                msg = "not yet"
                raise RuntimeError(msg)
            await db.write(ADD, {"of": "sold"})

        return events


class CountsSomeLater(Counting):
    """What was published first is set aside, and the others are counted."""

    def feature(self) -> EventRouter:
        events = EventRouter()
        later = RetryLater(delays_seconds=[1.0] * 20)

        @events.on(Sold, group="counts", inbox=True, on_failure=later, retry=Retry(attempts=1))
        async def count(event: Sold, meta: Metadata, *, db: Database = given(Database)) -> None:
            if event.number == 0 and meta.attempt == 1:
                msg = "not yet"
                raise RuntimeError(msg)
            await db.write(ADD, {"of": "sold"})

        return events


class SkipsWhatFails(Counting):
    """What is skipped where nothing goes wrong may be skipped, and nothing else."""

    def feature(self) -> EventRouter:
        events = EventRouter()

        @events.on(Sold, group="counts", inbox=True, on_failure="skip", retry=Retry(attempts=20))
        async def count(event: Sold, *, db: Database = given(Database)) -> None:
            if name_of(event) == "a0":
                msg = "no such ticket"
                raise DecodeError(msg)
            await db.write(ADD, {"of": "sold"})

        return events

    async def check(self, db: Database, events: Sequence[Event]) -> None:
        assert await value(db, "sold") == sum(name_of(event) != "a0" for event in events)


class NotesInItsTransaction(Counting):
    def feature(self) -> EventRouter:
        events = EventRouter()

        @events.on(Sold, group="counts", timeout_seconds=5)
        async def count(event: Sold, meta: Metadata, *, db: Database = given(Database)) -> None:
            async with db.transaction():
                if not await db.read(NOTED, {"of": meta.id}):
                    await db.write(NOTE, {"id": meta.id})
                    await db.write(ADD, {"of": "sold"})

        return events


class ChargesByTheEventsId(Charging):
    def feature(self) -> EventRouter:
        events = EventRouter()

        @events.on(Sold, group="charges", timeout_seconds=5)
        async def charge(event: Sold, meta: Metadata) -> None:
            await self.provider.charge(name_of(event), key=meta.id)

        return events


class PublishesInItsTransaction(Counting):
    """What one handler publishes, another counts."""

    def feature(self) -> EventRouter:
        events = EventRouter()

        @events.on(Sold, group="mails", inbox=True)
        async def mail(event: Sold, *, db: Database = given(Database)) -> None:
            await events.publish(Mailed(ticket=event.ticket, number=event.number))
            await db.write(ADD, {"of": "sold"})

        @events.on(Mailed, group="counts", inbox="batch")
        async def count(event: Mailed, *, db: Database = given(Database)) -> None:
            await db.write(ADD, {"of": "mailed"})

        return events

    async def check(self, db: Database, events: Sequence[Event]) -> None:
        assert await value(db, "sold") == await value(db, "mailed") == len(events)


class FailsAtFirst(CountsInTheInbox):
    """One event fails twice, and another for good, with any faults besides."""

    def feature(self) -> EventRouter:
        events = EventRouter()

        @events.on(Sold, group="counts", inbox=True, retry=Retry(attempts=40))
        async def count(event: Sold, meta: Metadata, *, db: Database = given(Database)) -> None:
            await db.write(ADD, {"of": "sold"})
            if name_of(event) == "a1" and meta.attempt < 3:
                msg = "not yet"
                raise RuntimeError(msg)

        @events.on(Sold, group="parks", on_failure="park", retry=Retry(attempts=2))
        async def park(event: Sold) -> None:
            if event.ticket == "b":
                msg = "never"
                raise ValueError(msg)

        return events


RIGHT = [
    CountsInTheInbox,
    CountsInBatches,
    CountsManyAtOnce,
    CountsInNoOrder,
    CountsSomeLater,
    SkipsWhatFails,
    NotesInItsTransaction,
    ChargesByTheEventsId,
    PublishesInItsTransaction,
    FailsAtFirst,
]


# What is wrong


class CountsWithoutInbox(Counting):
    """At least once is more than once."""

    def feature(self) -> EventRouter:
        events = EventRouter()

        @events.on(Sold, group="counts")
        async def count(event: Sold, *, db: Database = given(Database)) -> None:
            await db.write(ADD, {"of": "sold"})

        return events


class CountsManyAsOne(Counting):
    """What is right for a batch of one: never seen where a simulation hands over one event at a time."""

    def feature(self) -> EventRouter:
        events = EventRouter()

        @events.on_batch(Sold, group="counts", size=3, wait_seconds=0.5, inbox=True)
        async def count(_sold: list[Sold], *, db: Database = given(Database)) -> None:
            await db.write(ADD, {"of": "sold"})

        return events


class ChargesInsideTheInbox(Charging):
    """The inbox covers what is written to the database, and no one else."""

    def feature(self) -> EventRouter:
        events = EventRouter()

        @events.on(Sold, group="charges", inbox=True)
        async def charge(event: Sold, *, db: Database = given(Database)) -> None:
            await self.provider.charge(name_of(event))
            await db.write(ADD, {"of": "charged"})

        return events


class RemembersInMemory(Counting):
    """A restart forgets."""

    def feature(self) -> EventRouter:
        events = EventRouter()
        seen: set[str] = set()

        @events.on(Sold, group="counts")
        async def count(event: Sold, meta: Metadata, *, db: Database = given(Database)) -> None:
            if meta.id not in seen:
                await db.write(ADD, {"of": "sold"})
                seen.add(meta.id)

        return events


class ChecksThenActs(Counting):
    """Note and effect are two commits."""

    def feature(self) -> EventRouter:
        events = EventRouter()

        @events.on(Sold, group="counts")
        async def count(event: Sold, meta: Metadata, *, db: Database = given(Database)) -> None:
            if not await db.read(NOTED, {"of": meta.id}):
                await db.write(ADD, {"of": "sold"})
                await db.write(NOTE, {"id": meta.id})

        return events


class NotesFirst(Counting):
    """The same the other way round: what is noted is not always done."""

    def feature(self) -> EventRouter:
        events = EventRouter()

        @events.on(Sold, group="counts")
        async def count(event: Sold, meta: Metadata, *, db: Database = given(Database)) -> None:
            if not await db.read(NOTED, {"of": meta.id}):
                await db.write(NOTE, {"id": meta.id})
                await db.write(ADD, {"of": "sold"})

        return events


class SwallowsErrors(Counting):
    """Half of the effect is there, and no error says so."""

    def feature(self) -> EventRouter:
        events = EventRouter()

        @events.on(Sold, group="counts")
        async def count(event: Sold, meta: Metadata, *, db: Database = given(Database)) -> None:
            try:
                async with db.transaction():
                    if not await db.read(NOTED, {"of": meta.id}):
                        await db.write(NOTE, {"id": meta.id})
                        await db.write(ADD, {"of": "sold"})
            except Exception:  # noqa: BLE001  it is what is wrong
                return

        return events


class AssumesOrderAcrossKeys(Counting):
    """Only equal keys are in order."""

    def feature(self) -> EventRouter:
        events = EventRouter()

        @events.on(Sold, group="counts", inbox=True)
        async def count(event: Sold, *, db: Database = given(Database)) -> None:
            if event.ticket == "a":
                await db.write(NOTE, {"id": str(event.number)})
            elif await db.read(NOTED, {"of": str(event.number)}):
                await db.write(ADD, {"of": "sold"})

        return events

    async def check(self, db: Database, events: Sequence[Event]) -> None:
        assert await value(db, "sold") == sum(isinstance(event, Sold) and event.ticket == "b" for event in events)


class PublishesOutsideOfATransaction(PublishesInItsTransaction):
    """The event tells of what may not be."""

    def feature(self) -> EventRouter:
        events = EventRouter()

        @events.on(Sold, group="mails")
        async def mail(event: Sold, meta: Metadata, *, db: Database = given(Database)) -> None:
            if not await db.read(NOTED, {"of": meta.id}):
                await events.publish(Mailed(ticket=event.ticket, number=event.number))
                async with db.transaction():
                    await db.write(NOTE, {"id": meta.id})
                    await db.write(ADD, {"of": "sold"})

        @events.on(Mailed, group="counts", inbox="batch")
        async def count(event: Mailed, *, db: Database = given(Database)) -> None:
            await db.write(ADD, {"of": "mailed"})

        return events


class KeepsItsStateInMemory(Counting):
    """What a process counts is gone with it."""

    def feature(self) -> EventRouter:
        events = EventRouter()
        counted: Counter[str] = Counter()

        @events.on(Sold, group="counts", inbox=True)
        async def count(event: Sold, *, db: Database = given(Database)) -> None:
            counted["sold"] += 1
            await db.write(SET, {"of": "sold", "to": counted["sold"]})

        return events


class ReadsThenWrites(Counting):
    """Two handlers read the same value."""

    def feature(self) -> EventRouter:
        events = EventRouter()

        @events.on(Sold, group="counts", inbox="batch")
        async def count(event: Sold, *, db: Database = given(Database)) -> None:
            before = await value(db, "sold")
            await db.write(SET, {"of": "sold", "to": before + 1})

        return events


class CatchesCancellation(Charging):
    """A call that took too long counts as done."""

    def feature(self) -> EventRouter:
        events = EventRouter()

        @events.on(Sold, group="charges", timeout_seconds=2)
        async def charge(event: Sold, meta: Metadata) -> None:
            try:
                await self.provider.charge(name_of(event), key=meta.id)
            except asyncio.CancelledError:
                return

        return events


class MakesAKeyOfTheAttempt(Charging):
    """The provider takes each attempt for another charge."""

    def feature(self) -> EventRouter:
        events = EventRouter()

        @events.on(Sold, group="charges")
        async def charge(event: Sold, meta: Metadata) -> None:
            await self.provider.charge(name_of(event), key=f"{meta.id}:{meta.attempt}")

        return events


class DoesNotWait(Counting):
    """The event is done before its effect is."""

    def feature(self) -> EventRouter:
        events = EventRouter()
        tasks: set[asyncio.Task[None]] = set()

        @events.on(Sold, group="counts")
        async def count(event: Sold, meta: Metadata, *, db: Database = given(Database)) -> None:
            async def later() -> None:
                async with db.transaction():
                    if not await db.read(NOTED, {"of": meta.id}):
                        await db.write(NOTE, {"id": meta.id})
                        await db.write(ADD, {"of": "sold"})

            tasks.add(asyncio.get_running_loop().create_task(later()))

        return events


WRONG = [
    CountsWithoutInbox,
    CountsManyAsOne,
    ChargesInsideTheInbox,
    RemembersInMemory,
    ChecksThenActs,
    NotesFirst,
    SwallowsErrors,
    AssumesOrderAcrossKeys,
    PublishesOutsideOfATransaction,
    KeepsItsStateInMemory,
    ReadsThenWrites,
    CatchesCancellation,
    MakesAKeyOfTheAttempt,
    DoesNotWait,
]


@pytest.mark.parametrize("kind", RIGHT)
def test_a_right_handler_is_right_in_every_run(kind: type[Simulation]):
    """No run of a right handler fails: nothing is lost, doubled or out of order, and there is no false alarm."""
    assert simulate(kind, seeds=range(5, 13)) == 9


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_handler_is_found(kind: type[Simulation]):
    """Within some dozens of seeds, and what is printed repeats the smallest run that was found."""
    with pytest.raises(SimulationFailedError, match=kind.__name__) as failed:
        simulate(kind, seeds=range(100))
    with pytest.raises(SimulationFailedError) as again:
        simulate(kind, seeds=[failed.value.seed])
    assert again.value.story == failed.value.story
    assert again.value.seed == failed.value.seed


def stories(seeds: Sequence[int], place: Path) -> list[str]:
    """All that happens in some runs of a right handler."""
    place.mkdir()
    trials = Trials(PublishesInItsTransaction, place)
    first = trials.run(calm(trials.events))
    return [line for seed in seeds for line in trials.run(plan_of(seed, first.moments, trials.events)).story]


def test_a_seed_is_the_same_run_in_another_process(tmp_path: Path):
    """The same story to the last line, also where hashes differ."""
    here = stories(range(5, 8), tmp_path / "here")
    code = (
        "import sys, pathlib; from test_simulation import stories\n"
        "print(*stories(range(5, 8), pathlib.Path(sys.argv[1])), sep='\\n')"
    )
    for hashes in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hashes}
        command = [sys.executable, "-c", code, str(tmp_path / hashes)]
        done = subprocess.run(command, cwd=Path(__file__).parent, env=environment, capture_output=True, check=True)
        assert done.stdout.decode().splitlines() == here


# Between the relay and the broker


def relayed(kind: int, *, processes: int = 1, amount: float = 0.0) -> Plan:
    """The plan in which this happens to the first batch that is sent."""
    fault = Fault(moment=0, commits=False, kind=(kind + 0.5) / len(AT_SEND), amount=amount)
    return Plan(7, processes, 0.05, 0.0, {0: fault}, tuple(range(4)), (1, 4), relayed=True)


@pytest.mark.parametrize("kind", range(len(AT_SEND)), ids=[each.replace(" ", "-") for each in AT_SEND])
def test_a_batch_that_is_sent_is_counted_once_by_an_inbox_in_every_run(kind: int, tmp_path: Path) -> None:
    """It is sent by the next relay, once more where the broker has had it already."""
    run = Trials(CountsInTheInbox, tmp_path).run(relayed(kind, processes=2, amount=1.0))
    assert run.error is None, run.story


def test_a_handler_that_takes_each_delivery_for_an_event_is_found_where_a_relay_dies(tmp_path: Path) -> None:
    """Its handler was never disturbed: the batch came twice."""
    run = Trials(CountsWithoutInbox, tmp_path).run(relayed(AT_SEND.index("crash after")))
    assert isinstance(run.error, AssertionError)
    assert any("crashes after it sent" in line for line in run.story), run.story


def test_a_relay_that_sends_after_its_lease_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted fault of the relay: frozen for longer than its lease, it sends behind its successor."""
    monkeypatch.setattr(_Carrier, "deadline", property(lambda _: math.inf, lambda *_: None), raising=False)
    run = Trials(CountsInTheInbox, tmp_path).run(relayed(AT_SEND.index("freeze before"), processes=2, amount=1.0))
    assert isinstance(run.error, OrderError), run.story
    assert "was sent again behind" in str(run.error)
