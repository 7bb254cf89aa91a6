"""Where a group is in the log: which transactions it has read to their end, and how far it is in those that follow."""

from __future__ import annotations

from typing import NamedTuple


class Snapshot(NamedTuple):
    """Which transactions had ended at some moment; on SQLite, which positions were taken.

    Attributes:
        end: every transaction from this number on had not begun.
        running: those below it that had not ended.
    """

    end: int
    running: tuple[int, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Snapshot:
        """The snapshot in PostgreSQL's own form, `xmin:xmax:running,running`."""
        _, end, running = text.split(":")
        return cls(int(end), tuple(map(int, running.split(","))) if running else ())

    def __str__(self) -> str:
        """As `parse` takes it."""
        return f"{min(self.running, default=self.end)}:{self.end}:{','.join(map(str, self.running))}"

    def shows(self, transaction: int) -> bool:
        """Whether the transaction had ended."""
        return transaction < self.end and transaction not in self.running

    @property
    def age(self) -> tuple[int, int]:
        """Orders snapshots of one database by time: what has ended stays so."""
        return self.end, -len(self.running)


class Place(NamedTuple):
    """A group's place in a partition: all that `low` shows is read, and of what only `high` shows up to `position`."""

    low: Snapshot
    high: Snapshot
    position: int

    @classmethod
    def of(cls, row: object) -> Place:
        """The place in a row of the table."""
        low, high, position = (getattr(row, name) for name in ("low", "high", "position"))
        return cls(Snapshot.parse(low), Snapshot.parse(high), position)

    def is_past(self, transaction: int, position: int) -> bool:
        """Whether the event at the position, published by the transaction, is read."""
        return self.low.shows(transaction) or (position <= self.position and self.high.shows(transaction))


START = Place(Snapshot(0), Snapshot(0), 0)
