"""Whether a run that is started again is the one that its id names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mainstay.workflow.errors import RunConflict
from mainstay.workflow.workflow import AnyWorkflow


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
