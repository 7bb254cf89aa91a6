"""The newest of a folder of revision files, read from their text.

A start asks nothing else about migrations where the tables are up to date, and importing Alembic takes a tenth of a
second. So this reads the two assignments that say which revision follows which, and gives up where a
file says them in any other way than plainly: Alembic is asked then.
"""

from __future__ import annotations

import ast
import functools
from pathlib import Path


def newest(folder: Path) -> str | None:
    """The revision that no other follows; None for a folder without revisions.

    Raises:
        LookupError: the text does not say it plainly, or there are several.
    """
    follows: dict[str, str | None] = {}
    for file in folder.glob("*.py"):
        if file.name == "__init__.py":  # Alembic passes it over, too
            continue
        try:
            said = _said(file.read_bytes())
        except (SyntaxError, ValueError, SystemError) as error:  # the last: a fault of CPython 3.11
            raise LookupError(str(file)) from error
        revision, before = said.get("revision"), said.get("down_revision")
        plain = isinstance(revision, str) and (before is None or isinstance(before, str)) and revision not in follows
        if not plain or said.get("branch_labels") or said.get("depends_on"):
            raise LookupError(str(file))
        follows[str(revision)] = before if before is None else str(before)
    last, gone = follows.keys() - follows.values(), set(follows.values()) - follows.keys() - {None}
    if len(last) > 1 or (follows and not last) or gone:
        raise LookupError(str(folder))
    return next(iter(last), None)


# Kept by the text: a process that starts many Apps, as a run of tests does, parses each file once.
@functools.lru_cache
def _said(text: bytes) -> dict[str, object]:
    """What a file assigns to Alembic's names, where that is a literal; others are left as they are written."""
    said: dict[str, object] = {}
    for statement in ast.parse(text).body:
        if isinstance(statement, ast.Assign):
            targets: list[ast.expr] = statement.targets
        elif isinstance(statement, ast.AnnAssign):
            targets = [statement.target]
        else:
            continue
        value = statement.value
        for target in targets:
            if isinstance(target, ast.Name):
                said[target.id] = value.value if isinstance(value, ast.Constant) else value
    return said
