"""Health, asked in the background and answered from memory.

A probe must cost nothing and depend on nothing: a flood of them must not become a flood of queries, and a slow
database must not make the probes slow. So one task asks `App.health()` on its own beat, one round at a time, and every
probe reads the last answer.

- **live** means that the event loop turns: that the answer was given at all. Nothing that is shared is looked at,
  because killing the process repairs nothing that is shared.
- **ready** means that the App has started and is not stopping. Parts count only where the settings name them.
- **health** tells everything, with details, to people: it is served on the port of its own only.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from prometheus_client import Gauge

from mainstay.core import App, Drain, Health, cancelled_from_outside, spawn
from mainstay.observability.metrics import exposition
from mainstay.observability.settings import ObservabilitySettings

__all__ = ["Answer", "HealthWatch"]

_log = logging.getLogger("mainstay.observability")

_WORTH = {"ok": 1.0, "degraded": 0.5, "down": 0.0}
HEALTH = Gauge(
    "mainstay_health", "1 ok, 0.5 degraded, 0 down; by part, as last asked.", ["part"], multiprocess_mode="livemin"
)

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


class HealthWatch:
    """Knows the last health of every part, and answers probes from it.

    Attributes:
        latest: by part, as `App.health()` names them; empty until the first round is over. An answer that no round has
            renewed in time is `down`: what was true once says nothing of now.
    """

    def __init__(self, app: App, settings: ObservabilitySettings) -> None:
        self._app = app
        self._interval = settings.health_interval_seconds
        self._readiness = settings.readiness
        self._round: asyncio.Task[None] | None = None
        self._latest: dict[str, Health] = {}
        self._answered = 0.0
        self._good_seconds = _ROUNDS * self._interval + app.health_seconds

    @property
    def latest(self) -> dict[str, Health]:  # noqa: D102  described in the class
        age = self._app.clock.monotonic() - self._answered
        if age <= self._good_seconds:
            return self._latest
        return dict.fromkeys(self._latest, Health("down", f"not asked for {age:.0f} s"))

    async def watch(self, drain: Drain) -> None:
        """Ask on the beat of the settings until the drain begins."""
        try:
            while not drain.begun:
                try:
                    await self.refresh()
                except BaseException as error:
                    # The watch ends only when it is asked to: the last answer would stand for ever.
                    if _ends_the_task(error):
                        raise
                    _log.exception("a round of health checks broke")
                await drain.pause(self._interval)
        finally:
            if self._round is not None:
                self._round.cancel()
                await asyncio.gather(self._round, return_exceptions=True)
            _forget(self._latest)

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
            HEALTH.labels(part).set(_WORTH[health.status])
        _forget(self._latest.keys() - latest.keys())
        self._latest = latest
        self._answered = self._app.clock.monotonic()

    def ready(self) -> bool:
        """Whether the App has started, is not stopping, and no part that the settings name is down."""
        return self._app.started and not any(
            health.status == "down" for part, health in self.latest.items() if part.split(".")[0] in self._readiness
        )

    async def answer(self, path: str, accept: str = "", *, private: bool = False) -> Answer | None:
        """The answer to a probe's path; None where the path is none of ours.

        Args:
            path: `/health/live`, `/health/ready`, `/metrics`, and `/health` where `private`.
            accept: the request's `Accept` header; chooses the format of the metrics.
            private: whether only people of this service can ask: details name what it depends on.
        """
        if path == "/health/live":
            return _json(200, {"status": "ok"})
        if path == "/health/ready":
            ready = self.ready()
            return _json(200 if ready else 503, {"status": "ok" if ready else "down"})
        if path == "/metrics":
            return Answer(200, *await asyncio.to_thread(exposition, accept))
        if path == "/health" and private:
            states = {health.status for health in self.latest.values()}
            worst = next((status for status in ("down", "degraded") if status in states), "ok")
            parts = {name: {"status": each.status, "detail": each.detail} for name, each in self.latest.items()}
            return _json(200, {"status": worst, "ready": self.ready(), "parts": parts})
        return None


def _ends_the_task(error: BaseException) -> bool:
    """Whether the task has to end: it was asked to, or the process was. A stray CancelledError is a failure."""
    return cancelled_from_outside(error) or isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit))


def _forget(parts: Iterable[str]) -> None:
    # In multiprocess mode prometheus-client cannot remove a child, and warns.
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        for part in parts:
            HEALTH.remove(part)


def _json(status: int, value: dict[str, Any]) -> Answer:
    return Answer(status, JSON, json.dumps(value).encode())
