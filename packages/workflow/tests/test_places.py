"""How many runs a worker executes at once."""

import asyncio

from mainstay.workflow import WorkflowRouter
from mainstay.workflow.testing import workflows


async def test_starting_many_at_once_takes_no_more_places_than_there_are(url):
    """Starts that are on their way together do not all find the same place free."""
    flows, full = WorkflowRouter(), asyncio.Event()
    busy = most = 0

    @flows.step(harmless=True)
    async def be_busy(n: int) -> int:
        nonlocal busy, most
        busy += 1
        most = max(most, busy)
        if busy == 3:
            full.set()
        if n:
            await full.wait()
        await asyncio.sleep(0.005)  # others, if there is place for them, come in
        busy -= 1
        return n

    @flows.workflow(name="busy")
    async def being_busy(n: int) -> int:
        return await be_busy(n)

    async with workflows(flows, url=url, max_runs=3, poll_seconds=5):
        await (await being_busy.start(0)).result(20)  # now the worker rests
        started = await asyncio.gather(*(being_busy.start(n) for n in range(1, 31)))
        assert [await run.result(20) for run in started] == list(range(1, 31))
    assert most == 3
