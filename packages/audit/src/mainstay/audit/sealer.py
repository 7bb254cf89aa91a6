"""The one sealer: moves what is pending into the log, batch by batch, and signs what it has become.

Any number of processes run this; a lease lets one of them seal at a time, and its fence refuses the writes of one that
was stopped and woke up late. A batch is one commit: the entries in the log, the nodes they complete, a signed
checkpoint, and the entries gone from the pending ones. Killed in the middle, nothing of it is there.

The sealer signs what it continues, so before it continues it makes sure that the log leads to the root of its last
checkpoint. If not, somebody has changed the log: it signs nothing more and says so, while entries keep arriving
unsealed. A pending row that is no entry is put aside and told of: in the log it would be malformed for ever.
"""

from __future__ import annotations

import logging
import random
from datetime import UTC
from typing import Any, cast
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY

from mainstay.audit import _metrics, _tree, tables
from mainstay.audit.entry import attributes
from mainstay.audit.errors import InvalidEntry, InvalidNote, TamperedLog
from mainstay.audit.keys import Keys
from mainstay.audit.merkle import Frontier, leaf_hash
from mainstay.audit.note import Checkpoint, SigningKey
from mainstay.audit.settings import AuditSettings
from mainstay.core import Clock, Drain, Health
from mainstay.database import Conflict, Database, DatabaseError, Lease

__all__ = ["Sealer"]

_log = logging.getLogger("mainstay.audit")

LEASE = "mainstay.audit.sealer"
_LOOK_SECONDS = 15.0

_PENDING = (
    sa.select(tables.pending.c.seq, tables.raw(tables.pending.c.entry_id), tables.raw(tables.pending.c.data))
    .order_by(tables.pending.c.seq)
    .limit(sa.bindparam("count"))
)
# The smallest and not the first one: a clock that is ahead must not hide what others wait for.
_OLDEST = sa.select(sa.func.min(tables.pending.c.recorded_at).label("recorded_at"))
_REFUSED = sa.select(sa.func.count()).select_from(tables.refused)
_HIGHEST = sa.select(sa.func.max(tables.log.c.leaf))
_EDGES = sa.select(tables.nodes.c.level, sa.func.max(tables.nodes.c.position).label("position")).group_by(
    tables.nodes.c.level
)
_TO_LOG = sa.insert(tables.log)
_TO_NODES = sa.insert(tables.nodes)
_TO_CHECKPOINTS = sa.insert(tables.checkpoints)
_TO_REFUSED = sa.insert(tables.refused)
_DONE = sa.delete(tables.pending).where(tables.pending.c.seq == sa.bindparam("done"))
# The same for all at once; SQLite has no arrays, and no round trips that would make it worth while.
_ALL_DONE = sa.delete(tables.pending).where(
    tables.pending.c.seq == sa.any_(sa.bindparam("done", type_=ARRAY(sa.BigInteger)))
)


