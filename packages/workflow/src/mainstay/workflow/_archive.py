"""Archives: files to which ended runs are copied, with all that is theirs, before they are deleted.

A line is one run, as JSON: `{"run": …, "history": […], "signals": […], "values": […], "asks": […]}`, with the columns
of the tables as they are. A run is deleted only after its line is durable, and only as the run that was read. So a kill
at any moment loses nothing: begun again with the same file, an archive cuts off a line that is not whole, deletes what
has its line already, and goes on.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
from collections import defaultdict
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import sqlalchemy as sa

from mainstay.database import Database
from mainstay.workflow._ended import FROM_THE_FIRST, OF_A_RUN, READ_OF_RUNS, READ_RUNS, Ended, delete
from mainstay.workflow._history import History, recall
from mainstay.workflow._payloads import Payloads
from mainstay.workflow.engine import RunView, value_of, view_of
from mainstay.workflow.errors import RunNotFound, WorkflowError
from mainstay.workflow.tables import runs
from mainstay.workflow.value import ValueView
from mainstay.workflow.workflow import RunStatus

_AT_ONCE = 100  # runs that are read, written and deleted together
_BEGINNING = b'{"run":{'  # of every line
_UNWAITED = os.O_NONBLOCK | os.O_NOCTTY  # to open a pipe must not wait for its other end

_HELD = (
    sa.select(runs.c.id, runs.c.epoch, runs.c.ended_at)
    .where(runs.c.id.in_(sa.bindparam("ids", expanding=True)))
    .with_for_update()
)

Name = tuple[str, int, float]
"""An end of a run: its id, epoch and moment. One that was compensated later has another."""


@dataclass(frozen=True, slots=True)
class Archived:
    """What was done.

    Attributes:
        written: runs that got a line.
        deleted: runs that were deleted.
    """

    written: int
    deleted: int


async def archive(database: Database, path: Path, *, older_than_seconds: float, deleting: bool) -> Archived:
    """Copy the runs that ended so long ago into a file, and delete them where that is asked for.

    Args:
        database: where they are.
        path: the file: made where there is none, and appended to where there is. A run that it has gets no second line.
        older_than_seconds: since the run's end.
        deleting: also delete them. A run whose parent or child is younger stays for now, and is not written.

    Raises:
        WorkflowError: the file is no archive, or no regular file, or another process writes to it.
        OSError: it cannot be written; nothing is deleted then that has no line. It names the file.
    """
    ends = {status: older_than_seconds for status in RunStatus if status.terminal}
    ended = Ended(ends, alone=not deleting)
    written = deleted = 0
    with _opened(path) as (append, known):
        more = True
        while more:  # with deleting, a parent's turn comes after its last child's
            more = False
            for query in ended.of.values():
                after: dict[str, Any] = {**FROM_THE_FIRST, "most": _AT_ONCE}
                while found := await database.read(query, after):
                    names = {(row.id, row.epoch, row.ended_at) for row in found}
                    lines = await _lines(database, names - known)
                    append(lines.values())
                    written += len(lines)
                    known.update(lines)
                    if deleting:
                        gone = await _delete(database, names & known)
                        deleted, more = deleted + gone, more or gone > 0
                    after |= {"after": found[-1].ended_at, "after_id": found[-1].id}
    return Archived(written, deleted)


async def _lines(database: Database, names: AbstractSet[Name]) -> dict[Name, bytes]:
    """The runs as lines, without those that have begun to go back meanwhile."""
    if not names:
        return {}
    ids = {"ids": [name[0] for name in names]}
    # The run itself last: where its end is still the one that was found, its history has not changed since.
    own = {part: _by_run(await database.read(query, ids)) for part, query in READ_OF_RUNS.items()}
    lines: dict[Name, bytes] = {}
    for row in await database.read(READ_RUNS, ids):
        name = (row.id, row.epoch, row.ended_at)
        if name in names:
            whole = {"run": dict(row._mapping), **{part: rows[row.id] for part, rows in own.items()}}
            lines[name] = json.dumps(whole, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
    return lines


def _by_run(rows: Iterable[sa.Row[Any]]) -> Mapping[str, list[dict[str, Any]]]:
    found = defaultdict[str, list[dict[str, Any]]](list)
    for row in rows:
        columns = dict(row._mapping)
        found[columns.pop("run_id")].append(columns)
    return found


async def _delete(database: Database, names: AbstractSet[Name]) -> int:
    async with database.transaction() as session:
        held = (await session.execute(_HELD, {"ids": [name[0] for name in names]})).all()
        ids = [row.id for row in held if (row.id, row.epoch, row.ended_at) in names]
        await delete(session, ids)
    return len(ids)


# The file


Append = Callable[[Collection[bytes]], None]


@contextmanager
def _opened(path: Path) -> Generator[tuple[Append, set[Name]], None, None]:
    """The file, for this process alone: what appends to it, and the ends of runs that it has."""
    new = not path.exists()
    # It holds what the runs were about: for its owner only.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | _UNWAITED, 0o600)
    try:
        _check_kind(path, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            msg = f"{path} is being written by another process: wait for it, or archive to another file"
            raise WorkflowError(msg) from None
        known, end = _known(path, descriptor)
        with _named(path):
            os.ftruncate(descriptor, end)
            os.fsync(descriptor)  # the lines that are known may be as new as the kill
        if new:
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        yield partial(_append, path, descriptor), known
    finally:
        os.close(descriptor)


def _check_kind(path: Path, descriptor: int) -> None:
    """Refuse what has no end, as a device or a pipe, and what keeps nothing."""
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        msg = f"{path} is no regular file, which an archive is: name one that is, or that is not there yet"
        raise WorkflowError(msg)


def _known(path: Path, descriptor: int) -> tuple[set[Name], int]:
    """The ends of runs that have a line, and where the last whole line ends."""
    known = set[Name]()
    end = 0
    with os.fdopen(descriptor, "rb", closefd=False) as file:
        for line in _whole_lines(path, file):
            run = _read(path, line)["run"]
            known.add((run["id"], run["epoch"], run["ended_at"]))
            end += len(line)
    return known, end


def _whole_lines(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """The lines, without a last one that is not whole: a kill came in the middle of it, so its run was not deleted.

    Raises:
        WorkflowError: a line begins like none of an archive; it may be of any length, and is not read on.
    """
    while beginning := file.read(len(_BEGINNING)):
        if not _BEGINNING.startswith(beginning):
            raise _no_archive(path, beginning)
        line = beginning + file.readline()
        if line.endswith(b"\n"):
            yield line


def _append(path: Path, descriptor: int, lines: Collection[bytes]) -> None:
    """Write lines at the end of the file; all of them are durable when this returns, or none is there."""
    left = memoryview(b"".join(lines))
    if not left:
        return
    end = os.fstat(descriptor).st_size
    try:
        with _named(path):
            while left:
                left = left[os.write(descriptor, left) :]
            os.fsync(descriptor)
    except OSError:
        with suppress(OSError):  # a line that may not be durable must not be taken for one that is
            os.ftruncate(descriptor, end)
        raise


@contextmanager
def _named(path: Path) -> Generator[None, None, None]:
    """Let an error of the system name the file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _read(path: Path, line: bytes) -> dict[str, Any]:
    try:
        whole: dict[str, Any] = json.loads(line)
        if {"run", *OF_A_RUN} <= whole.keys():
            return whole
    except (ValueError, AttributeError):
        pass
    raise _no_archive(path, line)


