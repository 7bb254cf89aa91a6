"""Parking as a state machine against the real tables: processes hold, stop and work, and each key stays in order."""

import asyncio
import time
from collections.abc import Coroutine
from typing import Any, TypeVar
from uuid import uuid4

import sqlalchemy as sa
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from pydantic import SecretStr

from mainstay.core import App
from mainstay.database import Database, DatabaseModule, DatabaseSettings
from mainstay.events import EventsModule, EventsSettings, ParkedKeys
from mainstay.events._crashes import Crashes
from mainstay.events._delivery import Assignment, Delivery, Verdict
from mainstay.events._handled import Handled
from mainstay.events._parking import Parking
from mainstay.events._transport import LogRecord
from mainstay.events.errors import NotHeldError
from mainstay.events.tables import PARKED, PARKED_KEYS

T = TypeVar("T")

KEYS = st.sampled_from([b"piano", b"chair", b"parcel"])
ONE = st.sampled_from([0, 1])
FAILS = Verdict(RuntimeError("no room"), "park")
WAITS = Verdict(RuntimeError("no room for the moment"), "park", 0.0)
LATER = Verdict(RuntimeError("no room today"), "later", 0.0)
ANY_ORDER = {b"parcel"}
"""What fails of it is set aside by itself, also from the queue of its key, and the key goes on."""


class Member:
    """A process of the group: what it holds and works on, by its own belief, which may be out of date."""

    def __init__(self, database: Database, group: str) -> None:
        self.parking = Parking(database, group, Handled(database, group, ["stock.moved 1.x"]), 3600.0)
        self.crashes = Crashes(database, 3)
        self.partition: Assignment | None = None
        self.start = self.position = 0  # what it has handled since it last committed
        self.claimed: Any = None  # the parked key that it works on
        self.first: Any = None  # and the event of it that it has called, and not taken out of the queue


