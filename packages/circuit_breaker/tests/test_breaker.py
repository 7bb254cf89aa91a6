"""The state machine of one circuit, on a virtual clock."""

import asyncio
import pickle
import random
from typing import Any

import pytest

from mainstay.circuit_breaker import BreakerConfig, CircuitBreaker, CircuitOpen, KeyedBreaker, State, StateChange
from mainstay.circuit_breaker._windows import CountWindow, TimeWindow
from mainstay.circuit_breaker.testing import Dependency, forced
from mainstay.core import MainstayError
from mainstay.core.testing import VirtualClock

QUICK = BreakerConfig(minimum_calls=4, break_jitter=0, ramp_seconds=0, probe_successes=1)


class Boom(Exception):
    pass


async def fine(value: object = None) -> object:
    return value


async def broken() -> None:
    raise Boom


async def fail(breaker: CircuitBreaker, times: int) -> None:
    for _ in range(times):
        with pytest.raises(Boom):
            await breaker.call(broken)


async def test_it_opens_at_the_ratio_and_not_below_the_minimum(clock: VirtualClock) -> None:
    """Three failures of three calls leave it closed, because a ratio of three says nothing; the fourth opens it."""
    breaker = CircuitBreaker("p", QUICK, clock=clock)
    await fail(breaker, 3)
    assert breaker.snapshot().state is State.CLOSED
    await fail(breaker, 1)
    assert breaker.snapshot().state is State.OPEN
    with pytest.raises(CircuitOpen) as rejection:
        await breaker.call(fine)
    assert (rejection.value.name, rejection.value.state, rejection.value.retry_after_seconds) == ("p", "open", 5.0)
    assert rejection.value.no_effect
    assert "p is open; try again in 5 s" in str(rejection.value)


async def test_successes_dilute_the_ratio(clock: VirtualClock) -> None:
    """Six successes and five failures are below one half; the sixth failure is one half and opens it."""
    breaker = CircuitBreaker("p", QUICK, clock=clock)
    for _ in range(6):
        await breaker.call(fine)
    await fail(breaker, 5)
    assert breaker.snapshot().state is State.CLOSED
    await fail(breaker, 1)
    assert breaker.snapshot().state is State.OPEN


async def test_old_calls_leave_a_time_window(clock: VirtualClock) -> None:
    """Failures older than the window do not count towards the next ones."""
    breaker = CircuitBreaker("p", QUICK, clock=clock)
    await fail(breaker, 3)
    await clock.advance(61)
    await fail(breaker, 3)
    assert breaker.snapshot().state is State.CLOSED
    assert breaker.snapshot().calls == 3


async def test_old_calls_leave_a_count_window(clock: VirtualClock) -> None:
    """Of a window of ten calls only the last ten count, however many there were."""
    breaker = CircuitBreaker("p", QUICK.model_copy(update={"window_calls": 10}), clock=clock)
    await fail(breaker, 3)
    for _ in range(9):
        await breaker.call(fine)
    snapshot = breaker.snapshot()
    assert (snapshot.calls, snapshot.failures) == (10, 1)
    await fail(breaker, 3)
    assert breaker.snapshot().state is State.CLOSED  # the old one has left: 3 of 10
    assert breaker.snapshot().failures == 3
    await fail(breaker, 2)
    assert breaker.snapshot().state is State.OPEN


async def test_recovery_probe_by_probe(clock: VirtualClock) -> None:
    """After the break one probe goes through; its success closes, its failure opens again, for longer."""
    breaker = CircuitBreaker("p", QUICK, clock=clock)
    await fail(breaker, 4)
    await clock.advance(5)
    await fail(breaker, 1)
    assert breaker.snapshot().state is State.OPEN
    assert breaker.snapshot().retry_after_seconds == 10.0
    await clock.advance(10)
    assert await breaker.call(fine, 7) == 7
    assert breaker.snapshot().state is State.CLOSED
    await fail(breaker, 4)
    assert breaker.snapshot().retry_after_seconds == 5.0  # recovered once: the next break is the first again


