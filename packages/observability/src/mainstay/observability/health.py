"""Health, asked in the background and answered from memory.

A probe must cost nothing and depend on nothing: a flood of them must not become a flood of queries, and a slow
database must not make the probes slow. So one task asks `App.health()` on its own beat, one round at a time, and every
probe reads the last answer.

- **live** means that the event loop turns: that the answer was given at all. Nothing that is shared is looked at,
  because killing the process repairs nothing that is shared.
- **started** means that every module has started, once.
- **ready** means that the App has started and is not stopping. Parts count only where the settings name them; one that
  was never asked counts as not ready.
- **health** tells everything, with details, to people: on the port of its own, and to who has the token.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mainstay.core import App, Drain, HasHealth, Health, Module, cancelled_from_outside, spawn
from mainstay.observability._asgi import Scope, Send, respond
from mainstay.observability._scrapes import Scrapes
from mainstay.observability.checks import HealthCheck
from mainstay.observability.settings import ObservabilitySettings

__all__ = ["Answer", "HealthWatch"]

_log = logging.getLogger("mainstay.observability")

_ROUNDS = 3  # an answer holds for as many intervals: one late round is no alarm

JSON = "application/json"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a probe gets.

    Attributes:
        status: of HTTP; 200 or 503.
        content_type: of the body.
        body: the bytes.
    """

    status: int
    content_type: str
    body: bytes

    def body_for(self, scope: Scope) -> bytes:
        """The bytes that a request gets: none for HEAD."""
        return b"" if scope["method"] == "HEAD" else self.body

    async def send(self, scope: Scope, send: Send) -> None:
        """Answer a request, as ASGI does."""
        headers = [
            (b"content-type", self.content_type.encode()),
            (b"content-length", str(len(self.body)).encode()),
            (b"cache-control", b"no-store"),
        ]
        await respond(send, self.status, headers, self.body_for(scope))


_OK = Answer(200, JSON, b'{"status": "ok"}')
_DOWN = Answer(503, JSON, b'{"status": "down"}')