class ParkingModel(RuleBasedStateMachine):
    """One partition with a few keys, two processes, and a person; a process may stand still between any two steps."""

    runner: asyncio.Runner
    database: Database
    persons: ParkedKeys

    def __init__(self) -> None:
        super().__init__()
        self.group = self.topic = f"t{uuid4().hex}"
        self.log: list[LogRecord] = []
        self.effects: dict[bytes, list[int]] = {b"piano": [], b"chair": [], b"parcel": []}
        self.called = {b"piano": -1, b"chair": -1}  # last, by the holder or from the queue
        self.broken: set[bytes] = set()
        self.committed = 0
        self.members = [Member(self.database, self.group) for _ in range(2)]
        self.owner: Member | None = None
        self.run(self.members[0].parking.handled.note())

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Do it in the loop of the App."""
        return self.runner.run(work)

    @rule(key=KEYS)
    def published(self, key: bytes) -> None:
        """An event is new."""
        offset = len(self.log)
        headers: list[tuple[str, bytes | None]] = [("ce_type", b"stock.moved"), ("ce_dataversion", b"1.0")]
        self.log.append(LogRecord(self.topic, 0, offset, key, b"%d" % offset, headers))

    @rule(key=KEYS)
    def breaks_or_is_mended(self, key: bytes) -> None:
        """The handler fails for a key from now on, or no longer."""
        self.broken ^= {key}

    def _call(self, key: bytes, offset: int, *, member: Member, queue: bool = False) -> bool:
        """Whether the handler succeeds; what it did before it does not do again."""
        if key not in ANY_ORDER:
            if queue:
                assert offset >= self.called[key], (
                    f"{key!r}: {offset} was in a queue, and {self.called[key]} handled before"
                )
            if queue or member is self.owner:  # another one repeats what it had in its hands
                self.called[key] = offset
        if key in self.broken:
            return False
        if offset not in self.effects[key]:
            self.effects[key].append(offset)
        return True

    @rule(number=ONE)
    def takes(self, number: int) -> None:
        """A process gets the partition: the other one has ended, or stands still and does not know."""
        member = self.owner = self.members[number]
        partition = member.partition = Assignment(self.topic, 0)
        self.run(member.crashes.take(self.group, [partition]))
        partition.parked |= self.run(member.parking.keys_of(self.topic))
        member.start = member.position = self.committed
        self.called = {key: min(last, self.committed - 1) for key, last in self.called.items()}  # it is read once more

    @rule(number=ONE, waits=st.booleans())
    def reads(self, number: int, *, waits: bool) -> None:
        """A process that believes to hold the partition deals with the next event; a key may give way for a while."""
        member = self.members[number]
        partition = member.partition
        if partition is None or member.position >= len(self.log):
            return
        record = self.log[member.position]
        key = record.key or b""
        try:
            if key in partition.parked:
                if not self.run(member.parking.append(partition, record)):
                    partition.parked.discard(key)
                    return
            elif not self._call(key, record.offset, member=member):
                delivery = Delivery(partition, record)
                if key in ANY_ORDER and not waits:
                    self.run(member.parking.park(delivery, LATER, 0.0, []))
                else:
                    before = [each for each in self.log[member.start : member.position] if each.key == key]
                    self.run(member.parking.park(delivery, WAITS if waits else FAILS, 0.0, before))
                    partition.parked.add(key)
        except NotHeldError:
            assert member is not self.owner, "the holder was refused"
            member.partition = None
            return
        member.position += 1

    @rule(number=ONE)
    def commits(self, number: int) -> None:
        """What was handled is not read again; a commit of another than the holder is refused by its transport."""
        member = self.members[number]
        if member is self.owner and member.partition is not None:
            self.committed = member.start = member.position

    @rule(number=ONE)
    def claims(self, number: int) -> None:
        """A process begins to work on a queue that is due."""
        member = self.members[number]
        if member.claimed is None:
            claimed, _ = self.run(member.parking.claim(1, time.monotonic))
            member.claimed, member.first = (claimed[0] if claimed else None), None

    @rule(number=ONE)
    def works(self, number: int) -> None:
        """It calls the first event of the queue, or takes it out, or notes that it has failed."""
        member = self.members[number]
        if member.claimed is None:
            return
        parking, key = member.parking, member.claimed.key
        if member.first is None:
            row: Any = self.run(parking.first(self.topic, key))
            if row is None or self._call(row.own_key, row.offset, member=member, queue=True):
                member.first = row or "none"
                return
            failed = Delivery(Assignment(self.topic, 0, queue=key), self.log[row.offset])
            if key not in ANY_ORDER:
                self.run(parking.keep(failed, LATER if row.own_key in ANY_ORDER else FAILS, 0.0))
                member.claimed = None
                return
            try:
                self.run(parking.park(failed, LATER, 0.0, []))
                member.first = row
            except NotHeldError:
                member.claimed = None
            return
        position = None if member.first == "none" else member.first.position
        member.first = None
        if self.run(parking.finished(self.topic, key, position)):
            member.claimed = None
            if member.partition is not None:
                member.partition.parked -= {key} - self.run(parking.keys_of(self.topic))

    @rule()
    def claims_lapse(self) -> None:
        """Those who work on queues stand still for longer than the lease."""
        self.run(self.database.write(sa.update(PARKED_KEYS).values(claimed_until=0.0), {}))

    @rule()
    def person_retries(self) -> None:
        """All that is parked is to be tried again."""
        for each in self.run(self.persons.list(self.group)):
            self.run(self.persons.retry(each.id))

    @invariant()
    def keeps_the_order(self) -> None:
        """No event of a key is handled before one that was published before it."""
        for key, effects in self.effects.items():
            if key in ANY_ORDER:
                continue
            published = [each.offset for each in self.log if each.key == key]
            assert effects == published[: len(effects)], f"{key!r} out of order, or one is missing"

    def teardown(self) -> None:
        """All is mended: then everything is handled, and nothing stays parked."""
        self.broken = set()
        self.claims_lapse()
        self.members.append(Member(self.database, self.group))
        self.person_retries()
        self.takes(2)
        for _ in range(4 * len(self.log) + 8):
            self.reads(2, waits=False)
            self.claims(2)
            self.works(2)
            self.commits(2)
        self.keeps_the_order()
        assert sum(map(len, self.effects.values())) == len(self.log), "lost"
        assert self.run(self.persons.list(self.group)) == []
        of_group = PARKED.c.group_name == self.group
        assert self.run(self.database.read(sa.select(PARKED.c.id).where(of_group))) == []


def test_each_key_stays_in_order_and_complete_whoever_stands_still() -> None:
    """Histories of two processes and a person; one that fails is made short and printed."""
    app = App(
        DatabaseModule.for_root(DatabaseSettings(url=SecretStr("sqlite+aiosqlite:///:memory:"))),
        EventsModule.for_root(EventsSettings()),
    )
    with asyncio.Runner() as runner:
        runner.run(app.__aenter__())
        try:
            model = type(
                "Model",
                (ParkingModel,),
                {"runner": runner, "database": app.get(Database), "persons": app.get(ParkedKeys)},
            )
            run_state_machine_as_test(model, settings=settings(max_examples=25, stateful_step_count=30))
        finally:
            runner.run(app.__aexit__(None, None, None))
