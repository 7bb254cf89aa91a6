"""An exception as text: without local variables, which hold secrets, and of a bounded size with all it is linked to."""

from __future__ import annotations

import traceback
from typing import Any, cast

from mainstay.observability._redaction import BROKEN

_LINKED = 64
_FRAMES = 24
_SHOWN = 8


def traceback_of(error: BaseException) -> str:
    """The traceback, as Python prints it.

    Of an exception with very many causes, contexts and members of groups, the first few, each without the others: the
    standard library takes seconds for all of them, or ends in a RecursionError.
    """
    linked = _linked(error)
    if len(linked) < _LINKED:
        return "".join(traceback.format_exception(error)).rstrip()
    shown = [
        "".join([*traceback.format_tb(each.__traceback__, limit=-_FRAMES), _last_line(each)])
        for each in linked[:_SHOWN]
    ]
    shown.append(f"[{_LINKED} or more linked exceptions; the others are not shown]")
    return "\n".join(shown)


def _last_line(error: BaseException) -> str:
    # Not `traceback.format_exception_only`, which looks at everything that is linked too.
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    try:
        return f"{name}: {error}"
    except BROKEN:
        return f"{name}: <its text fails>"


def _linked(error: BaseException) -> list[BaseException]:
    """`error` and what it is linked to, but not much more than `_LINKED`; each once, so that a circle ends."""
    found: list[BaseException] = []
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting and len(found) < _LINKED:
        each = waiting.pop(0)
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        found.append(each)
        waiting.append(each.__cause__)
        waiting.append(each.__context__)
        if isinstance(each, BaseExceptionGroup):
            members = cast("tuple[BaseException, ...]", cast("Any", each).exceptions)
            waiting.extend(members[:_LINKED])
    return found
