"""One round of questions about the health of an App's parts."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import cast

from mainstay.core.health import HasHealth, HasHealthParts, Health
from mainstay.core.tasks import cancelled_from_outside, spawn

_log = logging.getLogger("mainstay.core")


def parts_of(services: Mapping[type, object], owners: Mapping[type, str]) -> dict[str, HasHealth]:
    """What can be asked for its health, by name.

    Args:
        services: by their class.
        owners: the names of the modules that yielded them, by the same.
    """
    parts: dict[str, HasHealth] = {}
    for kind, service in services.items():
        if isinstance(service, HasHealth):
            parts[f"{owners[kind]}.{kind.__name__}"] = service
        if isinstance(service, HasHealthParts):
            parts.update(service.health_parts())
    return parts


class HealthRound:
    """Asks the parts side by side, and remembers the checks that outlived their round.

    Args:
        seconds: how long one part's answer may take before the part counts as down.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._late: set[asyncio.Task[Health]] = set()

    async def ask(self, parts: Mapping[str, HasHealth]) -> dict[str, Health]:
        """The health of every part."""
        # A check that outlived its round is not asked again before it has ended, or every round would add one.
        self._late = {check for check in self._late if not check.done()}
        late = {check.get_name() for check in self._late}
        # Tasks of their own, because a check that swallows its cancellation would hold up the caller.
        checks = {name: spawn(_ask(part), name=name) for name, part in parts.items() if name not in late}
        try:
            if checks:
                await asyncio.wait(checks.values(), timeout=self._seconds)
        finally:
            for check in checks.values():
                if not check.done():
                    check.cancel()
                    self._late.add(check)
        report = dict.fromkeys(parts, Health("down", f"no answer within {self._seconds:g} s"))
        return report | {
            name: check.result() for name, check in checks.items() if check.done() and not check.cancelled()
        }

    async def end(self) -> None:
        """Cancel the checks that outlived their round; one that does not end is logged."""
        checks, self._late = self._late, set()
        for check in checks:
            check.cancel()
        if checks:
            _, stuck = await asyncio.wait(checks, timeout=self._seconds)
            for check in stuck:
                _log.error("the health check of %s does not end, although it was cancelled", check.get_name())


async def _ask(part: HasHealth) -> Health:
    try:
        health = cast("object", await part.health())  # parts may be unchecked
        if isinstance(health, Health) and health.status in ("ok", "degraded", "down"):
            return health
        return Health("down", f"the check returned a {type(health).__name__}, which is no Health")
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001  a check that breaks is an answer too
        if not cancelled_from_outside(error):
            _log.exception("the health check of %s failed", type(part).__name__)
        return Health("down", f"the check failed with {type(error).__name__}")
