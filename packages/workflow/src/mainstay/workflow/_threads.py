"""Plain `def` steps: executed in a bounded pool of threads, in the context of their attempt."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Threads:
    """At most so many plain functions at once; the others wait for a thread."""

    def __init__(self, at_most: int) -> None:
        self._pool = ThreadPoolExecutor(at_most, thread_name_prefix="mainstay.workflow step")

    def awaitable(self, function: Callable[P, T]) -> Callable[P, Awaitable[T]]:
        """The function, executed in a thread when it is awaited. A cancellation ends the wait, and not the thread."""

        @wraps(function)
        async def call(*args: P.args, **kwargs: P.kwargs) -> T:
            context = copy_context()

            def work() -> tuple[list[T], BaseException | None]:
                try:
                    return [context.run(function, *args, **kwargs)], None
                except BaseException as error:  # noqa: BLE001  raised below: not every exception passes a future
                    return [], error

            results, error = await asyncio.get_running_loop().run_in_executor(self._pool, work)
            if error is not None:
                try:
                    raise error
                finally:
                    del error  # its traceback holds this frame
            return results[0]

        return call

    def close(self) -> None:
        """Begin nothing more. What runs in a thread runs on: it cannot be stopped."""
        self._pool.shutdown(wait=False, cancel_futures=True)
