"""What can go wrong with the database, as one tree.

DatabaseError                SYS_DATABASE              the database refused a statement
├── Conflict                 RES_DATABASE_CONFLICT     a constraint: the row is there already, or what it names is not
├── FenceLost                RES_FENCE_LOST            another owner has what the write was fenced with
├── DatabaseBusy             SYS_DATABASE_BUSY         no connection, no writer's turn or no lock in time
├── DatabaseUnavailable      EXT_DATABASE_UNAVAILABLE  the server is away; nothing was committed
├── WrongEventLoop           SYS_WRONG_EVENT_LOOP      used from another event loop, thread or process
├── CommitUnknown            EXT_COMMIT_UNKNOWN        the connection was lost while committing
└── UnitOfWorkError          SYS_UNIT_OF_WORK          a unit of work is used in a way that could lose or double a write

`no_effect` is true for all of them but `CommitUnknown`: nothing of the write, batch or commit that raised is there.
"""

from __future__ import annotations

from mainstay.core import MainstayError

__all__ = [
    "CommitUnknown",
    "Conflict",
    "DatabaseBusy",
    "DatabaseError",
    "DatabaseUnavailable",
    "FenceLost",
    "UnitOfWorkError",
    "WrongEventLoop",
]


class DatabaseError(MainstayError):
    """The database refused a statement; the message carries the database's own words."""

    code = "SYS_DATABASE"
    status = 500
    title = "Database error"
    no_effect = True


class Conflict(DatabaseError):
    """A constraint refused a row."""

    code = "RES_DATABASE_CONFLICT"
    status = 409
    title = "Conflict with stored data"
    public_message = "This conflicts with what is already there."


class FenceLost(DatabaseError):
    """What the write was fenced with belongs to another owner by now; nothing of it was written. Stop the work."""

    code = "RES_FENCE_LOST"
    status = 409
    title = "Another owner took over"


class DatabaseBusy(DatabaseError):
    """No connection, writer's turn or lock became free in time."""

    code = "SYS_DATABASE_BUSY"
    status = 503
    title = "Database busy"
    retryable = True
    public_message = "The service is busy."


class DatabaseUnavailable(DatabaseError):
    """The database cannot be reached; nothing was committed."""

    code = "EXT_DATABASE_UNAVAILABLE"
    status = 503
    title = "Database unavailable"
    retryable = True
    public_message = "The service is temporarily unavailable."


class CommitUnknown(DatabaseError):
    """The connection was lost while the commit was on its way: it may have happened or not."""

    code = "EXT_COMMIT_UNKNOWN"
    status = 502
    title = "Outcome of a commit unknown"
    no_effect = False


class WrongEventLoop(DatabaseError):
    """The database is used from another event loop, thread or process than the one that started it."""

    code = "SYS_WRONG_EVENT_LOOP"
    status = 500
    title = "Database used from another event loop"


class UnitOfWorkError(DatabaseError):
    """A unit of work is used in a way that could lose or double a write; the message names the remedy."""

    code = "SYS_UNIT_OF_WORK"
    status = 500
    title = "Unit of work used wrongly"
