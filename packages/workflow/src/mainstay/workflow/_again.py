"""Whether a run that is started again is the one that its id names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mainstay.database import CommitUnknown, Conflict, Database
from mainstay.workflow._payloads import Payloads
from mainstay.workflow.errors import RunConflict
from mainstay.workflow.tables import FIND, START
from mainstay.workflow.workflow import AnyWorkflow

_TRIES = 5  # a commit whose end was not seen is looked up by trying again


class Beginnings:
    """The rows of runs that are started.

    Args:
        workflows: those that this process knows, by name and version.
    """

    def __init__(
        self, database: Database, payloads: Payloads, workflows: Mapping[tuple[str, int], AnyWorkflow]
    ) -> None:
        self._database = database
        self._payloads = payloads
        self._workflows = workflows

    async def insert(self, row: dict[str, Any]) -> bool:
        """Whether the run is a new one.

        Raises:
            RunConflict: another run has its id.
        """
        for attempt in range(1, _TRIES + 1):
            try:
                await self._database.write(START, row, route=row["id"])
                return True
            except Conflict:
                await self.is_new(row)
                return False
            except CommitUnknown:
                if attempt == _TRIES:
                    raise
        raise AssertionError

    async def is_new(self, row: dict[str, Any]) -> bool:
        """Whether what the table has is what was just written inside a unit of work.

        Raises:
            RunConflict: it is another run.
        """
        found = await self._database.read(FIND, {"run": row["id"]})
        if not found:
            return True  # a batch only collects, so it is not there yet
        there = found[0]
        same_run(
            row | {"input": self._payloads.open(row["input"], row["id"])},
            there.workflow,
            self._payloads.open(there.first_input or there.input, row["id"]),
            self._workflows.get((row["workflow"], row["version"])),
        )
        return bool(there.status == row["status"] and there.worker == row["worker"] and there.epoch == row["epoch"])


def same_run(row: Mapping[str, Any], name: str, stored: str, workflow: AnyWorkflow | None) -> None:
    """Refuse another run than the one that has the id. Inputs are compared by value, as today's types read both.

    Args:
        row: what is started.
        name, stored: the workflow of the run that there is, and the input that it was started with.
        workflow: what is started, where this process knows it.

    Raises:
        RunConflict: it is another workflow, or another input, or one that cannot be read any more.
    """
    if name != row["workflow"]:
        what = f"workflow {name!r}"
    elif stored == row["input"]:
        return
    elif workflow is None:
        what = "another input"
    else:
        signature = workflow.signature
        try:
            there = signature.load_arguments(stored)
        except ValueError:
            what = f"an input that {workflow!r} cannot read today"
        else:
            if signature.same_arguments(there, signature.load_arguments(row["input"])):
                return
            what = "another input"
    msg = f"run {row['id']!r} exists, with {what}: an id names one run for as long as that is kept"
    raise RunConflict(msg)
