"""Threads and tasks at once, with exact counts."""

import asyncio
import contextlib
import random
import sys
import threading
from types import FrameType
from typing import Any, Literal

import pytest

from mainstay.circuit_breaker import (
    AdaptiveBulkhead,
    BreakerConfig,
    Budget,
    Bulkhead,
    BulkheadFull,
    CircuitBreaker,
    CircuitOpen,
    Hedge,
    KeyedBreaker,
    Pipeline,
    Rejected,
    State,
)
from mainstay.core import Retry

NEVER = BreakerConfig(failure_ratio=None, consecutive_failures=1_000_000)


class Boom(Exception):
    pass


@pytest.fixture(autouse=True)
def switch_often():
    """Let threads switch as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def in_threads(number: int, work) -> None:
    """Run `work(index)` in threads that begin together; the first error is raised."""
    errors: list[BaseException] = []
    together = threading.Barrier(number)

    def run(index: int) -> None:
        together.wait()
        try:
            work(index)
        except BaseException as error:  # noqa: BLE001  raised again on the test's own thread
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize(
    "config",
    [
        NEVER,
        NEVER.model_copy(update={"window_calls": 50}),
        NEVER.model_copy(update={"window_seconds": 0.01, "slow_seconds": 60.0}),
    ],
    ids=["time window", "count window", "a window that turns all the time"],
)
def test_threads_and_tasks_lose_no_count(config: BreakerConfig) -> None:
    """Four threads of calls and four event loops of tasks: every single outcome is counted, once."""
    breaker = CircuitBreaker("stress", config)
    each = 4000

    @breaker
    def call(number: int) -> None:
        if number % 4 == 0:
            raise Boom

    @breaker
    async def call_async(number: int) -> None:
        await asyncio.sleep(0)
        if number % 4 == 0:
            raise Boom

    async def tasks() -> None:
        results = await asyncio.gather(*(call_async(number) for number in range(each)), return_exceptions=True)
        assert sum(isinstance(result, Boom) for result in results) == each // 4

    def work(index: int) -> None:
        if index % 2:
            asyncio.run(tasks())
            return
        for number in range(each):
            try:
                call(number)
            except Boom:
                assert number % 4 == 0

    in_threads(8, work)
    assert breaker.totals() == {
        "success": 8 * each * 3 // 4,
        "failure": 8 * each // 4,
        "neutral": 0,
        "late": 0,
        "rejected": 0,
    }


def test_threads_and_transitions_lose_no_count() -> None:
    """With a circuit that opens and recovers all the time, every call made is a success, a failure or late."""
    config = BreakerConfig(
        consecutive_failures=3,
        break_seconds=0.0001,
        max_break_seconds=0.0002,
        probes=2,
        ramp_seconds=0.0005,
        ramp_start=0.5,
    )
    breaker = CircuitBreaker("stress", config)
    each = 4000
    made = [0] * 8
    rejected = [0] * 8

    def work(index: int) -> None:
        choice = random.Random(index)  # noqa: S311  makes the mixture repeatable

        @breaker
        def call() -> None:
            made[index] += 1
            if choice.random() < 0.5:
                raise Boom

        for _ in range(each):
            try:
                call()
            except Boom:
                pass
            except CircuitOpen:
                rejected[index] += 1

    in_threads(8, work)
    totals = breaker.totals()
    assert sum(made) + sum(rejected) == 8 * each
    assert totals["success"] + totals["failure"] + totals["late"] == sum(made)
    assert totals["rejected"] == sum(rejected)
    assert breaker.rules.moves[list(State).index(State.OPEN)] > 10


def test_a_bulkhead_shared_by_threads_and_loops_keeps_its_limit_and_its_places() -> None:
    """Three places for four threads and four event loops: never more than three inside, none lost at the end."""
    bulkhead = Bulkhead(3, queue=1000, max_wait_seconds=30)
    guarded = Pipeline("stress", Retry(attempts=1), bulkhead)
    inside = 0
    most = 0
    done = 0
    lock = threading.Lock()

    def step(by: int) -> None:
        nonlocal inside, most, done
        with lock:
            inside += by
            most = max(most, inside)
            done += by < 0

    @guarded
    def call() -> None:
        step(1)
        step(-1)

    @guarded
    async def call_async() -> None:
        step(1)
        try:
            await asyncio.sleep(0)
        finally:
            step(-1)

    async def tasks(seed: int) -> None:
        choice = random.Random(seed)  # noqa: S311  makes the mixture repeatable
        calls = [asyncio.create_task(call_async()) for _ in range(200)]
        for task in calls:
            if choice.random() < 0.2:
                await asyncio.sleep(0)
                task.cancel()
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert all(result is None or isinstance(result, asyncio.CancelledError) for result in results)

    def work(index: int) -> None:
        if index % 2:
            asyncio.run(tasks(index))
            return
        for _ in range(200):
            call()

    in_threads(8, work)
    assert (inside, bulkhead.free, len(bulkhead.waiting)) == (0, 3, 0)
    assert most == 3
    assert done >= 800


async def test_a_thousand_tasks_through_a_full_pipeline() -> None:
    """What is admitted, queued and rejected adds up, and the limit holds."""
    bulkhead = Bulkhead(10, queue=90, max_wait_seconds=30)
    breaker = CircuitBreaker("stress", NEVER)
    inside = 0

    @Pipeline("stress", Retry(attempts=1), breaker, bulkhead)
    async def call() -> int:
        nonlocal inside
        inside += 1
        seen = inside
        await asyncio.sleep(0.001)
        inside -= 1
        return seen

    results = await asyncio.gather(*(call() for _ in range(1000)), return_exceptions=True)
    counted = [result for result in results if isinstance(result, int)]
    rejected = [result for result in results if isinstance(result, BulkheadFull)]
    assert (len(counted), len(rejected), max(counted)) == (100, 900, 10)
    assert breaker.totals() == {"success": 100, "failure": 0, "neutral": 900, "late": 0, "rejected": 0}
    assert not [result for result in results if isinstance(result, Rejected) and not result.no_effect]


@pytest.mark.parametrize(
    "changes",
    [
        [{"window_calls": 50}, {"slow_seconds": 60.0}, {"window_seconds": 0.01}, {}],
        [{"window_seconds": 0.01}, {"window_seconds": 30.0}],
        [{"window_calls": 50}, {"window_calls": 5000}],
    ],
    ids=["kind, length and features", "length of a time window", "length of a count window"],
)
def test_reloads_under_load_lose_no_count(changes: list[dict[str, object]]) -> None:
    """While six threads call, the window changes a few hundred times."""
    breaker = CircuitBreaker("stress", NEVER)
    each = 3000
    finished: list[int] = []
    done = threading.Event()

    @breaker
    def call(number: int) -> None:
        if number % 4 == 0:
            raise Boom

    def work(index: int) -> None:
        if index == 0:
            number = 0
            while not done.is_set():
                number += 1
                breaker.reload(NEVER.model_copy(update=changes[number % len(changes)]))
            return
        for number in range(each):
            try:
                call(number)
            except Boom:
                assert number % 4 == 0
        finished.append(index)
        if len(finished) == 6:
            done.set()

    in_threads(7, work)
    totals = breaker.totals()
    assert (totals["success"], totals["failure"]) == (6 * each * 3 // 4, 6 * each // 4)


@pytest.mark.parametrize(
    ("length", "other"),
    [({"window_seconds": 60.0}, {"window_seconds": 5.0}), ({"window_calls": 50}, {"window_calls": 20})],
    ids=["time", "count"],
)
def test_a_success_between_any_two_lines_of_a_resize_is_kept(
    length: dict[str, object], other: dict[str, object]
) -> None:
    """The fast path takes no lock: while a window is changed, every line of it may see one success more."""
    breaker = CircuitBreaker("stress", NEVER.model_copy(update=length))
    calls = 0

    @breaker
    def call() -> None: ...

    def another_success(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal calls
        if event == "line" and frame.f_code.co_name == "resize":
            calls += 1
            call()
        return another_success

    before = sys.gettrace()
    sys.settrace(another_success)
    try:
        breaker.reload(NEVER.model_copy(update=other))
    finally:
        sys.settrace(before)
    assert calls > 3
    assert breaker.totals()["success"] == calls


def test_keys_that_come_and_go_lose_no_count() -> None:
    """Threads and tasks call forty keys where there is room for eight: every outcome is counted once, none is held."""
    hosts = KeyedBreaker("stress", NEVER, key=lambda host, _: host, max_keys=8)
    each = 3000

    @hosts
    def call(host: int, number: int) -> None:
        if number % 4 == 0 and host < 4:
            raise Boom

    @hosts
    async def call_async(host: int, number: int) -> None:
        await asyncio.sleep(0)
        if number % 4 == 0 and host < 4:
            raise Boom

    failed = [0] * 8

    def work(index: int) -> None:
        choice = random.Random(index)  # noqa: S311  makes the mixture repeatable
        arguments = [(choice.randrange(40), number) for number in range(each)]

        async def tasks() -> None:
            for start in range(0, each, 100):
                calls = [call_async(*pair) for pair in arguments[start : start + 100]]
                results = await asyncio.gather(*calls, return_exceptions=True)
                failed[index] += sum(isinstance(result, Boom) for result in results)

        if index % 2:
            asyncio.run(tasks())
            return
        for pair in arguments:
            try:
                call(*pair)
            except Boom:
                failed[index] += 1

    in_threads(8, work)
    assert sum(failed) > 0
    assert hosts.totals() == {
        "success": 8 * each - sum(failed),
        "failure": sum(failed),
        "neutral": 0,
        "late": 0,
        "rejected": 0,
    }
    assert len(hosts) == 8
    assert {circuit.under_way for circuit in hosts.circuits()} == {0}


async def test_a_thousand_hedged_tasks_add_up() -> None:
    """Of every call one attempt succeeds or both fail, losers are neutral, and nothing is left running."""
    hedge = Hedge(0.001, budget=Budget(1.0, per_second=1000, throttle=None))
    breaker = CircuitBreaker("stress", NEVER)
    attempts = under_way = 0

    @Pipeline("stress", hedge, breaker)
    async def call(number: int) -> int:
        nonlocal attempts, under_way
        attempts += 1
        under_way += 1
        try:
            await asyncio.sleep(0.05 if attempts % 3 == 0 else 0)
            if number % 10 == 0:
                raise Boom
            return number
        finally:
            under_way -= 1

    results = await asyncio.gather(*(call(number) for number in range(1000)), return_exceptions=True)
    await hedge.drained()
    assert [result for result in results if not isinstance(result, Boom)] == [n for n in range(1000) if n % 10]
    totals = breaker.totals()
    assert (attempts, under_way, hedge.sent > 100) == (1000 + hedge.sent, 0, True)
    assert totals["success"] + totals["failure"] + totals["neutral"] == attempts
    assert totals["success"] >= 900
    assert (totals["late"], totals["rejected"]) == (0, 0)


@pytest.mark.parametrize("algorithm", ["aimd", "gradient"])
def test_an_adaptive_bulkhead_loses_no_place_while_its_limit_moves(algorithm: Literal["aimd", "gradient"]) -> None:
    """Four threads and four loops, whose callers may leave: never more inside than the maximum, none at the end."""
    bulkhead = AdaptiveBulkhead(
        4, minimum=2, maximum=6, algorithm=algorithm, slow_seconds=0.0005, queue=2000, max_wait_seconds=30
    )
    inside = most = done = 0
    lock = threading.Lock()

    def step(by: int) -> None:
        nonlocal inside, most, done
        with lock:
            inside += by
            most = max(most, inside)
            done += by < 0

    @bulkhead
    def call(number: int) -> None:
        step(1)
        step(-1)
        if number % 5 == 0:
            raise Boom

    @bulkhead
    async def call_async(number: int) -> None:
        step(1)
        try:
            await asyncio.sleep(0.001 if number % 7 == 0 else 0)
        finally:
            step(-1)
        if number % 5 == 0:
            raise Boom

    ended = [0] * 8

    async def tasks(index: int) -> None:
        choice = random.Random(index)  # noqa: S311  makes the mixture repeatable
        calls = [asyncio.create_task(call_async(number)) for number in range(200)]
        for task in calls:
            if choice.random() < 0.2:
                await asyncio.sleep(0)
                task.cancel()
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert all(result is None or isinstance(result, Boom | asyncio.CancelledError) for result in results)
        ended[index] = len(results)

    def work(index: int) -> None:
        if index % 2:
            asyncio.run(tasks(index))
            return
        for number in range(200):
            with contextlib.suppress(Boom):
                call(number)
            ended[index] += 1

    in_threads(8, work)
    assert ended == [200] * 8
    assert (inside, bulkhead.under_way, bulkhead.free, len(bulkhead.waiting)) == (0, 0, bulkhead.limit, 0)
    assert 2 <= bulkhead.limit <= 6
    assert 1 <= most <= 6
    assert done >= 800