async def test_listeners_hear_every_change_in_order(clock: VirtualClock) -> None:
    """A listener gets before, after and the numbers that led to it; one that raises disturbs no other."""
    breaker = CircuitBreaker("p", QUICK, clock=clock)
    heard: list[StateChange] = []
    breaker.on_change(lambda change: 1 / 0)
    breaker.on_change(heard.append)
    await fail(breaker, 4)
    await clock.advance(5)
    await breaker.call(fine)
    assert [(change.before, change.after) for change in heard] == [
        (State.CLOSED, State.OPEN),
        (State.OPEN, State.HALF_OPEN),
        (State.HALF_OPEN, State.CLOSED),
    ]
    assert heard[0].reason == "4 of 4 calls failed"
    assert heard[0].break_seconds == 5.0


def test_plain_functions(clock: VirtualClock) -> None:
    """The same object decorates plain functions."""
    breaker = CircuitBreaker("p", QUICK, clock=clock)

    @breaker
    def divide(a: int, b: int) -> float:
        """Divide."""
        return a / b

    assert divide(6, 3) == 2
    assert divide.__doc__ == "Divide."
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            divide(1, 0)
    with pytest.raises(CircuitOpen):
        divide(6, 3)


class Declined(MainstayError):
    code = "BIZ_DECLINED"
    status = 409
    title = "Declined"


async def test_a_refusal_is_an_answer(clock: VirtualClock) -> None:
    """A dependency that declines a card works: such errors count as successes, and end half open too."""
    breaker = CircuitBreaker("p", QUICK, clock=clock)

    async def decline() -> None:
        raise Declined

    await fail(breaker, 4)
    await clock.advance(5)
    with pytest.raises(Declined):
        await breaker.call(decline)
    assert breaker.snapshot().state is State.CLOSED
    assert breaker.totals()["success"] == 1
    for _ in range(20):
        with pytest.raises(Declined):
            await breaker.call(decline)
    assert breaker.snapshot().state is State.CLOSED


async def test_a_cancelled_caller_is_neutral(clock: VirtualClock) -> None:
    """Twenty callers who go away open nothing and are counted as neutral."""
    breaker = CircuitBreaker("p", QUICK, clock=clock)

    async def hang() -> None:
        await asyncio.Event().wait()

    for _ in range(20):
        task = asyncio.create_task(breaker.call(hang))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert breaker.snapshot().state is State.CLOSED
    assert breaker.totals() == {"success": 0, "failure": 0, "neutral": 20, "late": 0, "rejected": 0}


async def test_the_ramp_lets_a_growing_share_through(clock: VirtualClock) -> None:
    """A hundred calls a second over a ramp of ten: a tenth at first, all in the end, about 55 in 100 altogether."""
    breaker = CircuitBreaker("p", BreakerConfig(ramp_seconds=10, ramp_start=0.1), clock=clock)
    passed: list[int] = []
    with forced(breaker, State.RAMPING):
        for _ in range(9):
            before = breaker.totals()["success"]
            for _ in range(100):
                clock.tick(0.01)
                await asyncio.gather(breaker.call(fine), return_exceptions=True)
            passed.append(breaker.totals()["success"] - before)
        clock.tick(1)
        await breaker.call(fine)
        assert breaker.snapshot().state is State.CLOSED
        assert breaker.snapshot().calls > 400  # the ramp's calls are evidence in the closed circuit's window
    assert passed == sorted(passed)
    assert passed[0] == pytest.approx(15, abs=2)
    assert passed[-1] == pytest.approx(95, abs=2)


async def test_a_failure_on_the_ramp_halves_the_share_and_many_open(clock: VirtualClock) -> None:
    """One failure among successes costs half of the share; failures that outrun its growth open the circuit again."""
    config = BreakerConfig(ramp_seconds=10, ramp_start=0.4, minimum_calls=1000, break_jitter=0)
    breaker = CircuitBreaker("p", config, clock=clock)
    with forced(breaker, State.RAMPING):
        await breaker.call(fine)
        await clock.advance(4)
        with pytest.raises(CircuitOpen, match="ramping; try again in 1 s"):
            await breaker.call(fine)  # eight in ten pass, the first of them does not
        assert breaker.snapshot().share == pytest.approx(0.8)
        while breaker.snapshot().share > 0.45:
            await asyncio.gather(breaker.call(broken), return_exceptions=True)
        assert breaker.snapshot().share == pytest.approx(0.4)
        while breaker.snapshot().state is State.RAMPING:
            await asyncio.gather(breaker.call(broken), return_exceptions=True)
        assert breaker.snapshot().state is State.OPEN
        assert breaker.reason == "failures outran the ramp"