def _no_archive(path: Path, line: bytes) -> WorkflowError:
    return WorkflowError(f"{path} is no archive of runs, since it has a line that is none: {line[:80]!r}")


def _whole(path: Path) -> Iterator[dict[str, Any]]:
    with os.fdopen(os.open(path, os.O_RDONLY | _UNWAITED), "rb") as file:
        _check_kind(path, file.fileno())
        for line in _whole_lines(path, file):
            yield _read(path, line)


def archived_run(path: Path, id: str, payloads: Payloads) -> tuple[RunView, History, list[ValueView]]:
    """A run in an archive, its history and its values; of several with this id, the last one that was written.

    Args:
        path: the file.
        id: the run.
        payloads: opens what the file holds as the tables did.

    Raises:
        RunNotFound: it is not there.
        WorkflowError: the file is no archive.
        OSError: it cannot be read.
    """
    found: Mapping[str, Any] | None = None
    for whole in _whole(path):
        if whole["run"]["id"] == id:
            found = whole
    if found is None:
        msg = f"there is no run {id!r} in {path}"
        raise RunNotFound(msg)
    now = found["run"]["ended_at"]
    entries = [{**entry, "now": now} for entry in found["history"]]
    opened = partial(payloads.shown, run_id=id)
    published = [value_of(SimpleNamespace(**value), opened(value["body"])) for value in found["values"]]
    return view_of(SimpleNamespace(**found["run"], asleep=False), payloads), recall(entries, opened), published
