"""Checks of what no module speaks for: objects with a group, a limit, a memory, and patience."""

import asyncio

import httpx
import pytest

from mainstay.core import App, ConfigurationError, Health, given
from mainstay.core.testing import VirtualClock
from mainstay.observability import (
    DatabaseHealthCheck,
    HealthCheck,
    HealthWatch,
    HTTPServiceHealthCheck,
    KafkaHealthCheck,
    ObservabilityModule,
    ObservabilitySettings,
    ProbeServer,
    RedisHealthCheck,
)


def service(*checks, readiness=(), health_seconds=2.0, clock=None):
    settings = ObservabilitySettings(service_name="s", http_port=0, readiness=frozenset(readiness))
    return App(
        ObservabilityModule.for_root(settings),
        ObservabilityModule.for_feature(*checks),
        clock=clock or VirtualClock(),
        health_seconds=health_seconds,
    )


class Asked:
    """A dependency that answers as it is told."""

    def __init__(self):
        self.times = 0
        self.answer = None

    async def __call__(self):
        self.times += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


async def statuses(app, asked, answers):
    found = []
    for answer in answers:
        asked.answer = answer
        found.append((await app.get(HealthWatch).refresh())["dependency.x"].status)
    return found


DOWN, UP = Health("down", "away"), None


async def test_a_check_is_a_part_of_its_group():
    """By group and name in the App's own health, and readiness may name either; services are filled in."""
    seen = []

    async def ask(*, server: ProbeServer = given(ProbeServer)):
        seen.append(server)
        return Health("degraded", "slow")

    async with service(HealthCheck("x", ask, group="shop"), readiness={"shop"}) as app:
        assert (await app.health())["shop.x"] == Health("degraded", "slow")
        assert set(seen) == {app.get(ProbeServer)}
        await app.get(HealthWatch).refresh()
        assert app.get(HealthWatch).ready()


@pytest.mark.parametrize("name", ["dependency", "dependency.x"])
async def test_readiness_counts_a_check(name):
    """By its group or by its own name; a group without a check is refused."""
    asked = Asked()
    async with service(HealthCheck("x", asked), readiness={name}) as app:
        for answer, ready in ((DOWN, False), (UP, True), (RuntimeError("token=hunter2"), False)):
            await statuses(app, asked, [answer])
            assert app.get(HealthWatch).ready() is ready
        assert app.get(HealthWatch).latest["dependency.x"] == Health("down", "the check failed with RuntimeError")
    with pytest.raises(ConfigurationError, match="readiness names"):
        service(readiness={name})


async def test_some_failures_in_a_row_make_it_down_and_some_answers_make_it_up():
    """One lost packet takes nothing out of service, one answer brings nothing back; the first answer decides alone."""
    asked = Asked()
    async with service(HealthCheck("x", asked, failures=3, successes=2)) as app:
        answers = [UP, DOWN, DOWN, UP, DOWN, DOWN, DOWN, UP, DOWN, UP, UP, DOWN]
        assert await statuses(app, asked, answers) == [
            "ok", "degraded", "degraded", "ok", "degraded", "degraded", "down", "down", "down", "down", "ok", "degraded"
        ]  # fmt: skip


async def test_what_was_never_up_is_down_at_once():
    """A process that starts while its dependency is away does not count as ready for the first failures."""
    asked = Asked()
    asked.answer = DOWN
    async with service(HealthCheck("x", asked, failures=3)) as app:
        assert (await app.get(HealthWatch).refresh())["dependency.x"] == DOWN


async def test_an_answer_is_good_for_a_while():
    """Something that is asked by many services is asked less often than the beat."""
    clock, asked = VirtualClock(), Asked()
    async with service(HealthCheck("x", asked, cache_seconds=60), clock=clock) as app:
        await app.get(HealthWatch).refresh()
        assert asked.times == 1
        await clock.advance(50)
        assert asked.times == 1
        await clock.advance(20)
        assert asked.times == 2


async def test_each_check_has_a_limit_of_its_own():
    """One that hangs is down after its own time, and holds up no other."""

    async def hang():
        await asyncio.Event().wait()

    async with service(HealthCheck("x", hang, timeout_seconds=0.01), HealthCheck("y", Asked())) as app:
        report = await app.get(HealthWatch).refresh()
        assert report["dependency.x"] == Health("down", "no answer within 0.01 s")
        assert report["dependency.y"] == Health("ok")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: HealthCheck("a.b", Asked()), "no word"),
        (lambda: HealthCheck("x", Asked(), group=""), "no word"),
        (lambda: HealthCheck("x", Asked(), failures=0), "1 or more"),
        (lambda: HealthCheck("x", Asked(), timeout_seconds=0), "more than 0"),
        (lambda: service(HealthCheck("x", Asked()), HealthCheck("x", Asked())), "two parts .* dependency.x"),
        (
            lambda: ObservabilityModule.for_feature(Asked()),  # type: ignore[arg-type]  # that is the test
            "takes HealthCheck",
        ),
    ],
)
def test_mistakes_are_seen_before_anything_starts(make, says):
    """A name that readiness could not name, a number that makes no sense, two of one name."""
    with pytest.raises(ConfigurationError, match=says):
        make()


async def test_a_limit_beyond_the_apps_is_refused():
    """It would never be reached."""
    app = service(HealthCheck("x", Asked(), timeout_seconds=3), health_seconds=2)
    with pytest.raises(ConfigurationError, match="lower its timeout_seconds"):
        await app.__aenter__()


class Away:
    """A client whose server is away, in each of the ways in which it is asked."""

    def connect(self):
        raise ConnectionError

    async def ping(self):
        raise ConnectionError

    async def describe_cluster(self):
        return {"brokers": []}

    async def get(self, url, /):
        return httpx.Response(503)


class There(Away):
    def connect(self):
        class Connection:
            async def __aenter__(self):
                return self

            async def __aexit__(self, *details):
                return None

            async def exec_driver_sql(self, sql):
                assert sql == "SELECT 1"

        return Connection()

    async def ping(self):
        return True

    async def describe_cluster(self):
        return {"brokers": [{"node_id": 1}]}

    async def get(self, url, /):
        return httpx.Response(200 if url == "https://x/health" else 404)


async def test_the_usual_dependencies_have_a_check():
    """A database, a Redis, a Kafka and a service over HTTP, by the clients that a service has anyway."""
    for client, status in ((There(), "ok"), (Away(), "down")):
        checks = (
            DatabaseHealthCheck("database", client),
            RedisHealthCheck("redis", client),
            KafkaHealthCheck("kafka", client),
            HTTPServiceHealthCheck("http", client, "https://x/health"),
        )
        async with service(*checks) as app:
            report = await app.health()
            assert {name: report[f"dependency.{name}"].status for name in ("database", "redis", "kafka", "http")} == {
                "database": status, "redis": status, "kafka": status, "http": status
            }  # fmt: skip
