"""How runs begin: their rows, one or many, and whether a run that is started again is the one that its id names."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mainstay.core import current, digest, uuid7
from mainstay.database import CommitUnknown, Conflict, Database
from mainstay.workflow import _metrics, _names
from mainstay.workflow._identity import Identity
from mainstay.workflow._payloads import Payloads
from mainstay.workflow._seconds import checked_seconds
from mainstay.workflow._worker import Worker
from mainstay.workflow.errors import RunConflict
from mainstay.workflow.tables import FIND, FIND_ALL, START, START_QUIETLY, new_run
from mainstay.workflow.workflow import AnyWorkflow

_TRIES = 5  # a commit whose end was not seen is looked up by trying again
_AT_ONCE = 1_000  # rows in one statement
_NAMED = 10  # ids in one message


class Start(NamedTuple):
    """A run that is to begin.

    Attributes:
        name, version: of its workflow.
        input: JSON.
        id: checked; None for a new one.
        timeout_seconds: how long it may take.
    """

    name: str
    version: int
    input: str
    id: str | None
    timeout_seconds: float | None


class Starts:
    """Begins runs: here at once where there is a place for them, else through the queue.

    Args:
        workflows: those that this process knows, by name and version.
    """

    def __init__(
        self, database: Database, payloads: Payloads, workflows: Mapping[tuple[str, int], AnyWorkflow], worker: Worker
    ) -> None:
        self._database = database
        self._payloads = payloads
        self._workflows = workflows
        self._worker = worker

    async def one(self, start: Start) -> str:
        """Begin a run; returns its id.

        Raises:
            RunConflict: another run has its id.
        """
        run_id = str(uuid7()) if start.id is None else start.id
        # Inside a unit of work it is open whether, and when, there will be a run: it takes no place here, and is
        # claimed after the commit like any other. The claim asks the database, so a run that was there already, or that
        # another process has executed meanwhile, is not begun a second time.
        joins = self._database.in_unit_of_work()
        identity = None if joins else self._worker.takes()
        row = self._row(start, run_id, identity)

        def begin() -> None:
            if identity is None:
                self._worker.announce()
            else:
                self._worker.begin(identity, row)
            _metrics.count_start(start.name)

        if joins:
            await self._database.write(START_QUIETLY[self._database.dialect], row, route=run_id)
            if await self._is_new(row):
                self._database.after_commit(begin)
        elif identity is None:
            if await self._insert(row):
                begin()
        else:
            identity.reserved += 1  # or all who start at once would find the same place free
            try:
                new = await self._insert(row)
            finally:
                identity.reserved -= 1
            if new:
                begin()
        return run_id

    async def all(self, starts: Sequence[Start]) -> list[str]:
        """Begin runs in one commit, all or none; returns their ids, in order.

        Raises:
            RunConflict: other runs have some of the ids, or one id stands for two inputs; the message names them.
        """
        ids = [str(uuid7()) if start.id is None else start.id for start in starts]
        rows: dict[str, dict[str, Any]] = {}
        conflicts: list[str] = []
        for start, run_id in zip(starts, ids, strict=True):
            row = self._row(start, run_id, None)
            if run_id in rows:
                conflicts += self._differing([row], {run_id: (start.name, rows[run_id]["input"])})
            else:
                rows[run_id] = row
        _refuse(conflicts)
        new = await (self._join(rows) if self._database.in_unit_of_work() else self._insert_all(rows))
        started = Counter(row["workflow"] for row in new)

        def begin() -> None:
            self._worker.announce()
            for name, number in started.items():
                _metrics.count_start(name, number)

        self._database.after_commit(begin)
        return ids

    def by_name(
        self, name: str, input: Mapping[str, Any], version: int | None, id: str | None, timeout_seconds: float | None
    ) -> Start:
        """What `WorkflowEngine.start_by_name` is to begin."""
        _names.name_of("workflow", name)
        run_id = None if id is None else _names.run_id(id)
        if timeout_seconds is not None:
            checked_seconds("timeout_seconds", timeout_seconds, zero=False)
        if version is None:
            version = max((number for known, number in self._workflows if known == name), default=None)
            if version is None:
                msg = f"this App has no workflow {name!r}, so it does not know the newest version: say version="
                raise ValueError(msg)
        workflow = self._workflows.get((name, version))
        if workflow is not None:
            signature = workflow.signature
            try:
                arguments = signature.fit_arguments(_json(name, input))
            except ValueError as error:
                msg = f"the input does not fit {workflow!r}: {error}"
                raise TypeError(msg) from None
            text = signature.dump_arguments(signature.bind((), arguments))
            return Start(name, version, text, run_id, workflow.timeout_seconds)
        return Start(name, version, _json(name, input), run_id, timeout_seconds)

    def _row(self, start: Start, run_id: str, identity: Identity | None) -> dict[str, Any]:
        return new_run(
            id=run_id,
            workflow=start.name,
            version=start.version,
            worker=None if identity is None else identity.lease.name,
            input=self._payloads.seal(start.input, run_id),
            context=json.dumps(current().to_dict()),
            left_seconds=start.timeout_seconds,
        )

    async def _insert(self, row: dict[str, Any]) -> bool:
        """Whether the run is a new one."""
        for attempt in range(1, _TRIES + 1):
            try:
                await self._database.write(START, row, route=row["id"])
                return True
            except Conflict:
                await self._is_new(row)
                return False
            except CommitUnknown:
                if attempt == _TRIES:
                    raise
        raise AssertionError

    async def _is_new(self, row: dict[str, Any]) -> bool:
        """Whether what the table has is what was just written inside a unit of work."""
        found = await self._database.read(FIND, {"run": row["id"]})
        if not found:
            return True  # a batch only collects, so it is not there yet
        there = found[0]
        _refuse(self._differing([row], {there.id: (there.workflow, there.first_input or there.input)}))
        return bool(there.status == row["status"] and there.worker == row["worker"] and there.epoch == row["epoch"])

    async def _join(self, rows: Mapping[str, dict[str, Any]]) -> Sequence[dict[str, Any]]:
        """Write them within the unit of work that is open."""
        there = await self._there(rows)
        left = [row for row in rows.values() if row["id"] not in there]
        for some in _slices(left):
            await self._database.write(START_QUIETLY[self._database.dialect], some)
        await self._there(rows)  # another process may have been faster
        return left

    async def _insert_all(self, rows: Mapping[str, dict[str, Any]]) -> Sequence[dict[str, Any]]:
        """Write those that are not there yet, and return them."""
        left = list(rows.values())
        for attempt in range(1, _TRIES + 1):
            try:
                async with self._database.batch():
                    for some in _slices(left):
                        await self._database.write(START, some)
            except (Conflict, CommitUnknown):
                if attempt == _TRIES:
                    raise
                there = await self._there(rows)
                left = [row for row in rows.values() if row["id"] not in there]
            else:
                break
        return left

    async def _there(self, rows: Mapping[str, dict[str, Any]]) -> set[str]:
        """The ids that have runs, which are those that are started.

        Raises:
            RunConflict: some are others.
        """
        there: dict[str, tuple[str, str]] = {}
        for some in _slices(list(rows)):
            for row in await self._database.read(FIND_ALL, {"ids": some}):
                there[row.id] = row.workflow, row.first_input or row.input
        _refuse(self._differing([rows[run_id] for run_id in there], there))
        return set(there)

    def _differing(self, rows: Sequence[Mapping[str, Any]], there: Mapping[str, tuple[str, str]]) -> list[str]:
        """How the runs that there are, by workflow and stored input, differ from those that are started."""
        found: list[str] = []
        for row in rows:
            run_id, workflow = row["id"], self._workflows.get((row["workflow"], row["version"]))
            name, stored = there[run_id]
            here = {"workflow": row["workflow"], "input": self._payloads.open(row["input"], run_id)}
            difference = _difference(here, name, self._payloads.open(stored, run_id), workflow)
            if difference is not None:
                found.append(f"run {run_id!r} exists, with {difference}")
        return found


def _json(name: str, input: Mapping[str, Any]) -> str:
    try:
        text = json.dumps(dict(input), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        text.encode()  # half a pair of surrogates is no text
    except (TypeError, ValueError) as error:
        msg = f"the input of workflow {name} is nothing that JSON can say: {error}"
        raise TypeError(msg) from None
    return text


def _slices(items: Sequence[Any]) -> Sequence[Sequence[Any]]:
    return [items[first : first + _AT_ONCE] for first in range(0, len(items), _AT_ONCE)]


def _refuse(conflicts: Sequence[str]) -> None:
    if conflicts:
        more = "" if len(conflicts) <= _NAMED else f"; and {len(conflicts) - _NAMED} more"
        msg = f"{'; '.join(conflicts[:_NAMED])}{more}: an id names one run for as long as that is kept"
        raise RunConflict(msg)


def _difference(row: Mapping[str, Any], name: str, stored: str, workflow: AnyWorkflow | None) -> str | None:
    """What the run that has the id has instead. Inputs are compared by value, as today's types read both.

    Args:
        row: what is started.
        name, stored: the workflow of the run that there is, and the input that it was started with.
        workflow: what is started, where this process knows it.
    """
    if name != row["workflow"]:
        return f"workflow {name!r}"
    if stored == row["input"]:
        return None
    if workflow is None:  # as JSON has it: the order of members does not count
        same = digest(json.loads(stored)) == digest(json.loads(row["input"]))
        return None if same else "another input"
    signature = workflow.signature
    try:
        there = signature.load_arguments(stored)
    except ValueError:
        return f"an input that {workflow!r} cannot read today"
    return None if signature.same_arguments(there, signature.load_arguments(row["input"])) else "another input"
