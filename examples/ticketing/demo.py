"""The demo: plays a purchases file through the office, kills the worker on the way, and audits what is left."""

from __future__ import annotations

import asyncio
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.markup import escape

from ticketing.engines import EngineMissing, EngineName, engine
from ticketing.facts import Sources, read_facts, read_rows
from ticketing.invariants import Facts, Verdict, effects_exactly_once, judge
from ticketing.processes import OfficeProcess, ProcessFailed, free_port, until_up
from ticketing.purchases import read_lines
from ticketing.report import Progress, breaker_changes, report

HOME = Path(__file__).parent
DEFAULT_PURCHASES = HOME / "purchases.jsonl"
CONCURRENCY = 8
OUTAGE_SECONDS = 30.0  # how long the API may answer that it cannot, as while another database server takes over
PATIENCE_SECONDS = 180.0

# When to strike: what it is called, who is asked, and what there is at least one of then. The provider says what it
# does, and the API in which states purchases are.
Moment = tuple[str, str, str]
MOMENTS: tuple[Moment, ...] = (
    ("in the middle of a charge", "provider", "charging"),
    ("between a charge and its answer", "provider", "unanswered"),
    ("between holding and charging", "api", "held"),
    ("in the middle of a refund", "provider", "refunding"),
)
NOTHING_GOING_ON = "when nothing was going on"


@dataclass(slots=True)
class Story:
    """What happened, as far as the databases do not tell it.

    Attributes:
        answers: the order that the API accepted for each line of the file, None where it refused it.
        reasons: why lines were refused, counted.
        kills: at which moment the worker was killed, counted.
        provider: what the provider did, counted.
        seconds: from the first purchase until the last had ended.
        stopped: the exit status of each process that was asked to stop; None for one that had to be killed.
        breaker: state changes of the circuit, counted.
    """

    answers: dict[int, str | None] = field(default_factory=dict)
    reasons: Counter[str] = field(default_factory=Counter)
    kills: Counter[str] = field(default_factory=Counter)
    provider: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    stopped: dict[str, int | None] = field(default_factory=dict)
    breaker: Counter[str] = field(default_factory=Counter)

    @property
    def accepted(self) -> list[str]:
        return [order for order in self.answers.values() if order is not None]


class Stuck(Exception):
    """Something did not come to an end in time."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a demo ended: the rows, the story, the verdicts, and where the rows came from."""

    facts: Facts
    story: Story
    verdicts: list[Verdict]
    sources: Sources

    @property
    def holds(self) -> bool:
        return all(verdict.holds for verdict in self.verdicts)


@dataclass(frozen=True, slots=True)
class Script:
    """What is to be played.

    Attributes:
        purchases: the file.
        engine: what carries the office.
        kills: how often the worker is killed on the way.
        seed: whom the provider treats badly.
    """

    purchases: Path = DEFAULT_PURCHASES
    engine: EngineName = "embedded"
    kills: int = 5
    seed: int = 1


async def play(script: Script, *, keep: bool = False, console: Console | None = None) -> int:
    """Run the demo, print its table, and return the exit status: 0 where every invariant held, 1 otherwise."""
    console = console or Console()
    loop, me = asyncio.get_running_loop(), asyncio.current_task()
    assert me is not None
    loop.add_signal_handler(signal.SIGTERM, me.cancel)  # as Ctrl-C does: the processes are stopped on the way out
    directory = Path(tempfile.mkdtemp(prefix="ticketing-"))
    try:
        outcome = await perform(script, directory, console)
        console.print(report(outcome.facts, outcome.story, outcome.verdicts, engine=script.engine))
        return 0 if outcome.holds else 1
    except (EngineMissing, ProcessFailed, Stuck) as error:
        reason = str(error)
    except asyncio.CancelledError:
        reason = "it was asked to stop"
    except Exception as error:  # noqa: BLE001  any error becomes one sentence for the user
        here = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).parent == HOME]
        reason = f"{type(error).__name__}: {error} ({Path(here[-1].filename).name}, line {here[-1].lineno})"
    finally:
        if keep:
            console.print(f"databases and logs: {directory}")
        else:
            shutil.rmtree(directory, ignore_errors=True)
        loop.remove_signal_handler(signal.SIGTERM)
    console.print(f"[bold red]The demo could not be played:[/] {escape(reason)}", soft_wrap=True)
    return 1


