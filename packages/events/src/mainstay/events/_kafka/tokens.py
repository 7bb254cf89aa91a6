"""Tokens for OAUTHBEARER: one is used for as long as it counts, and its successor is there before it expires."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import cast

from mainstay.core import Clock, spawn
from mainstay.events.settings import KafkaToken

_USED_FOR = 0.8
"""Of a token's time. In the rest a new one is asked for, and the old one still counts if there is none."""
_GIVE_UP_SECONDS = 15.0


class NoTokenError(ConnectionError):
    """There is no token, and so no connection."""


class Tokens:
    """The tokens of one cluster, shared by its connections.

    Args:
        source: asks the issuer.
        clock: measures how old one is.
    """

    def __init__(self, source: Callable[[], Awaitable[KafkaToken]], clock: Clock) -> None:
        self._clock = clock
        self._source = source
        self._token: KafkaToken | None = None
        self._asked_at = 0.0
        self._asking: asyncio.Task[KafkaToken] | None = None

    async def current(self) -> tuple[str, float]:
        """A token that counts, and for how many seconds.

        Raises:
            NoTokenError: there is none: the function of the settings failed, hung, or returned something else.
        """
        age = self._clock.monotonic() - self._asked_at
        token = self._token
        if token is not None and age < token.expires_in_seconds * _USED_FOR:
            return token.value.get_secret_value(), token.expires_in_seconds - age
        try:
            token = await self._new()
        except NoTokenError:
            # The issuer may be away for a while; the broker still takes the old one.
            if token is None or age >= token.expires_in_seconds:
                raise
        return token.value.get_secret_value(), token.expires_in_seconds - (self._clock.monotonic() - self._asked_at)

    def refused(self) -> None:
        """Ask for a new one the next time: the broker did not take this one."""
        self._token = None

    async def _new(self) -> KafkaToken:
        """Ask once for all that need one. In a context of its own: the answer is not only for the one that asks."""
        if self._asking is None:
            self._asking = spawn(self._ask(), name="events.token")
            self._asking.add_done_callback(self._asked)
        return await asyncio.shield(self._asking)

    def _asked(self, asking: asyncio.Task[KafkaToken]) -> None:
        self._asking = None
        if not asking.cancelled():
            asking.exception()  # the one that asked may have gone meanwhile

    async def _ask(self) -> KafkaToken:
        asked_at = self._clock.monotonic()
        try:
            async with asyncio.timeout(_GIVE_UP_SECONDS):
                token = cast("object", await self._source())
        except Exception as error:  # noqa: BLE001  a function of the service may raise anything
            # By its type alone, and not as the cause: what it says may hold what the issuer was asked with.
            msg = f"{self.name} gave no token: {type(error).__name__}"
            raise NoTokenError(msg) from None
        if not isinstance(token, KafkaToken):
            msg = f"{self.name} gave no KafkaToken, but a {type(token).__name__}"
            raise NoTokenError(msg)
        if not token.value or token.expires_in_seconds <= 0:
            msg = f"{self.name} gave a token that is {'empty' if not token.value else 'expired'}"
            raise NoTokenError(msg)
        self._token, self._asked_at = token, asked_at
        return token

    async def close(self) -> None:
        """Ask no longer."""
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.wait((self._asking,))

    @property
    def name(self) -> str:
        """How the function of the settings is called."""
        function = self._source
        return f"{function.__module__}:{getattr(function, '__qualname__', type(function).__qualname__)}"