async def test_a_slow_probe_is_no_recovery(clock: VirtualClock) -> None:
    """Where slow calls count, an answer that comes too late opens the circuit again."""
    breaker = CircuitBreaker("p", BreakerConfig(slow_seconds=1), clock=clock)

    async def slow() -> None:
        await clock.sleep(2)

    with forced(breaker, State.HALF_OPEN):
        task = asyncio.create_task(breaker.call(slow))
        await clock.advance(2)
        await task
        assert breaker.snapshot().state is State.OPEN
        assert breaker.reason == "a probe took longer than 1 s"


async def test_breaks_grow_with_jitter_to_their_bound(clock: VirtualClock) -> None:
    """Each recovery that fails makes the next break longer, within the jitter, up to the bound, however often."""
    config = BreakerConfig(break_seconds=1, break_growth=3, max_break_seconds=20, break_jitter=0.2)
    breaker = CircuitBreaker("p", config, clock=clock)
    breaker.trip("test")
    lengths: list[float] = []
    for _ in range(2000):
        retry_after = breaker.snapshot().retry_after_seconds
        assert retry_after is not None
        lengths.append(retry_after)
        clock.tick(retry_after)
        await asyncio.gather(breaker.call(broken), return_exceptions=True)
    for length, nominal in zip(lengths, (1, 3, 9, 20, 20), strict=False):
        assert 0.8 * nominal <= length <= 1.2 * nominal
    assert len(set(lengths[10:])) > 1000


def test_windows_keep_what_they_hold_when_resized() -> None:
    """Longer, shorter, and from calls to seconds and back: what is young enough stays, nothing comes back."""
    window = TimeWindow(10.0, 0, 0.0)
    for second in range(10):
        window.turn(float(second))
        window.successes += 10
        window.fail(float(second))
    assert window.totals(9.0) == (110, 10, 0)
    window.resize(5.0, 9.0)
    calls, failures, _ = window.totals(9.0)
    assert 44 <= calls <= 66
    assert 4 <= failures <= 6
    window.resize(100.0, 9.0)
    assert window.totals(9.0) == (calls, failures, 0)
    assert window.totals(200.0) == (0, 0, 0)

    long_lived = TimeWindow(10.0, 0, 0.0)
    long_lived.successes = 2**33 + 2**32 - 5
    long_lived.turn(1.0)
    long_lived.successes += 10  # past a multiple of 2**32, which is as much of a counter as the window keeps
    long_lived.turn(10.5)
    assert long_lived.totals(10.5) == (10, 0, 0)

    counting = CountWindow(10, 0)
    counting.successes += 8
    counting.fail(0.0)
    counting.fail(0.0)
    counting.resize(5)
    assert counting.totals(0.0) == (5, 2, 0)
    counting.resize(100)
    assert counting.totals(0.0) == (5, 2, 0)
    counting.successes += 30
    assert counting.totals(0.0) == (35, 2, 0)

    for seeded in (CountWindow(50, 0), TimeWindow(60.0, 0, 0.0)):
        seeded.seed((20, 5, 3), 2)
        assert seeded.totals(0.0) == (20, 5, 3)
        seeded.fail(0.0)
        assert (seeded.totals(0.0), seeded.streak) == ((21, 6, 3), 3)
        seeded.successes += 1
        seeded.fail(0.0)
        assert seeded.streak == 1


async def test_rejections_survive_pickling() -> None:
    """A rejection that crosses a process boundary keeps what it says."""
    error = pickle.loads(pickle.dumps(CircuitOpen("p", "open", 2.5)))  # noqa: S301  our own bytes
    assert (type(error), str(error), error.retry_after_seconds) == (CircuitOpen, "p is open; try again in 2.5 s", 2.5)