async def perform(script: Script, directory: Path, console: Console) -> Outcome:
    """Play the file on a fresh engine in `directory`, and judge what is left.

    Raises:
        EngineMissing: a server is not there.
        ProcessFailed: a process ended by itself.
        Stuck: not everything came to an end in time.
    """
    story = Story()
    async with engine(script.engine, directory) as where:
        sources = Sources(where, directory / "provider-ledger.sqlite3", script.purchases)
        async with _office(sources, directory, script.seed, story) as office:
            lines = list(read_lines(script.purchases))
            with Progress(console, len(lines)) as progress:
                started = time.monotonic()
                await office.sell(lines, script.kills, progress)
                story.seconds = time.monotonic() - started
                progress.say("waiting for the last events")
                await office.drained(sources)
        story.breaker = breaker_changes(directory / "worker.log")
        facts = await read_facts(sources, story.answers)
    verdicts = judge(facts)
    stubborn = [f"the {name} ended with {status}" for name, status in story.stopped.items() if status != 0]
    return Outcome(facts, story, [*verdicts, Verdict("every process stopped when asked", tuple(stubborn))], sources)


@asynccontextmanager
async def _office(sources: Sources, directory: Path, seed: int, story: Story) -> AsyncGenerator[_Office, None]:
    """Start provider, API and worker; stop them in reverse, in order, whatever happened."""
    ports = {name: free_port() for name in ("provider", "api", "worker")}
    urls = {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
    shared = sources.engine.environment | {"TICKETING_PROVIDER_URL": urls["provider"]}
    provider = OfficeProcess(
        "provider",
        str(sources.ledger),
        f"--port={ports['provider']}",
        f"--seed={seed}",
        environment={},
        log=directory / "provider.log",
    )
    api = OfficeProcess(
        "api",
        f"--port={ports['api']}",
        environment=shared | {"TICKETING_PURCHASES": str(sources.purchases)},
        log=directory / "api.log",
    )
    worker = OfficeProcess(
        "worker",
        environment=shared | {"MAINSTAY_OBSERVABILITY_HTTP_PORT": str(ports["worker"])},
        log=directory / "worker.log",
    )
    async with httpx.AsyncClient(timeout=30.0) as client:
        office = _Office(client, urls, api, worker, story)
        try:
            for process in (provider, api, worker):  # at once: each waits for what it needs
                process.start()
            await until_up(provider, f"{urls['provider']}/status")
            await until_up(api, f"{urls['api']}/health/ready")
            yield office
            story.provider = (await office.provider_status())["deeds"]
        except httpx.HTTPError:
            for process in (provider, api, worker):
                process.check()  # one that has ended is the better reason
            raise
        finally:
            try:
                for process in (worker, api, provider):
                    story.stopped[process.name] = await process.stop()
            finally:
                for process in (worker, api, provider):  # also when the waiting was cut short
                    process.end()


class _Office:
    """What the demo does to a running office."""

    def __init__(
        self,
        client: httpx.AsyncClient,
        urls: dict[str, str],
        api: OfficeProcess,
        worker: OfficeProcess,
        story: Story,
    ) -> None:
        self._client = client
        self._urls = urls
        self._api = api
        self._worker = worker
        self._story = story

    async def sell(self, lines: list[tuple[int, bytes]], kills: int, progress: Progress) -> None:
        """Play the file to its end, with so many kills on the way."""
        try:
            async with asyncio.TaskGroup() as tasks:
                sending = tasks.create_task(self._send_and_kill(lines, kills, progress))
                tasks.create_task(self._watch(sending, progress))
        except ExceptionGroup as errors:
            first: BaseException = errors
            while isinstance(first, BaseExceptionGroup):
                first = first.exceptions[0]
            raise first from None

    async def _send_and_kill(self, lines: list[tuple[int, bytes]], kills: int, progress: Progress) -> None:
        """Send the file in parts, and with each but the first kill the worker, at a moment that hurts."""
        bounds = [len(lines) * part // (kills + 1) for part in range(kills + 2)]
        await self._send(lines[: bounds[1]])
        for number in range(1, kills + 1):
            # A fast office must not be done before the next kill, and a slow one must get somewhere between two.
            await progress.reached(0.6 * len(self._story.accepted))
            async with asyncio.TaskGroup() as part:
                sending = part.create_task(self._send(lines[bounds[number] : bounds[number + 1]]))
                # Refunds come late: when all else has been tried.
                wanted, seconds = (MOMENTS[-1], 12.0) if number == kills else (MOMENTS[(number - 1) % 3], 4.0)
                moment = await self._bad_moment(wanted, seconds, sending, progress)
                self._worker.check()
                self._worker.kill()
                self._worker.start()
            self._story.kills[moment] += 1
            progress.killed(moment)

    async def _send(self, lines: list[tuple[int, bytes]]) -> None:
        """To the API, several at a time, in about the order of the file."""
        waiting = iter(lines)

        async def clerk() -> None:
            for number, data in waiting:
                await self._buy(number, data)

        async with asyncio.TaskGroup() as clerks:
            for _ in range(CONCURRENCY):
                clerks.create_task(clerk())

    async def _buy(self, number: int, data: bytes) -> None:
        response = await self._asked("POST", "/purchases", params={"line": number}, content=data)
        if response.status_code == httpx.codes.ACCEPTED:
            self._story.answers[number] = response.json()["order_id"]
        elif response.is_client_error:
            self._story.answers[number] = None
            for problem in response.json()["errors"][:1]:
                self._story.reasons[_kind_of(problem)] += 1
        else:
            answer = f"{response.status_code}: {response.text[:200]}"
            msg = f"the API answered line {number} with {answer}; {self._api.last_lines()}"
            raise Stuck(msg)

    async def _asked(self, method: str, path: str, *, of: str = "api", **request: Any) -> httpx.Response:
        """The answer; asked again while there is none, since the same line again is the same purchase.

        The API may have its database away, or have closed a connection that was idle just when it was used again.
        """
        end = time.monotonic() + OUTAGE_SECONDS
        while True:
            try:
                response = await self._client.request(method, f"{self._urls[of]}{path}", **request)
            except httpx.TransportError:
                self._api.check()
                if time.monotonic() > end:
                    raise
            else:
                if not response.is_server_error or time.monotonic() > end:
                    return response
            await asyncio.sleep(0.2)

    async def summary(self) -> dict[str, int]:
        counts: dict[str, int] = (await self._asked("GET", "/purchases")).json()
        return counts

    async def provider_status(self) -> dict[str, dict[str, int]]:
        counts: dict[str, dict[str, int]] = (await self._asked("GET", "/status", of="provider")).json()
        return counts

    async def _counts(self, of: str) -> dict[str, int]:
        return await self.summary() if of == "api" else (await self.provider_status())["now"]

    async def _bad_moment(self, wanted: Moment, seconds: float, sending: asyncio.Task[None], progress: Progress) -> str:
        """Wait for one: so long for the one that is wanted, then for any; when no more can come, so be it."""
        started = time.monotonic()
        while (waited := time.monotonic() - started) < seconds + 8.0:
            moments = (wanted,) if waited < seconds else MOMENTS
            counts = {of: await self._counts(of) for of in {of for _, of, _ in moments}}
            for name, of, what in moments:
                if counts[of].get(what, 0) > 0:
                    return name
            if sending.done() and progress.done >= len(self._story.accepted):
                break
            await asyncio.sleep(0.01)
        return NOTHING_GOING_ON

    async def _watch(self, sending: asyncio.Task[None], progress: Progress) -> None:
        """Show how far it is, until every accepted purchase has come to an end, and its run with it."""
        end = time.monotonic() + PATIENCE_SECONDS
        while True:
            finished = sending.done()
            counts = await self.summary()
            progress.done = counts.get("completed", 0) + counts.get("cancelled", 0)
            if finished:
                progress.total = len(self._story.accepted)
                if progress.done >= progress.total and await self._runs_ended():
                    return
            self._worker.check()
            if time.monotonic() > end:
                late = f"not every purchase had come to an end after {PATIENCE_SECONDS:g} s: {counts}"
                msg = f"{late}; the worker: {self._worker.last_lines()}"
                raise Stuck(msg)
            await asyncio.sleep(0.05)

    async def _runs_ended(self) -> bool:
        for order in self._story.accepted:
            status = (await self._asked("GET", f"/purchases/{order}")).json()["status"]
            if status in {"parked", "compensation_failed"}:
                msg = f"the run of order {order} waits for a person: {status}; the worker: {self._worker.last_lines()}"
                raise Stuck(msg)
            if status not in {"completed", "failed"}:
                return False
        return True

    async def drained(self, sources: Sources) -> None:
        """Wait until every event has had its effect, or for long enough that one never will."""
        await until_up(self._worker, f"{self._urls['worker']}/health/ready")  # it may have been killed a moment ago
        end = time.monotonic() + 30.0
        while time.monotonic() < end:
            facts = await read_rows(sources, self._story.answers)
            if not any(effects_exactly_once(facts)) and not facts.unsealed:
                return
            self._worker.check()
            await asyncio.sleep(0.25)


def _kind_of(problem: dict[str, Any]) -> str:
    """A problem without the particulars of its line, for counting."""
    (_, *field), message = problem["location"], problem["message"]
    match field:
        case []:
            return "broken JSON"
        case _ if message == "appears twice":
            return "a field twice"  # it may have any name
        case ["customer_id"]:
            return "unknown customer"
        case ["order_id"] if "taken already" in message:
            return "order id taken"
        case _ if "catalogue has no" in message:
            return "unknown item"
        case _:
            return f"bad {field[0].rpartition('.')[2].partition('[')[0]}"