class HealthWatch:
    """Knows the last health of every part, and answers probes from it.

    Attributes:
        paths: what `answer` may have an answer to.
        asked_at: when the last round ended, in seconds since 1970; None before the first.
        latest: by part, as `App.health()` names them; empty until the first round is over. An answer that no round has
            renewed in time is `down`: what was true once says nothing of now.
    """

    def __init__(self, app: App, settings: ObservabilitySettings, scrapes: Scrapes) -> None:
        self.paths = settings.paths.all
        self.asked_at: float | None = None
        self._app = app
        self._settings = settings
        self._scrapes = scrapes
        self._interval = settings.health_interval_seconds
        self._needed = frozenset(
            part for part in known_parts(app.modules) if any(_named(part, name) for name in settings.readiness)
        )
        self._beat: Drain | None = None
        self._round: asyncio.Task[None] | None = None
        self._latest: dict[str, Health] = {}
        self._answered = 0.0
        self._good_seconds = _ROUNDS * self._interval + app.health_seconds
        self._was_started = self._leaving = self._hurried = False

    @property
    def latest(self) -> dict[str, Health]:  # noqa: D102  described in the class
        age = self._app.clock.monotonic() - self._answered
        if age <= self._good_seconds:
            return self._latest
        return dict.fromkeys(self._latest, Health("down", f"not asked for {age:.0f} s"))

    async def watch(self, drain: Drain) -> None:
        """Ask on the beat of the settings until the drain begins."""
        self._beat = drain
        try:
            while not drain.begun:
                try:
                    await self.refresh()
                except BaseException as error:
                    # The watch ends only when it is asked to: the last answer would stand for ever.
                    if _ends_the_task(error):
                        raise
                    _log.exception("a round of health checks broke")
                await drain.pause(self._interval, wakeable=True)
        finally:
            self._beat = None
            if self._round is not None:
                self._round.cancel()
                await asyncio.gather(self._round, return_exceptions=True)

    async def refresh(self) -> dict[str, Health]:
        """Ask all parts now; callers that come while a round is under way share it."""
        if self._round is None or self._round.done():
            self._round = spawn(self._ask(), name="observability.health.round")
        await asyncio.shield(self._round)
        return self.latest

    async def _ask(self) -> None:
        try:
            latest = await self._app.health()
        except BaseException as error:
            # App.health() contains what parts do; whatever is left must not end the watch and freeze its last answer.
            if _ends_the_task(error):
                raise
            _log.exception("asking for health failed")
            latest = {"app": Health("down", "its health could not be asked")}
        for part, health in latest.items():
            before = self._latest.get(part)
            if (before.status if before else "ok") != health.status:
                level = logging.INFO if health.status == "ok" else logging.WARNING
                _log.log(level, "%s is %s: %s", part, health.status, health.detail or "no detail")
        self._latest = latest
        self._answered = self._app.clock.monotonic()
        self.asked_at = self._app.clock.now().timestamp()

    def leave(self) -> None:
        """Be not ready from now on: the process was told to end, and still takes requests for a while."""
        self._leaving = True

    def started(self) -> bool:
        """Whether the App has started, once; it stays so while it stops."""
        self._was_started = self._was_started or self._app.started
        return self._was_started

    def ready(self) -> bool:
        """Whether the App has started, is not stopping, and all parts that the settings name are up.

        One that was not asked yet, or not for too long, is not.
        """
        if not self._app.started or self._leaving:
            return False
        readiness = self._settings.readiness
        if not readiness:
            return True
        latest = self.latest
        if self.asked_at is None or not self._needed <= latest.keys():
            if self._beat is not None and not self._hurried:
                self._hurried = True
                self._beat.wake()  # everything has started, so the next round asks all of them: no need to wait for it
            return False
        return not any(
            health.status == "down" and any(_named(part, name) for name in readiness) for part, health in latest.items()
        )

    async def answer(
        self, path: str, accept: str = "", *, private: bool = False, authorization: str = ""
    ) -> Answer | None:
        """The answer to a probe's path; None where the path is none of ours, or not for the one who asks.

        Args:
            path: one of `paths`.
            accept: the request's `Accept` header; chooses the format of the metrics.
            private: whether only people of this service can ask: details name what it depends on.
            authorization: the request's header of that name; the settings' `access_token` makes up for `private`.
        """
        paths = self._settings.paths
        if path == paths.live:
            return _OK
        if path == paths.ready:
            return _OK if self.ready() else _DOWN
        if path == paths.startup:
            return _OK if self.started() else _DOWN
        if path == paths.metrics and (private or self._settings.metrics_public or self._allowed(authorization)):
            return Answer(200, *await self._scrapes.metrics(accept))
        if path == paths.health and (private or self._allowed(authorization)):
            states = {health.status for health in self.latest.values()}
            worst = next((status for status in ("down", "degraded") if status in states), "ok")
            parts = {name: {"status": each.status, "detail": each.detail} for name, each in self.latest.items()}
            return _json(200, {"status": worst, "ready": self.ready(), "parts": parts})
        return None

    def _allowed(self, authorization: str) -> bool:
        token = self._settings.access_token
        if token is None:
            return False
        wanted = f"Bearer {token.get_secret_value()}"
        return hmac.compare_digest(authorization.encode(), wanted.encode())


async def asked(app: App, path: str, scope: Scope, *, private: bool = False) -> Answer | None:
    """The answer of an App to a probe; see `HealthWatch.answer`.

    Raises:
        NotBoundError: the App does not run, or has no `ObservabilityModule`.
    """
    said = {name: value.decode("latin-1") for name, value in scope["headers"]}
    accept, authorization = said.get(b"accept", ""), said.get(b"authorization", "")
    return await app.get(HealthWatch).answer(path, accept, private=private, authorization=authorization)


def known_parts(modules: Sequence[Module[Any, Any]]) -> Iterator[str]:
    """The parts that `App.health()` will ask, as the modules state them before anything starts."""
    for module in modules:
        yield from (f"{module.name}.{kind.__name__}" for kind in module.yields() if issubclass(kind, HasHealth))
        yield from (part.part for part in module.parts if isinstance(part, HealthCheck))


def _named(part: str, name: str) -> bool:
    return part == name or part.partition(".")[0] == name


def _ends_the_task(error: BaseException) -> bool:
    """Whether the task has to end: it was asked to, or the process was. A stray CancelledError is a failure."""
    return cancelled_from_outside(error) or isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit))


def _json(status: int, value: dict[str, Any]) -> Answer:
    return Answer(status, JSON, json.dumps(value).encode())
