"""Core statements compiled once, and rows converted exactly as SQLAlchemy would convert them.

The recorder talks to the drivers directly; a value must nevertheless look the same in the table whichever way it went.
So SQL and conversions (UUID, JSON, Decimal, datetime, Enum, …) are taken from SQLAlchemy's own compiled form.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, cast

import sqlalchemy as sa
from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.sql.compiler import SQLCompiler

Arguments = tuple[Any, ...]
Convert = Callable[[Any], Any]

_CACHED = 1_024

# An execution option of an update: rows of one batch that change the same row of the table may count as one of them.
BY_COLUMN = "mainstay_by_column"

# An insert and an update as SQLAlchemy renders them for asyncpg: `INSERT INTO t (a) VALUES ($1::BIGINT)`. Not `DO
# UPDATE`, which one statement may not do twice to a row.
_INSERT = re.compile(r"INSERT INTO (\S+) (\([^$]+?\)) VALUES \((.*)\)(| ON CONFLICT[^$]* DO NOTHING)", re.DOTALL)
_UPDATE = re.compile(r"UPDATE (\S+) SET (.+?) WHERE (.+)", re.DOTALL)
_MORE = re.compile(r"\b(SELECT|RETURNING|DEFAULT VALUES|DO UPDATE)\b")
# Types whose Python values cannot be taken for arrays.
_SCALARS = (
    *("BIGINT", "INTEGER", "SMALLINT", "NUMERIC", "FLOAT", "DOUBLE PRECISION", "BOOLEAN", "BYTEA", "TEXT", "VARCHAR"),
    *("DATE", "INTERVAL", "TIMESTAMP WITH TIME ZONE", "TIMESTAMP WITHOUT TIME ZONE", "JSON", "JSONB", "UUID"),
)
_VALUE = re.compile(rf"\$(\d+)::({'|'.join(_SCALARS)})(\(\d+(?:, ?\d+)?\))?(?![\w\[])")


class ByColumn:
    """A statement that takes any number of rows, one array for each column: parsed, planned and executed once.

    Attributes:
        table: what it writes to.
        updates: it changes rows that are there.
    """

    __slots__ = ("_text", "_types", "table", "updates")

    def __init__(self, table: str, text: str, types: Sequence[str], *, updates: bool) -> None:
        self.table = table
        self.updates = updates
        self._text = text
        self._types = types

    def sql(self, first: int = 1, fence: str = "") -> str:
        """The statement.

        Args:
            first: the number of its first parameter.
            fence: where a row belongs to a fence, the number of which is one more column: the rows that may be written,
                as a condition on `given.f`.
        """
        types = [*self._types, "INTEGER"] if fence else self._types
        arrays = ", ".join(f"${first + place}::{kind}[]" for place, kind in enumerate(types))
        names = ", ".join([*(f"c{place}" for place in range(1, len(self._types) + 1)), *(["f"] if fence else [])])
        rows = f"unnest({arrays}) AS given({names})"
        condition = f" {'AND' if self.updates else 'WHERE'} {fence}" if fence else ""
        return self._text.replace("\0", rows).replace("\1", condition)


def _by_column(sql: str, *, updates: bool = False) -> ByColumn | None:
    """The form of a statement that takes its rows by column, where it means the same for any number of them."""
    insert = _INSERT.fullmatch(sql)
    update = _UPDATE.fullmatch(sql) if updates else None
    values = [(int(match[1]), f"{match[2]}{match[3] or ''}") for match in _VALUE.finditer(sql)]
    types = dict(values)
    if _MORE.search(sql) or sql.count("$") != len(values) or sorted(types) != list(range(1, len(types) + 1)):
        return None
    if not types or len(set(values)) != len(types) or "\0" in sql or "\1" in sql:
        return None

    def named(text: str) -> str:
        return _VALUE.sub(lambda match: f"given.c{match[1]}", text)

    if insert is not None:
        table, columns, row, tail = insert.groups()
        text = f"INSERT INTO {table} {columns} SELECT {named(row)} FROM \0\1{tail}"  # noqa: S608  what SQLAlchemy rendered
    elif update is not None:
        table, changes, where = update.groups()
        text = f"UPDATE {table} SET {named(changes)} FROM \0 WHERE ({named(where)})\1"  # noqa: S608  the same
    else:
        return None
    return ByColumn(table, text, [types[number] for number in sorted(types)], updates=update is not None)


class Prepared:
    """One SQL text, and how a row becomes its arguments.

    Attributes:
        sql: for one row.
        by_column: for any number of rows on PostgreSQL; None where there is no such form.
    """

    __slots__ = ("_compiled", "_convert", "_fixed", "_keys", "_pick", "_plain", "_spread", "by_column", "sql")

    def __init__(self, compiled: SQLCompiler, keys: Sequence[str]) -> None:
        self.sql = compiled.string
        options = cast("sa.Executable", compiled.statement).get_execution_options()
        self.by_column = _by_column(compiled.string, updates=bool(options.get(BY_COLUMN)))
        self._compiled = compiled
        self._spread = bool(compiled.post_compile_params)
        self._keys = frozenset(keys)
        names = list(compiled.positiontup or ())
        processors = cast("Mapping[str, Convert]", compiled._bind_processors)
        defaults = _python_defaults(compiled)
        binds = compiled.binds
        self._fixed: dict[str, Callable[[], Any]] = {}
        picked: list[str] = []
        for name in names:
            bind = binds.get(name)
            key = name if bind is None else bind.key
            picked.append(key)
            if key in self._keys:
                continue
            if key in defaults:
                self._fixed[key] = defaults[key]
            elif bind is not None and not bind.required:
                self._fixed[key] = _value_of(bind)
            else:
                msg = f"the rows of this statement lack {key!r}: {self.sql}"
                raise ValueError(msg)
        if unused := self._keys.difference(picked):
            # SQLAlchemy would leave the values out without a word.
            msg = f"this statement has no place for {', '.join(sorted(unused))}: {self.sql}"
            raise ValueError(msg)
        self._convert = [(place, processors[name]) for place, name in enumerate(names) if name in processors]
        self._pick = itemgetter(*picked) if len(picked) > 1 else _picker(picked)
        self._plain = not self._fixed

    def arguments(self, row: Mapping[str, Any]) -> Arguments:
        """The driver's arguments of one row.

        Raises:
            KeyError: the row lacks a key that the first row had.
        """
        if not self._plain:
            row = {**{key: make() for key, make in self._fixed.items()}, **row}
        if not self._convert:
            return cast("Arguments", self._pick(row))
        values = list(self._pick(row))
        for place, convert in self._convert:
            values[place] = convert(values[place])
        return tuple(values)

    @property
    def spread(self) -> bool:
        """Whether the SQL depends on the row: an `IN` over a list."""
        return self._spread

    def spread_over(self, row: Mapping[str, Any]) -> tuple[str, Arguments]:
        """SQL and arguments of a statement with an `IN` over a list."""
        if not self._plain:
            row = {**{key: make() for key, make in self._fixed.items()}, **row}
        state = self._compiled.construct_expanded_state(dict(row))
        processors = cast("Mapping[str, Convert]", state.processors)
        every = {**cast("Mapping[str, Convert]", self._compiled._bind_processors), **processors}
        names = state.positiontup or ()
        values = (state.parameters[name] for name in names)
        return state.statement, tuple(
            every[name](value) if name in every else value for name, value in zip(names, values, strict=True)
        )


class Literal:
    """SQL that was spread over one row; many equal ones are one object, so that they are grouped."""

    __slots__ = ("by_column", "sql")

    def __init__(self, sql: str) -> None:
        self.sql = sql
        self.by_column: ByColumn | None = None


Operation = tuple[Prepared | Literal, list[Arguments]]


class Statements:
    """What was compiled for one dialect."""

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect
        # The statement is kept beside its form: an id may be used again once the object is gone.
        self._prepared: dict[tuple[int, tuple[str, ...]], tuple[object, Prepared]] = {}
        self._literals: dict[str, Literal] = {}
        self._compiling = threading.Lock()  # the loop's thread and SQLite's writer both ask

    def prepared(self, statement: sa.Executable, keys: tuple[str, ...]) -> Prepared:
        """The compiled form for rows with these keys."""
        found = self._prepared.get((id(statement), keys))
        if found is not None:
            return found[1]
        with self._compiling:
            compiled = cast("sa.ClauseElement", statement).compile(
                dialect=self._dialect, column_keys=sorted(keys), for_executemany=True
            )
            form = Prepared(cast("SQLCompiler", compiled), keys)
            _bound(self._prepared)
            self._prepared[id(statement), keys] = (statement, form)
        return form

    def operations(self, form: Prepared, rows: Sequence[Mapping[str, Any]]) -> list[Operation]:
        """The statement over the rows, ready for the driver; raises what the converters of its types raise."""
        if not form.spread:
            return [(form, [form.arguments(row) for row in rows])]
        operations: list[Operation] = []
        for row in rows:
            sql, arguments = form.spread_over(row)
            literal = self._literals.get(sql)
            if literal is None:
                _bound(self._literals)
                literal = self._literals[sql] = Literal(sql)
            operations.append((literal, [arguments]))
        return operations


def _bound(cache: dict[Any, Any]) -> None:
    if len(cache) >= _CACHED:
        del cache[next(iter(cache))]


def _picker(keys: list[str]) -> Callable[[Mapping[str, Any]], Arguments]:
    if not keys:
        return lambda _row: ()
    key = keys[0]
    return lambda row: (row[key],)


def _value_of(bind: sa.BindParameter[Any]) -> Callable[[], Any]:
    return lambda: bind.effective_value


def _same(value: object) -> object:
    return value


def _python_defaults(compiled: SQLCompiler) -> dict[str, Callable[[], Any]]:
    """The defaults of columns that SQLAlchemy would compute in Python before it executes the statement."""
    defaults: dict[str, Callable[[], Any]] = {}
    prefetch = [(column, column.default) for column in compiled.insert_prefetch]
    prefetch += [(column, column.onupdate) for column in compiled.update_prefetch]
    for column, default in prefetch:
        if default is None:
            continue
        argument = cast("Any", default).arg
        if default.is_scalar:
            defaults[column.key] = partial(_same, argument)
        elif default.is_callable:
            defaults[column.key] = partial(argument, None)
        else:
            msg = f"the default of {column} is an SQL expression: give it as server_default or in the row"
            raise ValueError(msg)
    return defaults
