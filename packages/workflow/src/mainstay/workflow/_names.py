"""What runs, signals, workflows and steps may be called: core's rule for identifiers, applied where a name comes in."""

from __future__ import annotations

from mainstay.core import checked_id

NAME_LENGTH = 100


def run_id(id: str) -> str:
    """The id of a run.

    Raises:
        TypeError: it is no `str`.
        ValueError: it breaks the rule, which the message names.
    """
    return checked_id(id, "the id of a run")


def signal_id(id: str) -> str:
    """The id of a message within its run. Raises what `run_id` does."""
    return checked_id(id, "the id of a signal")


def name_of(kind: str, name: str) -> str:
    """The name of a workflow or a signal. Raises what `run_id` does."""
    return checked_id(name, f"the name of a {kind}", longest=NAME_LENGTH)


def step_name(name: str) -> str:
    """The name of a step: its function's, which stands between `/` and `:` in every key. Raises what `run_id` does."""
    if not checked_id(name, "the name of a step", longest=NAME_LENGTH).isidentifier():
        msg = f"the name of a step is a Python identifier, as a function's name is, not {name!r}"
        raise ValueError(msg)
    return name
