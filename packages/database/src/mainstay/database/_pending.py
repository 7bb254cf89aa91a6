"""A write that waits in the recorder."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Hashable

from mainstay.database._statements import Operation
from mainstay.database.fence import Fence


class PendingWrite:
    """What one caller wants durable: all of it or nothing."""

    __slots__ = ("durable", "fence", "handed_in", "operations", "route", "rows")

    def __init__(self, operations: list[Operation], fence: Fence | None, route: Hashable) -> None:
        self.operations = operations
        self.fence = fence
        self.route = route
        self.rows = sum(len(rows) for _, rows in operations)
        self.handed_in = time.monotonic()
        self.durable: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def settle(self, error: Exception | None) -> None:
        """Tell the caller, if it still waits."""
        if not self.durable.done():
            if error is None:
                self.durable.set_result(None)
            else:
                self.durable.set_exception(error)
