"""A cancellation that was accepted in another process is carried out, however far the run is by then."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from mainstay.core import Retry
from mainstay.core.testing import eventually
from mainstay.workflow import Done, RunStateError, RunStatus, Unknown, WorkflowEngine, WorkflowFailed, WorkflowRouter
from mainstay.workflow.testing import workflows

WAIT = 30.0


class Shop:
    """A saga that is cancelled by another process in the middle, and then goes where there is no way back."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.cancel: Callable[[], Awaitable[None]] | None = None
        flows = self.flows = WorkflowRouter()

        @flows.step()
        async def reserve(n: int) -> int:
            return n

        @reserve.compensation
        async def release(outcome: Done[int] | Unknown, n: int) -> None:
            self.log.append("release")

        @flows.step(pivot=True, on_unknown="park")
        async def commit(n: int) -> int:
            self.log.append("commit")
            return n

        @flows.step(pivot=True, transactional=True)
        async def book(n: int) -> int:
            self.log.append("book")
            return n

        @flows.step(retry=Retry(attempts=1))
        async def lost(n: int) -> int:
            raise ConnectionError(n)

        @lost.compensation
        async def find(outcome: Done[int] | Unknown, n: int) -> None:
            await self.cancelled()
            self.log.append("find")

        async def nothing(n: int) -> int:
            return n

        async def go_on(n: int) -> int:
            await self.sell.continue_with("end", n + 1)
            raise AssertionError

        async def catches(n: int) -> int:
            with contextlib.suppress(Exception):
                await lost(n)
            return n

        points: dict[str, Callable[[int], Awaitable[int]]] = {
            "end": nothing,
            "generation": go_on,
            "pivot": commit,
            "transactional pivot": book,
            "step in doubt": catches,
        }

        @flows.workflow(name="sell")
        async def sell(point: str, n: int) -> int:
            await reserve(n)
            if point != "step in doubt":
                await self.cancelled()
            return await points[point](n)

        self.sell: Any = sell

    async def cancelled(self) -> None:
        """Cancel the run from outside, once."""
        cancel, self.cancel = self.cancel, None
        if cancel is not None:
            await cancel()


@pytest.mark.parametrize(
    ("point", "undone"),
    [
        ("end", ["release"]),
        ("generation", ["release"]),
        ("pivot", ["release"]),
        ("transactional pivot", ["book", "release"]),  # its transaction is rolled back
        ("step in doubt", ["find", "release"]),
    ],
)
async def test_it_is_not_overtaken(shared: str, point: str, undone: list[str]) -> None:
    """By the end of the run, its next generation, a pivot, or the way back from a step in doubt."""
    shop = Shop()
    async with (
        workflows(shop.flows, url=shared) as app,
        workflows(WorkflowRouter(), url=shared, serve=False) as peer,
    ):
        shop.cancel = lambda: peer.get(WorkflowEngine).cancel("r")
        run = await shop.sell.start(point, 1, id="r")
        with pytest.raises(WorkflowFailed, match="cancelled"):
            await run.result(WAIT)
        assert await run.status() is RunStatus.CANCELLED
        assert (await app.get(WorkflowEngine).run("r")).generation == 1
    assert shop.log[-len(undone) :] == undone
    assert "commit" not in shop.log


async def test_one_that_is_refused_is_not_carried_out_and_one_that_is_accepted_is(shared: str) -> None:
    """Whatever the moment: the answer to whoever cancels is what becomes of the run."""
    shop = Shop()
    ends: list[tuple[str, RunStatus]] = []

    async def cancel_during(n: int, peer: WorkflowEngine) -> None:
        run = await shop.sell.start("end", n, id=f"r{n}")
        for _ in range(n):
            await asyncio.sleep(0)
        try:
            await peer.cancel(run.id)
        except RunStateError:
            answer = "refused"
        else:
            answer = "accepted"
        await eventually(lambda: ended(run), seconds=WAIT)
        ends.append((answer, await run.status()))

    async def ended(run: Any) -> bool:
        return bool((await run.status()).terminal)

    async with (
        workflows(shop.flows, url=shared),
        workflows(WorkflowRouter(), url=shared, serve=False) as peer,
    ):
        for n in range(40):
            await cancel_during(n, peer.get(WorkflowEngine))
        await asyncio.gather(*(cancel_during(n, peer.get(WorkflowEngine)) for n in range(40, 80)))
    assert set(ends) <= {("refused", RunStatus.COMPLETED), ("accepted", RunStatus.CANCELLED)}


async def test_one_that_waits_for_a_pivot_does_not_undo_what_is_behind_it(shared: str) -> None:
    """Accepted while the pivot is executed, it comes too late once that is done: the run goes forward to its end."""
    flows, executing, go_on, log = WorkflowRouter(), asyncio.Event(), asyncio.Event(), []

    @flows.step(pivot=True, on_unknown="park")
    async def commit(n: int) -> int:
        executing.set()
        await go_on.wait()
        log.append("commit")
        return n

    @flows.step(after_pivot=True)
    async def tell(n: int) -> int:
        log.append("tell")
        return n

    @flows.workflow(name="sell")
    async def sell(n: int) -> int:
        return await tell(await commit(n))

    async with workflows(flows, url=shared), workflows(WorkflowRouter(), url=shared, serve=False) as peer:
        run = await sell.start(1, id="r")
        await executing.wait()
        await peer.get(WorkflowEngine).cancel("r")
        go_on.set()
        assert await run.result(WAIT) == 1
    assert log == ["commit", "tell"]
