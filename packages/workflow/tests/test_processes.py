"""Workers as processes: killed, put to sleep, asked to end, and taken over by others."""

import asyncio
import itertools
import os
import signal
from collections import Counter
from pathlib import Path

import pytest

from mainstay.core import App
from mainstay.workflow import RunStatus, WorkflowEngine
from mainstay_servers.frozen import frozen
from packages.workflow.tests.forked import Script

SCRIPT = Path(__file__).with_name("worker_process.py")
_WAIT = 45.0


@pytest.fixture
async def url(shared):
    """A database that processes can share."""
    return shared


@pytest.fixture
def workers(url, tmp_path):
    """Start worker processes with `workers()`; none survives the test."""
    started: list[Script] = []

    def start():
        started.append(Script(SCRIPT, url, tmp_path, errors=tmp_path / "log"))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
    print((tmp_path / "log").read_text()[-4_000:])


def lines(directory):
    ledger = directory / "ledger"
    return [line.split() for line in ledger.read_text().splitlines()] if ledger.exists() else []


async def until(condition):
    async with asyncio.timeout(_WAIT):
        while not condition():  # noqa: ASYNC110  other processes make it true
            await asyncio.sleep(0.005)


async def test_killed_again_and_again(url, workers, tmp_path, there):
    """However often workers are killed, every run ends, nothing is lost or left half done, and little is repeated."""
    kills = 4
    async with there.app_for(url):
        numbers = range(1, 43)
        runs = [await there.buy.start(n, id=f"r{n}") for n in numbers]
        worker = workers()
        for kill in range(1, kills + 1):
            before = len(lines(tmp_path))
            await until(
                lambda before=before, kill=kill: len(lines(tmp_path)) > before + 8 * kill or _all_done(tmp_path)
            )
            fresh = workers()
            worker.kill()
            worker.wait()
            worker = fresh
        async with asyncio.timeout(_WAIT):
            while not all([(await run.status()).terminal for run in runs]):  # noqa: ASYNC110  other processes do it
                await asyncio.sleep(0.05)
        statuses = [await run.status() for run in runs]
        assert statuses == [RunStatus.FAILED if n % 3 == 0 else RunStatus.COMPLETED for n in numbers]
        for n, run in zip(numbers, runs, strict=True):
            if n % 3:
                assert await run.result() == n
    done = Counter(key for what, key, _ in lines(tmp_path) if what == "do")
    undone = {key for what, key, _ in lines(tmp_path) if what == "undo"}
    for n in numbers:
        steps = {f"r{n}:0.0/hold:1", f"r{n}:0.1/hold:1", f"r{n}:charge:1"}
        if n % 3:
            assert {key for key in done if key.startswith(f"r{n}:")} == {*steps, f"r{n}:ship:1"}
            assert not undone & steps
        else:
            assert undone >= steps
    most = kills * (8 + 8)
    assert sum(done.values()) - len(done) <= most, "more was repeated than may be executing and unrecorded"
    assert len({process for _, _, process in lines(tmp_path)}) > 1
    _no_original_after_its_compensation(lines(tmp_path))


def _all_done(directory):
    return sum(what == "do" and key.endswith(":ship:1") for what, key, _ in lines(directory)) == 28


def _no_original_after_its_compensation(ledger):
    undone: set[str] = set()
    for what, key, _ in ledger:
        assert not (what == "do" and key in undone), f"{key} was done after it was undone"
        if what == "undo":
            undone.add(key)


