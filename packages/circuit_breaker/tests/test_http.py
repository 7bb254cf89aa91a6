"""The httpx transports, and everything together against a real server that is sick, stalls, resets and recovers."""

import asyncio
import contextlib
import gzip
import io
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from mainstay.circuit_breaker import (
    BreakerConfig,
    Budget,
    Bulkhead,
    CircuitBreaker,
    CircuitOpen,
    Fallback,
    Hedge,
    KeyedBreaker,
    Pipeline,
    Policy,
    Rejected,
    Retries,
    State,
    Timeout,
    http_read,
    http_write,
    sql_transaction,
)
from mainstay.circuit_breaker.http import AsyncPolicyTransport, PolicyTransport, retry_after
from mainstay.circuit_breaker.testing import HANG, Dependency, forced
from mainstay.core import DeadlineExceeded, FullJitter, Retry, timeout
from mainstay.core.testing import VirtualClock


class SickServer:
    """A real HTTP server on a free port; how it behaves is set by `mood`, what reached it is in `arrivals`."""

    def __init__(self) -> None:
        self.mood = "fine"
        self.url = ""
        self.script: deque[str] = deque()
        self.arrivals: list[tuple[float, str]] = []
        self.stalled: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        try:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            for task in list(self.stalled):
                task.cancel()
            server.close()
            await server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.stalled.add(task)
        try:
            while await self._answer(reader, writer):
                pass
        except (asyncio.CancelledError, OSError, asyncio.IncompleteReadError):
            pass
        finally:
            self.stalled.discard(task)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(
            (int(line[16:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length: ")), 0
        )
        await reader.readexactly(length)
        mood = self.script.popleft() if self.script else self.mood
        self.arrivals.append((time.monotonic(), mood))
        if mood == "stall":
            await asyncio.Event().wait()
        if mood == "reset":
            writer.transport.abort()
            return False
        status, headers, body = "200 OK", b"", b"fine"
        if mood == "sick":
            status, body = "503 Service Unavailable", b"sorry"
        elif mood == "busy":
            status, headers = "429 Too Many Requests", b"Retry-After: 1\r\n"
        elif mood == "missing":
            status = "404 Not Found"
        elif mood == "gzip":
            headers, body = b"Content-Encoding: gzip\r\n", gzip.compress(b"fine")
        writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n".encode() + headers + b"\r\n")
        if mood == "cut":
            writer.write(body[:2])
            await writer.drain()
            writer.transport.abort()
            return False
        writer.write(body)
        await writer.drain()
        return True

    def reached(self, since: float, until: float) -> int:
        return sum(since <= at < until for at, _ in self.arrivals)


@pytest.fixture
async def server() -> AsyncIterator[SickServer]:
    sick = SickServer()
    async with sick.running() as sick.url:
        yield sick


def client(server: SickServer, policy: Policy, **options) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=AsyncPolicyTransport(policy, **options), base_url=server.url)


QUICK = BreakerConfig(minimum_calls=4, break_jitter=0)


async def test_statuses_count_and_come_back_as_they_are(server: SickServer) -> None:
    """503 and 429 are failures to the breaker and responses to the caller; 404 is an answer; open raises."""
    breaker = CircuitBreaker("api", QUICK)
    async with client(server, breaker) as http:
        server.script.extend(["missing", "sick", "busy", "gzip", "sick"])
        assert [(await http.get("/")).status_code for _ in range(3)] == [404, 503, 429]
        assert (await http.get("/")).text == "fine"
        response = await http.get("/")
        assert (response.status_code, response.text, response.is_closed) == (503, "sorry", True)
        assert (breaker.totals()["success"], breaker.totals()["failure"], breaker.state) == (2, 3, State.OPEN)
        with pytest.raises(CircuitOpen):
            await http.get("/")
    assert len(server.arrivals) == 5


async def test_retries_repeat_the_request_and_honour_retry_after(server: SickServer) -> None:
    """A reset, a cut and a 503 are got over, the body sent again; `Retry-After: 1` is waited out."""
    retry = Retry(attempts=4, wait=FullJitter(0.001))
    async with client(server, Pipeline("api", Timeout(10), retry)) as http:
        server.script.extend(["reset", "cut", "sick", "fine"])
        response = await http.post("/", content=b"body")
        assert (response.status_code, len(server.arrivals)) == (200, 4)
        server.script.extend(["busy", "fine"])
        started = time.monotonic()
        assert (await http.get("/")).status_code == 200
        assert time.monotonic() - started >= 1
        server.mood = "sick"
        assert (await http.get("/")).status_code == 503  # given up: the last response, not an exception


async def test_a_time_limit_covers_the_body(server: SickServer) -> None:
    """A server that stalls is given up on in time, and that is a failure."""
    breaker = CircuitBreaker("api", QUICK)
    async with client(server, Pipeline("api", Timeout(0.05), breaker)) as http:
        server.mood = "stall"
        with pytest.raises(DeadlineExceeded):
            await http.get("/")
    assert breaker.totals()["failure"] == 1


async def test_streams_settle_at_their_end(server: SickServer) -> None:
    """A streamed body counts when it has ended, a broken one as a failure, one left early not at all."""
    breaker, bulkhead = CircuitBreaker("api", QUICK), Bulkhead(5)
    policy = Pipeline("api", breaker, bulkhead)
    with pytest.raises(TypeError, match="cannot stand around a stream"):
        AsyncPolicyTransport(Timeout(1), stream=True)
    async with client(server, policy, stream=True) as http:
        async with http.stream("GET", "/") as response:
            assert breaker.totals()["success"] == 0
            assert bulkhead.under_way == 1
            assert b"".join([part async for part in response.aiter_bytes()]) == b"fine"
        assert (breaker.totals()["success"], bulkhead.under_way) == (1, 0)
        async with http.stream("GET", "/"):
            pass
        assert (breaker.totals()["neutral"], bulkhead.under_way) == (1, 0)
        server.script.extend(["cut", "sick", "gzip"])
        with pytest.raises(httpx.RemoteProtocolError):
            await http.get("/")
        response = await http.get("/")
        assert (response.status_code, response.text) == (503, "sorry")
        assert (await http.get("/")).text == "fine"
    assert (breaker.totals()["success"], breaker.totals()["failure"], bulkhead.free) == (2, 2, 5)


async def test_a_circuit_for_each_host(server: SickServer) -> None:
    """One host that is sick closes the way to itself only."""
    hosts = KeyedBreaker("hosts", QUICK, key=lambda request: request.url.host)
    async with client(server, hosts) as http:
        server.mood = "sick"
        for _ in range(4):
            await http.get("/")
        with pytest.raises(CircuitOpen):
            await http.get("/")
        assert (await http.get(server.url.replace("127.0.0.1", "localhost"))).status_code == 503
    assert {circuit.key for circuit in hosts.circuits()} == {"127.0.0.1", "localhost"}


async def test_the_sync_transport(server: SickServer) -> None:
    """A plain client under the same breaker."""
    breaker = CircuitBreaker("api", QUICK)

    def work() -> list[int]:
        with httpx.Client(transport=PolicyTransport(breaker), base_url=server.url) as http:
            return [http.get("/").status_code for _ in range(3)]

    server.script.extend(["fine", "sick", "gzip"])
    assert await asyncio.to_thread(work) == [200, 503, 200]
    assert (breaker.totals()["success"], breaker.totals()["failure"]) == (2, 1)
    with pytest.raises(TypeError, match="in_thread"):
        PolicyTransport(Timeout(1))


@pytest.mark.parametrize(
    ("value", "low", "high"),
    [
        ("3", 3, 3),
        ("0", 0, 0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0, 0),
        ("Wed, 21 Oct 2099 07:28:00 GMT", 1e9, 1e9),
        ("9" * 400, 1e9, 1e9),
        ("Fri, 31 Dec 9999 23:59:59 -2359", 1e9, 1e9),
        ("Mon, 01 Jan 0001 00:00:00 +2359", 0, 0),
    ],
)
def test_retry_after_in_both_forms(value: str, low: float, high: float) -> None:
    """Seconds, or a date; one that has passed means now."""
    seconds = retry_after(httpx.Headers({"Retry-After": value}))
    assert seconds is not None
    assert low <= seconds <= high


@pytest.mark.parametrize("value", ["", "soon", "-5", "1.5e3", "٣", "Wed, 21 Oct 2015 07:28:00 +99999999999999"])
def test_a_malformed_retry_after_is_none(value: str) -> None:
    """What cannot be understood asks for nothing."""
    assert retry_after(httpx.Headers([(b"retry-after", value.encode())])) is None


@pytest.mark.parametrize("make", [http_read, http_write, sql_transaction])
async def test_the_ready_made_pipelines(make: Callable[[str], Pipeline]) -> None:
    """Each is made without a warning about its order, passes a call, and retries only where a call may be repeated."""
    guarded = make("api")
    assert await guarded.call(Dependency("fine")) == "fine"
    failing = Dependency(OSError, "fine")
    if make is http_read:
        assert await guarded.call(failing) == "fine"
    else:
        with pytest.raises(OSError):  # noqa: PT011  any message
            await guarded.call(failing)
    (breaker,) = guarded.breakers()
    assert isinstance(breaker, CircuitBreaker)
    with forced(breaker, State.OPEN), pytest.raises(CircuitOpen):
        await guarded.call(failing)


async def test_a_sick_server_is_spared_and_found_well_again(server: SickServer) -> None:
    """Through 503s, stalls and resets most calls are rejected and little reaches the server; recovery is gentle."""
    breaker = CircuitBreaker(
        "api",
        BreakerConfig(
            minimum_calls=10,
            window_seconds=2,
            break_seconds=0.3,
            max_break_seconds=0.6,
            ramp_seconds=1.0,
            ramp_start=0.1,
        ),
    )
    guarded = Pipeline(
        "api",
        Timeout(6),
        Retries(Retry(attempts=3, wait=FullJitter(0.01)), budget=Budget(0.2, per_second=0)),
        breaker,
        Bulkhead(30, queue=10),
        Timeout(1.5),  # a busy machine answers within that
    )
    outcomes: list[tuple[float, str]] = []

    async def call(http: httpx.AsyncClient) -> None:
        started = time.monotonic()
        try:
            response = await http.get("/")
            outcome = "fine" if response.status_code == 200 else "failed"
        except Rejected:
            outcome = "rejected"
        except (httpx.TransportError, DeadlineExceeded):
            outcome = "failed"
        outcomes.append((started, outcome))

    async def load(http: httpx.AsyncClient, seconds: float) -> tuple[float, float]:
        began = time.monotonic()
        calls: list[asyncio.Task[None]] = []
        while time.monotonic() < began + seconds:
            calls.append(asyncio.create_task(call(http)))
            await asyncio.sleep(0.005)
        ended = time.monotonic()
        await asyncio.gather(*calls)
        return began, ended

    def count(outcome: str, since: float, until: float) -> int:
        return sum(outcome == each and since <= at < until for at, each in outcomes)

    async with client(server, guarded) as http:
        began, ended = await load(http, 1.0)
        assert count("fine", began, ended) == len(outcomes)
        server.mood = "sick"
        sick_at = time.monotonic()
        while breaker.state is State.CLOSED:  # closed
            began, ended = await load(http, 0.1)
        # Half of a window of two seconds must have failed, and retries add at most a fifth of all calls so far.
        assert ended - sick_at < 4
        under_way = 30
        assert (
            server.reached(sick_at, ended) <= sum(sick_at <= at for at, _ in outcomes) + under_way + len(outcomes) / 5
        )
        for mood in ("sick", "stall", "reset"):
            server.mood = mood
            began, ended = await load(http, 1.0)
            offered = sum(began <= at < ended for at, _ in outcomes)
            assert count("rejected", began, ended) >= 0.9 * offered
            assert server.reached(began, ended) <= 6  # probes, and nothing else
        server.mood = "fine"
        well_at = time.monotonic()
        async with asyncio.timeout(60):  # two seconds where nothing else is busy: a break of 0.6 s, a probe, the ramp
            while True:
                began, ended = await load(http, 0.5)
                offered = sum(began <= at < ended for at, _ in outcomes)
                if breaker.snapshot().state is State.CLOSED and count("fine", began, ended) >= 0.9 * offered:
                    break
        first = next(at for at, outcome in outcomes if outcome == "fine" and at >= well_at)
        # Gentle: in the first quarter second after it was found well, far less than everything came.
        asked = sum(first <= at < first + 0.25 for at, _ in outcomes)
        assert server.reached(first, first + 0.25) <= 0.7 * asked + 3


@pytest.mark.parametrize("seconds", ["99999999999999", "3601"])
async def test_a_server_that_asks_for_hours_is_not_waited_for(seconds: str) -> None:
    """Beyond an hour of `Retry-After` the answer stands, for async and plain clients."""
    calls: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        calls.append(request)
        return httpx.Response(503, headers={"Retry-After": seconds})

    inner = httpx.MockTransport(answer)
    policy = Retries(Retry(attempts=3, clock=VirtualClock()))
    async with httpx.AsyncClient(transport=AsyncPolicyTransport(policy, inner)) as http:
        assert (await http.get("http://api/")).status_code == 503
    with httpx.Client(transport=PolicyTransport(policy, inner)) as plain:
        assert (await asyncio.to_thread(plain.get, "http://api/")).status_code == 503
    assert len(calls) == 2


async def unrepeatable() -> AsyncIterator[bytes]:
    """A body that can be sent once."""
    yield b"body"


class Reading(httpx.AsyncBaseTransport):
    """Reads the request and answers from a script."""

    def __init__(self, *answers: httpx.Response | Exception) -> None:
        self.answers = deque(answers)
        self.bodies: list[bytes] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        answer = self.answers.popleft()
        if isinstance(answer, httpx.ConnectError):
            raise answer
        self.bodies.append(b"".join([part async for part in request.stream]))  # type: ignore[union-attr]  # it is async
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "retry",
    [Retry(wait=lambda _: 0.0), Retry(wait=lambda _: 0.0, retry=lambda state: state.outcome.failed)],
    ids=["as a rule", "whatever it is"],
)
async def test_a_streamed_body_is_not_sent_twice(stream: bool, retry: Retry) -> None:
    """Where the body cannot be had again the first answer, or the first error, comes out, and counts once."""
    breaker = CircuitBreaker("api", QUICK)
    inner = Reading(httpx.Response(503, text="sorry"), httpx.ReadError("gone"))
    policy = Pipeline("api", retry, breaker)
    async with httpx.AsyncClient(transport=AsyncPolicyTransport(policy, inner, stream=stream)) as http:
        response = await http.post("http://api/", content=unrepeatable())
        assert (response.status_code, response.text) == (503, "sorry")
        with pytest.raises(httpx.ReadError, match="gone"):
            await http.post("http://api/", content=unrepeatable())
    assert inner.bodies == [b"body", b"body"]
    assert breaker.totals()["failure"] == 2


async def test_a_streamed_body_that_was_not_begun_is_sent_again() -> None:
    """A connection that could not be made has taken nothing of the body; an answer that is asked for again stands."""
    inner = Reading(httpx.ConnectError("no route"), httpx.Response(200, text="fine"), httpx.Response(202, text="soon"))
    retry = Retry(
        wait=lambda _: 0.0, retry=lambda state: state.outcome.failed or state.outcome.result().status_code == 202
    )
    async with httpx.AsyncClient(transport=AsyncPolicyTransport(Retries(retry), inner)) as http:
        assert (await http.post("http://api/", content=unrepeatable())).text == "fine"
        assert (await http.post("http://api/", content=unrepeatable())).status_code == 202
    assert inner.bodies == [b"body", b"body"]


def test_a_file_is_not_sent_twice_by_a_plain_client() -> None:
    """A second attempt would send the end of the file, which is nothing, as if it were the file."""
    bodies: list[bytes] = []

    class Inner(httpx.BaseTransport):
        def handle_request(self, request: httpx.Request) -> httpx.Response:
            bodies.append(b"".join(request.stream))  # type: ignore[arg-type]  # it is plain
            return httpx.Response(503)

    policy = Retries(Retry(wait=lambda _: 0.0))
    for stream in (False, True):
        with httpx.Client(transport=PolicyTransport(policy, Inner(), stream=stream)) as http:
            assert http.post("http://api/", content=io.BytesIO(b"file")).status_code == 503
    assert bodies == [b"file", b"file"]


async def test_responses_are_as_httpx_makes_them(server: SickServer) -> None:
    """With and without policies: the time it took, the bytes as they came and the text, for both kinds of client."""
    server.mood = "gzip"
    packed = gzip.compress(b"fine")

    def check(response: httpx.Response) -> None:
        assert response.text == "fine"
        assert response.elapsed.total_seconds() > 0
        assert (response.http_version, response.is_closed, response.num_bytes_downloaded) == (
            "HTTP/1.1",
            True,
            len(packed),
        )

    policy = CircuitBreaker("api", QUICK)
    for transport in (None, AsyncPolicyTransport(policy), AsyncPolicyTransport(policy, stream=True)):
        async with httpx.AsyncClient(transport=transport, base_url=server.url) as http:
            check(await http.get("/"))
            async with http.stream("GET", "/") as response:
                assert gzip.decompress(b"".join([part async for part in response.aiter_raw()])) == b"fine"

    def plain() -> None:
        for transport in (None, PolicyTransport(policy), PolicyTransport(policy, stream=True)):
            with httpx.Client(transport=transport, base_url=server.url) as http:
                check(http.get("/"))
                with http.stream("GET", "/") as response:
                    assert gzip.decompress(b"".join(response.iter_raw())) == b"fine"

    await asyncio.to_thread(plain)
    assert policy.totals()["success"] == 8


async def test_streams_of_a_plain_client_settle_at_their_end(server: SickServer) -> None:
    """As for the async client: at the end, as a failure when it breaks off, not at all when it is left early."""
    breaker, bulkhead = CircuitBreaker("api", QUICK), Bulkhead(5)
    policy = Pipeline("api", Retries(Retry(wait=lambda _: 0.0)), breaker, bulkhead)
    for refused in (Timeout(1), Hedge(1), Fallback(value=1)):
        with pytest.raises(TypeError, match="cannot"):
            PolicyTransport(refused, stream=True)

    def work() -> None:
        with httpx.Client(transport=PolicyTransport(policy, stream=True), base_url=server.url) as http:
            with http.stream("GET", "/") as response:
                assert (breaker.totals()["success"], bulkhead.under_way) == (0, 1)
                assert b"".join(response.iter_bytes()) == b"fine"
            assert (breaker.totals()["success"], bulkhead.under_way) == (1, 0)
            with http.stream("GET", "/"):
                pass
            assert (breaker.totals()["neutral"], bulkhead.under_way) == (1, 0)
            server.script.extend(["cut", "sick", "fine"])
            with pytest.raises(httpx.RemoteProtocolError):
                http.get("/")
            assert http.get("/").text == "fine"  # the head said 503, and was asked for again

    await asyncio.to_thread(work)
    assert (breaker.totals()["success"], breaker.totals()["failure"], bulkhead.free) == (2, 2, 5)


@pytest.mark.parametrize("make", [http_read, http_write, sql_transaction])
async def test_the_ready_made_pipelines_take_a_clock(make: Callable[..., Pipeline]) -> None:
    """Every policy in them measures with it, so that a test moves the time of all, also under a limit of core's."""
    clock = VirtualClock()
    guarded = make("api", clock=clock)
    async with timeout(5, clock=clock):
        assert await guarded.call(Dependency("fine")) == "fine"
    hanging = asyncio.create_task(guarded.call(Dependency(then=HANG)))
    await clock.advance(40)
    with pytest.raises(DeadlineExceeded):
        await hanging
    (breaker,) = guarded.breakers()
    assert breaker.totals()["failure"] >= 1
    for policy in guarded.policies:
        holders: list[Any] = [policy]
        if isinstance(policy, CircuitBreaker):
            holders = [policy.rules]
        elif isinstance(policy, Retries):
            holders = [policy.policy, policy.budget]
        assert all(holder.clock is clock for holder in holders), policy
