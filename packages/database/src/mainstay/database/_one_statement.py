"""A whole batch as one statement, on PostgreSQL.

A batch in a transaction is BEGIN, the check of the fences, a statement for each table and COMMIT: five answers to wait
for, each behind whatever else runs on the loop. Most batches consist of inserts and updates that take their rows by
column, so that all of it fits into one statement, which is its own transaction:

    WITH fence AS (SELECT id, epoch, … FOR SHARE), held AS (… those fences that hold …),
         part_0 AS (INSERT INTO … SELECT … FROM unnest(…) AS given(…) WHERE given.f IN (SELECT n FROM held)), …
    SELECT n FROM held

The rows of a fence that is lost are left out, and the answer names the fences that held. A row that another session
changed since the statement began is locked and read in its newest form, both by the check and by the updates.

The parts of one statement do not see each other's rows, and of two updates of one row only one is carried out. So a
batch in which that could matter goes the long way: two statements that update one table, an insert and an update of one
table on the same route, or anything that reads.

Benchmark rows: `database/fenced rows` and `workflow/three steps, 1 at once, PostgreSQL`.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from typing import Any

from mainstay.database._pending import PendingWrite
from mainstay.database._statements import Arguments, ByColumn, Literal, Prepared, Statements
from mainstay.database.fence import Fence, FenceOn

_PARAMETER = re.compile(r"\$(\d+)")
_ID_TYPE = re.compile(r"\$1::([A-Z ]+)(?:\(\d+\))?\[\]")
_HELD = "(given.f = 0 OR given.f IN (SELECT n FROM held))"
_CACHED = 256


class OneStatement:
    """One batch, ready for the driver.

    Attributes:
        sql, arguments: of the statement; its rows are the numbers of the fences that held.
        fences: by their number.
    """

    __slots__ = ("arguments", "fences", "sql")

    def __init__(self, sql: str, arguments: list[Any], fences: dict[Fence, int]) -> None:
        self.sql = sql
        self.arguments = arguments
        self.fences = fences


class OneStatements:
    """Makes one statement of a batch where that means the same; keeps the SQL of those that it made."""

    def __init__(self, statements: Statements) -> None:
        self._statements = statements
        self._texts: dict[tuple[object, ...], str] = {}

    def of(self, writes: Sequence[PendingWrite]) -> OneStatement | None:
        """The batch as one statement; None where it has to be several."""
        fences: dict[Fence, int] = {}
        parts: dict[Prepared | Literal, _Part] = {}
        for write in writes:
            number = 0 if write.fence is None else fences.setdefault(write.fence, len(fences) + 1)
            for statement, rows in write.operations:
                part = parts.get(statement)
                if part is None:
                    if statement.by_column is None:
                        return None
                    part = parts[statement] = _Part(statement.by_column)
                part.add(rows, number, write.route)
        tables = {fence.on for fence in fences}
        if len(tables) > 1 or not _independent(list(parts.values())):
            return None
        on = next(iter(tables), None)
        form = None if on is None else self._statements.prepared(on.many, ("ids",))
        if on is not None and len({fence.id for fence in fences}) < len(fences):
            return None  # two epochs of one row
        arguments: list[Any] = []
        if on is not None and form is not None:
            arguments += form.arguments({"ids": [fence.id for fence in fences]})
            arguments += [list(fences.values()), [fence.id for fence in fences], [fence.epoch for fence in fences]]
            if on.owned:
                arguments.append([fence.owner for fence in fences])
            if on.flagged:
                arguments.append([fence.unflagged for fence in fences])
        for part in parts.values():
            arguments += part.columns(fenced=on is not None)
        return OneStatement(self._text(on, form, list(parts.values())), arguments, fences)

    def _text(self, on: FenceOn | None, form: Prepared | None, parts: Sequence[_Part]) -> str:
        key = (on, *(part.statement for part in parts))
        text = self._texts.get(key)
        if text is None:
            if len(self._texts) >= _CACHED:
                del self._texts[next(iter(self._texts))]
            text = self._texts[key] = _render(on, form, parts)
        return text


class _Part:
    """The rows of one statement of a batch."""

    __slots__ = ("_fences", "_rows", "routes", "statement")

    def __init__(self, statement: ByColumn) -> None:
        self.statement = statement
        self.routes: set[Hashable] = set()
        self._rows: list[Arguments] = []
        self._fences: list[int] = []

    def add(self, rows: Sequence[Arguments], fence: int, route: Hashable) -> None:
        """More rows, of a write with this fence."""
        self._rows += rows
        self._fences += [fence] * len(rows)
        if route is not None:
            self.routes.add(route)

    def columns(self, *, fenced: bool) -> list[Sequence[Any]]:
        """The arguments."""
        columns: list[Sequence[Any]] = [list(column) for column in zip(*self._rows, strict=True)]
        return [*columns, self._fences] if fenced else columns


def _independent(parts: Sequence[_Part]) -> bool:
    """Whether it makes no difference that the parts do not see each other's rows."""
    tables: dict[str, list[_Part]] = {}
    for part in parts:
        tables.setdefault(part.statement.table, []).append(part)
    for together in tables.values():
        updates = [part for part in together if part.statement.updates]
        inserts = [part for part in together if not part.statement.updates]
        if len(updates) > 1:
            return False
        if updates and any(updates[0].routes & part.routes for part in inserts):
            return False
    return True


def _render(on: FenceOn | None, form: Prepared | None, parts: Sequence[_Part]) -> str:
    pieces: list[str] = []
    given = 0
    if on is not None and form is not None:
        given = len(form.arguments({"ids": []}))
        id_type = _ID_TYPE.search(form.sql)
        assert id_type is not None  # noqa: S101  it is an `= ANY (…)` over the ids
        id_name, epoch_name, *others = on.columns
        kinds, names = ["INTEGER", id_type[1], "BIGINT"], "n, id, epoch"
        same = [f'fence."{id_name}" = wanted.id', f'fence."{epoch_name}" = wanted.epoch']
        if on.owned:
            kinds.append("VARCHAR")
            names += ", owner"
            same.append(f'fence."{others[0]}" = wanted.owner')
        if on.flagged:
            kinds.append("BOOLEAN")
            names += ", unflagged"
            same.append(f'NOT (wanted.unflagged AND fence."{others[-1]}")')
        arrays = ", ".join(f"${given + place}::{kind}[]" for place, kind in enumerate(kinds, 1))
        given += len(kinds)
        pieces.append(f"fence AS ({form.sql})")
        pieces.append(
            f"held AS (SELECT wanted.n FROM unnest({arrays}) AS wanted({names}) JOIN fence ON {' AND '.join(same)})"  # noqa: S608  names of columns
        )
    for place, part in enumerate(parts):
        text = part.statement.sql(given + 1, _HELD if on is not None else "")
        given = max([given, *(int(number) for number in _PARAMETER.findall(text))])
        pieces.append(f"part_{place} AS ({text})")
    answer = "SELECT n FROM held" if on is not None else "SELECT 0 WHERE FALSE"
    return f"WITH {', '.join(pieces)} {answer}"