@pytest.mark.parametrize("size", [1, 7, 1000, 1001, 2000, 4990, 5000])
def test_a_count_window_holds_the_newest_calls(size: int) -> None:
    """Beside a list of all calls: exact up to a thousand, and beyond that for as many calls as the window says."""
    window = CountWindow(size, 0)
    failed, slow = [0], [0]  # of the first n calls, for each n: what any stretch of them holds is a difference
    choice = random.Random(size)  # noqa: S311  makes the mixture repeatable
    for _ in range(400):
        successes = choice.choice((0, 1, 2, 30, size // 3))
        window.successes += successes
        failed += [failed[-1]] * successes
        slow += [slow[-1]] * successes
        if choice.random() < 0.7:
            is_slow = choice.random() < 0.5
            window.fail(0.0)
            if is_slow:
                window.mark_slow(0.0)
            failed.append(failed[-1] + 1)
            slow.append(slow[-1] + is_slow)
        held, failures, slow_ones = window.totals(0.0)
        calls = len(failed) - 1
        assert min(calls, size) <= held <= min(calls, size if size <= 1000 else size * 1.05 + 21)
        assert failures == failed[-1] - failed[calls - held]
        assert slow_ones == slow[-1] - slow[calls - held]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"window_seconds": 60}, {"window_calls": 100}),
        ({"window_calls": 100}, {"window_seconds": 60}),
        ({"window_calls": 100}, {"window_calls": 10_000}),
        ({"window_calls": 10_000}, {"window_calls": 100}),
    ],
)
async def test_a_reload_keeps_the_streak_and_the_share(
    clock: VirtualClock, before: dict[str, int], after: dict[str, int]
) -> None:
    """Four failures in a row are four in another window too; a window too short for all calls keeps their share."""
    streak = BreakerConfig(failure_ratio=None, consecutive_failures=5)
    breaker = CircuitBreaker("p", streak.model_copy(update=before), clock=clock)
    await fail(breaker, 4)
    breaker.reload(streak.model_copy(update=after))
    await fail(breaker, 1)
    assert breaker.reason == "5 failures in a row"
    breaker = CircuitBreaker("p", QUICK.model_copy(update=before), clock=clock)
    for number in range(400):
        await asyncio.gather(breaker.call(broken if number % 4 == 0 else fine), return_exceptions=True)
    breaker.reload(QUICK.model_copy(update=after))
    snapshot = breaker.snapshot()
    assert snapshot.calls == min(400, *(n for n in (before.get("window_calls"), after.get("window_calls")) if n))
    assert snapshot.failures == snapshot.calls // 4
    assert (snapshot.successes_total, snapshot.failures_total) == (300, 100)


async def test_a_reload_while_open_aims_the_end_of_the_break_anew(clock: VirtualClock) -> None:
    """A break of a thousand seconds becomes one of two, counted from its beginning, and a ramp may be taken away."""
    long = QUICK.model_copy(update={"break_seconds": 1000.0, "max_break_seconds": 5000.0})
    breaker = CircuitBreaker("p", long, clock=clock)
    await fail(breaker, 4)
    await clock.advance(1)
    breaker.reload(BreakerConfig(break_seconds=2, break_jitter=0, probe_successes=1, ramp_seconds=100))
    assert breaker.snapshot().retry_after_seconds == 1.0
    with pytest.raises(CircuitOpen):
        await breaker.call(fine)
    await clock.advance(1)
    await breaker.call(fine)
    assert breaker.snapshot().state is State.RAMPING
    breaker.reload(QUICK)
    await breaker.call(fine)
    assert breaker.snapshot().state is State.CLOSED


async def later(*_: object) -> bool:
    return False


