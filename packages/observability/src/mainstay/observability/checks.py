"""Health checks of what a service depends on and no module of the App speaks for.

    ObservabilityModule.for_feature(
        RedisHealthCheck("sessions", redis),
        HTTPServiceHealthCheck("payments", http, "https://payments/health/ready", failures=3),
    )

Each is a part of `App.health()` by its group and name, such as `dependency.sessions`. What Mainstay's own modules
connect to needs none: `DatabaseModule` and `EventsModule` answer for theirs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol, TypedDict, Unpack

from mainstay.core import Clock, ConfigurationError, HasHealth, Health

__all__ = [
    "DatabaseHealthCheck",
    "HTTPServiceHealthCheck",
    "HealthCheck",
    "HealthChecks",
    "KafkaHealthCheck",
    "RedisHealthCheck",
]


class Options(TypedDict, total=False):
    """What every check may be told, as `HealthCheck` describes it."""

    group: str
    timeout_seconds: float
    cache_seconds: float
    failures: int
    successes: int


class HealthCheck:
    """A function that is asked for the health of something.

    Args:
        name: of what is asked, such as `payments`.
        ask: returns a `Health`, or None where all is well; an exception is `down`. Its `given(…)` parameters are filled
            by the App.
        group: the first word of the part's name, which `readiness` may name.
        timeout_seconds: how long an answer may take; at most the App's `health_seconds`.
        cache_seconds: for how long an answer is good, so that it is asked for less often than the beat.
        failures: how many in a row make a part that was up `down`; before that it is `degraded`.
        successes: how many in a row make a part that was down `ok`; before that it stays `down`.

    Attributes:
        part: its name in `App.health()`: group and name.

    Raises:
        ConfigurationError: a name with a dot or without a letter, or a number out of range.
    """

    def __init__(
        self,
        name: str,
        ask: Callable[..., Awaitable[Health | None]],
        *,
        group: str = "dependency",
        timeout_seconds: float = 1.0,
        cache_seconds: float = 0.0,
        failures: int = 1,
        successes: int = 1,
    ) -> None:
        for what, word in (("name", name), ("group", group)):
            if not word.replace("-", "_").isidentifier():
                msg = f"{type(self).__name__}: the {what} {word!r} is no word; write letters, digits, - and _"
                raise ConfigurationError(msg)
        if timeout_seconds <= 0 or cache_seconds < 0 or failures < 1 or successes < 1:
            msg = (
                f"{type(self).__name__}({name!r}): timeout_seconds is more than 0, cache_seconds 0 or more, "
                "failures and successes 1 or more"
            )
            raise ConfigurationError(msg)
        self.part = f"{group}.{name}"
        self.ask = ask
        self.timeout_seconds = timeout_seconds
        self.cache_seconds = cache_seconds
        self.failures = failures
        self.successes = successes


class _Connects(Protocol):
    def connect(self) -> AbstractAsyncContextManager[Any]: ...


class DatabaseHealthCheck(HealthCheck):
    """Asks a database that is not the App's own for `SELECT 1`.

    Args:
        name: of the database.
        engine: SQLAlchemy's `AsyncEngine`, or what has such a `connect()`.
        options: as of `HealthCheck`.
    """

    def __init__(self, name: str, engine: _Connects, **options: Unpack[Options]) -> None:
        async def ask() -> None:
            async with engine.connect() as connection:
                await connection.exec_driver_sql("SELECT 1")

        super().__init__(name, ask, **options)


class _Pings(Protocol):
    def ping(self) -> Awaitable[Any]: ...


class RedisHealthCheck(HealthCheck):
    """Pings a Redis.

    Args:
        name: of the Redis.
        client: `redis.asyncio.Redis`, or what has such a `ping()`.
        options: as of `HealthCheck`.
    """

    def __init__(self, name: str, client: _Pings, **options: Unpack[Options]) -> None:
        async def ask() -> None:
            await client.ping()

        super().__init__(name, ask, **options)


class _Describes(Protocol):
    def describe_cluster(self) -> Awaitable[Any]: ...


class KafkaHealthCheck(HealthCheck):
    """Asks a Kafka cluster that is not the App's own which brokers it has.

    Args:
        name: of the cluster.
        client: `aiokafka.admin.AIOKafkaAdminClient`, or what has such a `describe_cluster()`.
        options: as of `HealthCheck`.
    """

    def __init__(self, name: str, client: _Describes, **options: Unpack[Options]) -> None:
        async def ask() -> Health | None:
            cluster = await client.describe_cluster()
            return None if cluster["brokers"] else Health("down", "the cluster names no broker")

        super().__init__(name, ask, **options)


class _Answer(Protocol):
    @property
    def status_code(self) -> int: ...


class _Gets(Protocol):
    def get(self, url: str, /) -> Awaitable[_Answer]: ...


class HTTPServiceHealthCheck(HealthCheck):
    """Asks another service over HTTP.

    Args:
        name: of the service.
        client: `httpx.AsyncClient`, or what has such a `get(url)`.
        url: what is asked for; a service's `/health/ready` fits.
        statuses: which answers are well.
        options: as of `HealthCheck`.
    """

    def __init__(
        self, name: str, client: _Gets, url: str, *, statuses: Sequence[int] = (200, 204), **options: Unpack[Options]
    ) -> None:
        async def ask() -> Health | None:
            status = (await client.get(url)).status_code
            return None if status in statuses else Health("down", f"it answered {status}")

        super().__init__(name, ask, **options)


class HealthChecks:
    """The checks of an App while it runs."""

    def __init__(self, checks: Mapping[str, HasHealth]) -> None:
        self._checks = checks

    def health_parts(self) -> Mapping[str, HasHealth]:
        """The checks by their parts."""
        return self._checks


class RunningCheck:
    """A check with what it remembers: its last answer, and how often it was the same.

    Args:
        check: what is asked.
        ask: its function, filled.
        clock: the App's.
    """

    def __init__(self, check: HealthCheck, ask: Callable[[], Awaitable[Health | None]], clock: Clock) -> None:
        self._check = check
        self._ask = ask
        self._clock = clock
        self._answer = Health("ok")
        self._answered: float | None = None
        self._up: bool | None = None  # None until the first answer, which decides alone
        self._failures = self._successes = 0

    async def health(self) -> Health:
        """The answer, from memory while it is good."""
        now = self._clock.monotonic()
        if self._answered is None or now - self._answered >= self._check.cache_seconds:
            self._answer = self._weighed(await self._asked())
            self._answered = now
        return self._answer

    async def _asked(self) -> Health:
        limit = asyncio.timeout(self._check.timeout_seconds)
        try:
            async with limit:
                answer = await self._ask()
        except TimeoutError as error:
            if not limit.expired():
                return Health("down", f"the check failed with {type(error).__name__}")
            return Health("down", f"no answer within {self._check.timeout_seconds:g} s")
        except Exception as error:  # noqa: BLE001  that it cannot be asked is the answer; its text may hold secrets
            return Health("down", f"the check failed with {type(error).__name__}")
        return Health("ok") if answer is None else answer

    def _weighed(self, answer: Health) -> Health:
        check = self._check
        if answer.status == "down":
            self._failures, self._successes = self._failures + 1, 0
            if not self._up or self._failures >= check.failures:
                self._up = False
                return answer
            return Health("degraded", f"failed {self._failures} of {check.failures} times: {answer.detail}")
        self._failures, self._successes = 0, self._successes + 1
        if self._up is False and self._successes < check.successes:
            return Health("down", f"answered {self._successes} of {check.successes} times since it was down")
        self._up = True
        return answer