class Sealer:
    """Seals while its App serves and it holds the lease; tells in every process how far sealing lags behind."""

    def __init__(self, database: Database, keys: Keys, settings: AuditSettings, clock: Clock) -> None:
        self._database = database
        self._keys = keys
        self._settings = settings
        self._clock = clock
        self._tampered: str | None = None
        self._oldest: float | None = None

    async def health(self) -> Health:
        """`down` when the log was changed; `degraded` when an entry waits too long, or rows were put aside."""
        if self._tampered is not None:
            return Health("down", f"the audit log was tampered with, nothing more is sealed: {self._tampered}")
        lag = await self.lag_seconds()
        if lag > self._settings.lag_seconds:
            return Health("degraded", f"the oldest unsealed audit entry waits since {lag:.0f} s: is a sealer running?")
        if refused := (await self._database.read(_REFUSED))[0][0]:
            msg = (
                f"{refused} rows that were written to mainstay_audit_pending are no entries: see mainstay_audit_refused"
            )
            return Health("degraded", msg)
        return Health("ok")

    async def lag_seconds(self) -> float:
        """The age of the oldest entry that waits for its seal, in seconds; 0 where none does."""
        oldest = (await self._database.read(_OLDEST))[0].recorded_at
        since = oldest / 1e6 if isinstance(oldest, int) else 0.0  # what is no moment must not mute the alarm
        self._oldest = None if oldest is None else since
        _metrics.LAG_ASKED.set(self._clock.now().timestamp())
        return self.known_lag_seconds()

    def known_lag_seconds(self) -> float:
        """The same of the entry that was the oldest when it was last looked for."""
        return 0.0 if self._oldest is None else max(0.0, self._clock.now().timestamp() - self._oldest)

    async def look(self, drain: Drain) -> None:
        """Look for the oldest entry that waits, often enough for an alert, until the drain begins."""
        while not drain.begun:
            try:
                await self.lag_seconds()
            except DatabaseError as error:
                _log.debug("the lag of sealing could not be looked for: %s", error)  # the database's own health says so
            await drain.pause(min(_LOOK_SECONDS, self._settings.lag_seconds / 4))

    async def serve(self, drain: Drain) -> None:
        """Seal whenever the lease can be had, until the drain begins; then seal what is pending, once more."""
        signing = self._keys.signing
        if signing is None:
            await drain.wait()
            return
        while not drain.begun:
            try:
                lease = await self._database.lease(LEASE, seconds=self._settings.lease_seconds)
                if lease is not None:
                    try:
                        await self._seal_while_held(lease, signing, drain)
                    finally:
                        await lease.release()
                elif self._tampered is not None:
                    # Whoever has the lease may be sealing again, after a repair.
                    _ = await continued(self._database, self._keys)
                    self._tampered = None
            except TamperedLog as error:
                if self._tampered is None:
                    _log.critical("the audit log was tampered with, nothing more is sealed: %s", error)
                self._tampered = str(error)
            except DatabaseError as error:
                _log.warning("sealing is interrupted: %s", error)
            # A little apart from each other, so that waiting sealers do not all ask at once.
            await drain.pause(self._settings.poll_seconds * (1 + random.random()))  # noqa: S311  jitter

    async def _seal_while_held(self, lease: Lease, signing: SigningKey, drain: Drain) -> None:
        log = await OpenLog.open(self._database, self._keys, signing, lease)
        self._tampered = None
        signed_at = self._clock.monotonic()
        while lease.held:
            # Asked before the batch: what was committed before the drain began is in it.
            last = drain.begun
            before = log.size
            try:
                taken = await log.seal(self._settings.batch_size, self._now())
            except Conflict as error:
                msg = f"somebody else's rows are where those of the next batch belong: {error}"
                raise TamperedLog(msg) from error
            if log.size > before:
                signed_at = self._clock.monotonic()
                _metrics.SEALED.inc(log.size - before)
            elif self._clock.monotonic() - signed_at >= self._settings.idle_checkpoint_seconds:
                await log.sign(self._now())
                signed_at = self._clock.monotonic()
            _metrics.SIZE.set(log.size)
            if taken < self._settings.batch_size:
                if last:
                    return
                await drain.pause(self._settings.poll_seconds)

    def _now(self) -> str:
        return self._clock.now().astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class OpenLog:
    """The log in the hands of its one writer. After any error it is thrown away and opened anew."""

    def __init__(
        self, database: Database, signing: SigningKey, lease: Lease, checkpoint: int, frontier: Frontier
    ) -> None:
        self._database = database
        self._signing = signing
        self._lease = lease
        self._checkpoint = checkpoint
        self._frontier = frontier

    @classmethod
    async def open(cls, database: Database, keys: Keys, signing: SigningKey, lease: Lease) -> OpenLog:
        """Continue where the last checkpoint left off.

        Raises:
            TamperedLog: as `continued` does.
        """
        return cls(database, signing, lease, *await continued(database, keys))

    @property
    def size(self) -> int:
        """The number of entries that are sealed."""
        return self._frontier.size

    async def seal(self, count: int, time: str) -> int:
        """Seal at most `count` pending entries in one commit, put aside what is none; how many rows there were."""
        rows = await self._database.read(_PENDING, {"count": count})
        if not rows:
            return 0
        entries: list[dict[str, Any]] = []
        nodes: list[dict[str, Any]] = []
        refused: list[dict[str, Any]] = []
        for row in rows:
            entry_id = _entry_id(row)
            if entry_id is None:
                data = row.data if isinstance(row.data, bytes) else ascii(row.data).encode()
                refused.append({"entry_id": ascii(row.entry_id), "data": data})
                continue
            entries.append({"leaf": self._frontier.size, "entry_id": entry_id, "data": row.data})
            nodes += [
                {"level": node.level, "position": node.position, "hash": node.hash}
                for node in self._frontier.append(leaf_hash(row.data))
            ]
        async with self._database.batch(fence=self._lease.fence, route=LEASE):
            await self._database.write(_TO_LOG, entries)
            await self._database.write(_TO_NODES, nodes)
            await self._database.write(_TO_REFUSED, refused)
            if entries:
                await self._database.write(_TO_CHECKPOINTS, self._next_checkpoint(time))
            done = [cast("int", row.seq) for row in rows]
            if self._database.dialect == "postgresql":
                await self._database.write(_ALL_DONE, {"done": done})
            else:
                await self._database.write(_DONE, [{"done": seq} for seq in done])
        if refused:
            _metrics.REFUSED.inc(len(refused))
            _log.error("%d pending rows are no audit entries and were moved to mainstay_audit_refused", len(refused))
        return len(rows)

    async def sign(self, time: str) -> None:
        """Sign the log as it is: that nothing happened is news too."""
        await self._database.write(_TO_CHECKPOINTS, self._next_checkpoint(time), fence=self._lease.fence, route=LEASE)

    def _next_checkpoint(self, time: str) -> dict[str, Any]:
        self._checkpoint += 1
        checkpoint = Checkpoint(self._signing.verifier.name, self._frontier.size, self._frontier.root(), time)
        return {
            "number": self._checkpoint,
            "size": checkpoint.size,
            "note": self._signing.sign(checkpoint.to_text()),
        }


