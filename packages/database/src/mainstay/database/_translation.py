"""The one translation of what drivers raise: which error of ours it is, and whether its connection is still of use.

Sessions and reads come here through SQLAlchemy's `handle_error` event, the recorder and the keeper of the leases with
the driver's own exceptions. PostgreSQL's conditions are told by their SQLSTATE
(https://www.postgresql.org/docs/current/errcodes-appendix.html), SQLite's by its result codes
(https://www.sqlite.org/rescode.html).
"""

# asyncpg ships no types.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
from __future__ import annotations

import sqlite3

import asyncpg
from sqlalchemy import exc

from mainstay.database.errors import CommitUnknown, Conflict, DatabaseBusy, DatabaseError, DatabaseUnavailable

GONE = {
    "08": "the connection failed",
    "25006": "the server only reads: it is a standby, or was demoted",
    "25P03": "the server ended a transaction that did nothing for too long",
    "57P01": "the server is shutting down, or its administrator ended the connection",
    "57P02": "the server crashed",
    "57P03": "the server is starting or stopping",
    "57P04": "the database was dropped",
    "57P05": "the server ended a connection that did nothing for too long",
}
"""SQLSTATEs, or their classes, of a server that is of no further use to this connection; a new one may be."""

PASSING = {
    "40": "the transaction met another one, by deadlock or serialization",
    "53": "the server is short of connections, memory or disk",
    "55P03": "a lock was not free in time",
    "57": "the statement was cancelled, or ran out of time",
}
"""SQLSTATEs, or their classes, that the next attempt may not meet; the connection goes on."""

_SQLITE_CANNOT_WRITE = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR}
"""Result codes of a full disk, of a file or directory that may only be read, or not even that, and of a disk or file
system that fails or may no longer be written to: a person can mend that."""

_IN_DOUBT = "40003"  # "statement completion unknown"
_CONFLICT = "23"
_READ_ONLY = "25006"

DRIVER_ERRORS = (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
"""The errors of asyncpg where a connection cannot be made, or is lost."""


def driver_error(error: BaseException) -> BaseException:
    """The driver's own exception, out of those that SQLAlchemy wraps around it."""
    if isinstance(error, exc.DBAPIError) and error.orig is not None:
        error = error.orig
    inner = error.__cause__
    return inner if type(error).__module__.startswith("sqlalchemy.") and isinstance(inner, Exception) else error


def connection_is_gone(error: BaseException) -> bool:
    """Whether the server went away, cannot write or is coming up: close the connection, and make another."""
    state = _state(error)
    if state:
        return _found(state, GONE)
    if isinstance(error, asyncpg.InterfaceError):
        return "closed" in str(error) or "released" in str(error)
    return isinstance(error, OSError | TimeoutError | asyncpg.TargetServerAttributeNotMatched)


def only_reads(error: BaseException) -> bool:
    """Whether the server refused to write at all: it is a standby, or was demoted."""
    return _state(error) == _READ_ONLY


def did_nothing(error: BaseException) -> bool:
    """Whether it is certain of an error of a connection that is gone that the statement did nothing."""
    # asyncpg raises an InterfaceError before it sends anything, and a server that only reads has refused.
    return isinstance(error, asyncpg.InterfaceError) or only_reads(error)


def waits_for_others(error: BaseException) -> bool:
    """Whether the statement met another transaction's lock or change, so that the same one may succeed soon."""
    return _state(error).startswith(("40", "55P03")) and _state(error) != _IN_DOUBT


def translate(error: BaseException, *, gone: bool = False, committing: bool = False) -> DatabaseError:
    """Make our error of a driver's or of SQLAlchemy's, with that as its cause.

    Args:
        error: what was raised.
        gone: the connection is known to be lost, even where the error does not say so.
        committing: it was raised while COMMIT was under way.
    """
    original = driver_error(error)
    mine = _translated(original, gone=gone or connection_is_gone(original), committing=committing)
    mine.__cause__ = error
    return mine


def _translated(error: BaseException, *, gone: bool, committing: bool) -> DatabaseError:
    state = _state(error)
    text = str(error) or type(error).__name__
    if isinstance(error, exc.TimeoutError):
        return DatabaseBusy("no connection of the pool became free in time: units of work take long, or leak")
    if (gone and committing and not did_nothing(error)) or state == _IN_DOUBT:
        return CommitUnknown(f"the connection was lost while committing: {text}")
    if gone:
        return DatabaseUnavailable(f"the connection was lost or could not be made: {text}")
    if isinstance(error, sqlite3.Error):
        return _of_sqlite(error, text, committing=committing)
    if state.startswith(_CONFLICT):
        return Conflict(text)
    if _found(state, PASSING):
        return DatabaseBusy(text)
    return DatabaseError(f"the database refused the statement: {text}")


def _of_sqlite(error: sqlite3.Error, text: str, *, committing: bool) -> DatabaseError:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if isinstance(error, sqlite3.IntegrityError):
        return Conflict(text)
    if is_busy(error):
        return DatabaseBusy(f"SQLite stayed locked by another writer: {text}")
    if code == sqlite3.SQLITE_IOERR and committing:
        # After a disk has failed to sync, what was written may or may not come back with the next start.
        return CommitUnknown(f"the disk failed while SQLite was committing: {text}")
    if code in _SQLITE_CANNOT_WRITE:
        return DatabaseUnavailable(f"SQLite cannot write at the moment: {text}")
    return DatabaseError(f"SQLite refused the statement: {text}")


def is_busy(error: sqlite3.Error) -> bool:
    """Whether another connection has locked SQLite."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}


def _state(error: BaseException) -> str:
    return str(getattr(error, "sqlstate", None) or "")


def _found(state: str, table: dict[str, str]) -> bool:
    return state in table or state[:2] in table