def unchecked(value: object) -> Any:
    """What a caller without a type checker may pass."""
    return value


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: CircuitBreaker("p", unchecked({"failure_ratio": 0.5})),
            "breaker 'p' is configured by a BreakerConfig, not {",
        ),
        (lambda: CircuitBreaker("p").reload(unchecked({})), "is configured by a BreakerConfig"),
        (lambda: CircuitBreaker("p").reload(unchecked(None)), "is configured by a BreakerConfig"),
        (
            lambda: CircuitBreaker("p", failed_result=unchecked(500)),
            "failed_result is 500; it is a function",
        ),
        (lambda: CircuitBreaker("p", failed_result=unchecked(later)), "failed_result is an async function"),
        (lambda: CircuitBreaker("p").on_change(later), "a listener is an async function"),
        (
            lambda: KeyedBreaker("p", key=unchecked("host")),
            "key is 'host'; it is a function",
        ),
        (lambda: KeyedBreaker("p", key=unchecked(later)), "key is an async function"),
    ],
)
def test_arguments_of_another_kind_are_refused(make, message: str) -> None:
    """Each is refused where it is written, and the message says what to write instead."""
    with pytest.raises(TypeError, match=message):
        make()


@pytest.mark.parametrize("max_keys", [0, 2.5, float("nan")])
def test_an_impossible_number_of_keys_is_refused(max_keys: int) -> None:
    """With field, value and range."""
    with pytest.raises(ValueError, match=rf"KeyedBreaker\('p'\): max_keys is {max_keys}; it is 1 or more"):
        KeyedBreaker("p", key=str, max_keys=max_keys)


def test_a_reload_at_the_edge_of_a_bucket_moves_no_call():
    """A call that left the window by its old edges has left it after a reload, too: of the same length, or of half."""
    window = TimeWindow(5.0, 0, 0.0)
    window.successes += 1
    window.turn(1.0)
    window.successes += 1
    window.resize(5.0, 1.0)
    assert window.totals(4.75) == (2, 0, 0)
    assert window.totals(5.0) == (1, 0, 0)
    window = TimeWindow(10.0, 0, 0.0)
    window.successes += 1
    window.turn(1.0)
    window.successes += 1
    window.turn(2.0)
    window.resize(20.0, 2.0)
    window.resize(10.0, 2.0)
    assert window.totals(9.75) == (2, 0, 0)
    assert window.totals(11.5) == (0, 0, 0)


async def test_a_slow_success_ends_a_streak_of_failures(clock: VirtualClock) -> None:
    """Also where a reload has lowered the number of failures in a row that opens."""
    rules = BreakerConfig(consecutive_failures=3, failure_ratio=None, slow_seconds=1.0, slow_ratio=1.0, minimum_calls=1)
    breaker = CircuitBreaker("streak", rules, clock=clock)

    @breaker
    async def call(*, fails: bool = False, seconds: float = 0.0) -> None:
        clock.tick(seconds)
        if fails:
            raise ConnectionError

    for _ in range(2):
        with pytest.raises(ConnectionError):
            await call(fails=True)
    breaker.reload(rules.model_copy(update={"consecutive_failures": 2}))
    await call(seconds=1.5)
    assert breaker.state is State.CLOSED


async def test_a_circuit_that_is_forced_open_says_when_to_come_back(clock: VirtualClock) -> None:
    """What the operator said, or a break's length, at each rejection anew: a caller that waits need not give up."""
    breaker = CircuitBreaker("p", BreakerConfig(break_seconds=7), clock=clock)
    for told, after in ((None, 7), (900, 900)):
        breaker.force_open("maintenance", retry_after_seconds=told)
        for _ in range(2):
            with pytest.raises(CircuitOpen, match=f"p is forced open; try again in {after} s") as rejected:
                await breaker.call(Dependency())
            assert rejected.value.retry_after_seconds == after
            await clock.advance(1000)  # and it stays open
    breaker.reset()
    await breaker.call(Dependency())


@pytest.mark.parametrize("seconds", [0, -1, float("inf"), float("nan"), "soon", True])
def test_an_impossible_time_to_come_back_is_refused(seconds: Any) -> None:
    """And the circuit stays as it was."""
    breaker = CircuitBreaker("p")
    with pytest.raises(ValueError, match=r"retry_after_seconds is .*; it is more than 0 and finite, or None"):
        breaker.force_open(retry_after_seconds=seconds)
    assert breaker.state is State.CLOSED
