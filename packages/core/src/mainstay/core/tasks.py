"""Tasks: how one is started, and why one ended."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextvars import Context as ContextVars
from typing import Any, TypeVar

__all__ = ["cancelled_from_outside", "spawn"]

T = TypeVar("T")


def spawn(work: Coroutine[Any, Any, T], *, name: str) -> asyncio.Task[T]:
    """Start a task with an *empty* context; the caller owns it and awaits it.

    A task that serves many callers must not carry the context of the one that happened to start it. Work that lasts as
    long as the App, or as long as it serves, is given to `App.background` or `App.serve` instead.
    """
    return asyncio.get_running_loop().create_task(work, name=name, context=ContextVars())


def cancelled_from_outside(error: BaseException | None = None) -> bool:
    """Whether the running task was asked to end.

    A `CancelledError` alone does not say so: the work inside may have made it up, or passed on one of its own tasks'.

    Args:
        error: the exception in hand; any other than a `CancelledError` answers False. None asks about the task only.
    """
    if error is not None and not isinstance(error, asyncio.CancelledError):
        return False
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