def _entry_id(row: sa.Row[Any]) -> UUID | None:
    """The id of the entry in a pending row; None where it holds none, or one that is filed under another id."""
    if not isinstance(row.data, bytes):
        return None
    try:
        entry_id: UUID = attributes(row.data)["id"]
    except InvalidEntry:
        return None
    return entry_id if row.entry_id in (entry_id, entry_id.hex) else None


async def continued(database: Database, keys: Keys) -> tuple[int, Frontier]:
    """Where the last checkpoint left off: its number, and the growing edge of the tree. A sealer may work meanwhile.

    Raises:
        TamperedLog: the log does not lead to the root of that checkpoint, nobody we trust has signed it, or there are
            rows where the next ones belong.
    """
    # What there is comes before the checkpoint that covers it: who seals meanwhile only adds, and signs what it adds.
    highest = (await database.read(_HIGHEST))[0][0]
    edges = await database.read(_EDGES)
    latest = await _tree.latest_checkpoint(database)
    number, size, root = 0, 0, Frontier().root()
    if latest is not None:
        number, note = latest
        try:
            checkpoint = Checkpoint.open(note, keys.trusted)
        except InvalidNote as error:
            msg = (
                f"checkpoint {number}: {error}. If the key was replaced, name the old one in MAINSTAY_AUDIT_FORMER_KEYS"
            )
            raise TamperedLog(msg) from error
        size, root = checkpoint.size, checkpoint.root
    frontier = await _tree.frontier(database, size)
    if frontier.root() != root:
        msg = f"the first {size} entries do not have the root that checkpoint {number} signs"
        raise TamperedLog(msg)
    if highest is not None and not (isinstance(highest, int) and highest < size):
        msg = f"there are entries in the log beyond the {size} that the newest checkpoint signs"
        raise TamperedLog(msg)
    for edge in edges:
        if not _tree.within(edge.level, edge.position, size):
            msg = f"there is a node {edge.position} of level {edge.level}, which a log of {size} entries does not have"
            raise TamperedLog(msg)
    return number, frontier