async def test_trap_8_a_live_peer_takes_over(url, workers, tmp_path, there):
    """The runs of a worker that was killed are finished by another that was there all the time."""
    async with there.app_for(url):
        first = workers()
        runs = [await there.gated.start(f"g{n}", id=f"g{n}") for n in range(5)]
        await until(lambda: sum(what == "at" for what, _, _ in lines(tmp_path)) == 5)
        second = workers()
        probe = await there.buy.start(1, id="probe")  # shows that the second worker is up, or that the first one is
        assert await probe.result(_WAIT) == 1
        first.kill()
        first.wait()
        (tmp_path / "open").touch()
        assert [await run.result(_WAIT) for run in runs] == [f"g{n}-2" for n in range(5)]
        assert second.is_alive()
        by = {name: process for what, name, process in lines(tmp_path) if what == "through"}
    assert by == {f"g{n}-{gate}": str(second.pid) for n, gate in itertools.product(range(5), (1, 2))}


async def test_trap_5_a_zombie_writes_nothing(url, workers, tmp_path, there):
    """A worker that slept while another took its run over gives up silently, and then works on under a new lease."""
    async with there.app_for(url) as app:
        first = workers()
        run = await there.gated.start("g", id="g")
        await until(lambda: ["at", "g-1", str(first.pid)] in lines(tmp_path))
        async with frozen(first.pid, url):
            second = workers()
            await until(lambda: ["at", "g-1", str(second.pid)] in lines(tmp_path))
            (tmp_path / "open").touch()
            assert await run.result(_WAIT) == "g-2"
            second.send_signal(signal.SIGTERM)
            assert second.wait(_WAIT) == 0
        # What it was in the middle of goes through its gate, but nothing that follows is begun.
        await until(lambda: ["through", "g-1", str(first.pid)] in lines(tmp_path))
        other = await there.buy.start(1, id="other")
        assert await other.result(_WAIT) == 1
        assert await run.status() is RunStatus.COMPLETED
        history = await app.get(WorkflowEngine).history("g")
        assert [(record.key, record.state, record.began) for record in history.records.values()] == [
            ("gate:1", "done", 2),
            ("gate:2", "done", 1),
        ]
    assert not [line for line in lines(tmp_path) if line[1] == "g-2" and line[2] == str(first.pid)]


async def test_trap_9_a_graceful_stop_burns_no_attempt(url, workers, tmp_path, there):
    """SIGTERM lets the step that is being executed finish and be recorded; the run goes back unharmed."""
    async with there.app_for(url) as app:
        first = workers()
        run = await there.gated.start("g", id="g")
        await until(lambda: len(lines(tmp_path)) == 1)
        first.send_signal(signal.SIGTERM)
        await until((tmp_path / "told").exists)
        (tmp_path / "open").touch()
        assert first.wait(_WAIT) == 0
        view = await app.get(WorkflowEngine).run("g")
        assert (view.status, view.attempts) == (RunStatus.QUEUED, 0)
        second = workers()
        assert await run.result(_WAIT) == "g-2"
    assert lines(tmp_path) == [
        ["at", "g-1", str(first.pid)],
        ["through", "g-1", str(first.pid)],
        ["at", "g-2", str(second.pid)],
        ["through", "g-2", str(second.pid)],
    ]


async def test_two_workers_share_the_work(url, workers, tmp_path, there):
    """Two workers on one queue execute each run once."""
    async with there.app_for(url) as app:
        assert isinstance(app, App)
        first, second = workers(), workers()
        await until(lambda: all((tmp_path / f"serves-{each.pid}").exists() for each in (first, second)))
        gates = [await there.gated.start(f"g{n}", id=f"g{n}") for n in range(2)]
        runs = [await there.buy.start(n * 3 + 1, id=f"r{n}") for n in range(60)]
        (tmp_path / "open").touch()
        assert [await run.result(_WAIT) for run in runs] == [n * 3 + 1 for n in range(60)]
        for gate in gates:
            await gate.result(_WAIT)
        done = Counter(key for what, key, _ in lines(tmp_path) if what == "do")
        assert len(done) == 240
        assert set(done.values()) == {1}
        for process in (first, second):
            process.send_signal(signal.SIGTERM)
        assert [process.wait(_WAIT) for process in (first, second)] == [0, 0]
    assert os.getpid() not in {int(process) for _, _, process in lines(tmp_path)}
