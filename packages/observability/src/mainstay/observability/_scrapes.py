"""Scrapes: the metrics written out on a thread of their own, one scrape at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from mainstay.observability.metrics import encoder, exposition


class Scrapes:
    """Answers scrapes; those that come while one is under way share its answer.

    The executor that everybody's `to_thread` shares is full where a service hangs, which is when metrics are wanted.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "mainstay.observability scrapes")
        self._under_way: dict[str, asyncio.Future[tuple[str, bytes]]] = {}

    @contextmanager
    def answering(self) -> Generator[None, None, None]:
        """Answer until the block ends."""
        try:
            yield
        finally:
            self._thread.shutdown(wait=False, cancel_futures=True)

    async def metrics(self, accept: str) -> tuple[str, bytes]:
        """The metrics as (content type, body)."""
        _, content_type = encoder(accept)
        scrape = self._under_way.get(content_type)
        if scrape is None:
            scrape = asyncio.get_running_loop().run_in_executor(self._thread, exposition, accept)
            self._under_way[content_type] = scrape
            scrape.add_done_callback(lambda _: self._under_way.pop(content_type, None))
        return await asyncio.shield(scrape)
