"""Health checks against what they are for: PostgreSQL, Redis, Kafka and a service, while they run and when not."""

import asyncio
from contextlib import AsyncExitStack

import httpx
from aiokafka.admin import AIOKafkaAdminClient
from redis.asyncio import Redis as RedisClient
from sqlalchemy.ext.asyncio import create_async_engine

from mainstay.core import App, Health
from mainstay.core.testing import eventually
from mainstay.observability import (
    DatabaseHealthCheck,
    HealthWatch,
    HTTPServiceHealthCheck,
    KafkaHealthCheck,
    ObservabilityModule,
    ObservabilitySettings,
    ProbeServer,
    RedisHealthCheck,
)
from mainstay_servers import Redis


def service(*checks, **settings) -> App:
    module = ObservabilityModule.for_root(ObservabilitySettings(service_name="s", http_port=0, **settings))
    return App(module, ObservabilityModule.for_feature(*checks), health_seconds=30.0)


async def test_the_usual_dependencies_are_asked_by_their_own_clients(
    postgres: str, kafka: str, own_redis: Redis
) -> None:
    """Each is up; one that hangs is down within its own limit, one that is away at once, and the others stay up."""
    async with AsyncExitStack() as stack:
        other = await stack.enter_async_context(service())
        http = await stack.enter_async_context(httpx.AsyncClient())
        engine = create_async_engine(postgres)
        stack.push_async_callback(engine.dispose)
        redis = RedisClient.from_url(own_redis.url)
        stack.push_async_callback(redis.aclose)
        cluster = AIOKafkaAdminClient(bootstrap_servers=kafka)
        await cluster.start()
        stack.push_async_callback(cluster.close)
        slow = 20.0  # the machine may be busy: only what hangs may take too long
        ready = f"http://127.0.0.1:{other.get(ProbeServer).port}/health/ready"
        sessions = RedisHealthCheck("sessions", redis, timeout_seconds=3.0)
        app = await stack.enter_async_context(
            service(
                DatabaseHealthCheck("archive", engine, timeout_seconds=slow),
                KafkaHealthCheck("feed", cluster, timeout_seconds=slow),
                HTTPServiceHealthCheck("other", http, ready, timeout_seconds=slow),
                HTTPServiceHealthCheck("nowhere", http, f"{ready}/not", timeout_seconds=slow),
                sessions,
                readiness=frozenset({"dependency.sessions"}),
            )
        )
        watch = app.get(HealthWatch)
        up = {f"dependency.{name}": Health("ok") for name in ("archive", "feed", "other")}
        wrong = {"dependency.nowhere": Health("down", "it answered 404")}

        async def all_up() -> bool:
            return await watch.refresh() == up | wrong | {sessions.part: Health("ok")}

        await eventually(all_up, seconds=60)
        assert watch.ready()
        await asyncio.to_thread(own_redis.pause)
        assert await watch.refresh() == up | wrong | {sessions.part: Health("down", "no answer within 3 s")}
        assert not watch.ready()
        await asyncio.to_thread(own_redis.resume)
        await eventually(all_up, seconds=60)
        await asyncio.to_thread(own_redis.kill)
        assert (await watch.refresh())[sessions.part] == Health("down", "the check failed with ConnectionError")
