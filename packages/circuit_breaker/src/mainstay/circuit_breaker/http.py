"""httpx transports that make every request under a policy.

    client = httpx.AsyncClient(transport=AsyncPolicyTransport(http_read("catalogue")))

A response that says the server is not well (429, 500 and above, unless told otherwise) is a failure to the policies,
its `Retry-After` is honoured by a retry, and in the end the caller gets the response as it is, not an exception.
"""

from __future__ import annotations

import email.utils
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import cast

import httpx

from mainstay.circuit_breaker._admission import Policy
from mainstay.core import MainstayError

__all__ = ["AsyncPolicyTransport", "BadStatus", "PolicyTransport", "retry_after", "says_unwell"]


class BadStatus(MainstayError):
    """The server answered that it could not do its work. Policies see this; the caller gets the response."""

    code = "EXT_HTTP_STATUS"
    retryable = True

    def __init__(self, response: httpx.Response) -> None:
        super().__init__(f"HTTP {response.status_code}", retry_after_seconds=retry_after(response.headers))
        self.response = response


def says_unwell(response: httpx.Response) -> bool:
    """Whether the status speaks of the server's state rather than of the request: 429, 500 and above."""
    return response.status_code >= 500 or response.status_code == 429  # noqa: PLR2004  HTTP's own numbers


def retry_after(headers: httpx.Headers) -> float | None:
    """Seconds that `Retry-After` asks to wait, given as seconds or as a date; None where it is missing or malformed."""
    value = headers.get("retry-after", "").strip()
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        at = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    if at.tzinfo is None:
        at = at.replace(tzinfo=UTC)
    return max(0.0, (at - datetime.now(UTC)).total_seconds())


class AsyncPolicyTransport(httpx.AsyncBaseTransport):
    """Makes the requests of an `httpx.AsyncClient` under `policy`.

    Args:
        policy: any policy; one with keys gets the `httpx.Request`, as in
            `KeyedBreaker("api", key=lambda request: request.url.host)`. Without `stream`, retries and time limits cover
            the body as well.
        inner: makes the requests; by default `httpx.AsyncHTTPTransport()`.
        failed: whether a response is a failure; by default `says_unwell`.
        stream: pass the body on while it comes. The policies settle when it ends: one that breaks off is a failure, one
            that the caller leaves early is neutral. A retry ends with the head.

    Raises:
        TypeError: `stream` with a policy that cannot stand around a stream, such as `Timeout`.
    """

    def __init__(
        self,
        policy: Policy,
        inner: httpx.AsyncBaseTransport | None = None,
        *,
        failed: Callable[[httpx.Response], bool] = says_unwell,
        stream: bool = False,
    ) -> None:
        self._inner = httpx.AsyncHTTPTransport() if inner is None else inner
        self._failed = failed
        self._fetch = None if stream else policy(self._whole)
        self._open = policy(self._parts) if stream else None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Make the request.

        Raises:
            Rejected: a policy refused it.
        """
        try:
            if self._fetch is not None:
                return await self._fetch(request)
            assert self._open is not None  # noqa: S101  one of the two is there
            parts = self._open(request)
            head = cast("httpx.Response", await anext(parts))
        except BadStatus as bad:
            return bad.response
        return httpx.Response(
            head.status_code, headers=head.headers, stream=_Rest(parts), extensions=head.extensions, request=request
        )

    async def aclose(self) -> None:
        """Close the inner transport."""
        await self._inner.aclose()

    async def _whole(self, request: httpx.Request) -> httpx.Response:
        response = await self._inner.handle_async_request(request)
        response.request = request
        try:
            await response.aread()  # inside the policies: a body that breaks off or hangs is the server's failure
        finally:
            await response.aclose()
        if self._failed(response):
            raise BadStatus(response)
        return response

    async def _parts(self, request: httpx.Request) -> AsyncIterator[httpx.Response | bytes]:
        response = await self._inner.handle_async_request(request)
        response.request = request
        try:
            if self._failed(response):
                await response.aread()
                raise BadStatus(response)
            yield response
            # The bytes as they came: the response made for the caller decodes them.
            async for part in cast("httpx.AsyncByteStream", response.stream):
                yield part
        finally:
            await response.aclose()


class _Rest(httpx.AsyncByteStream):
    """The parts after the head."""

    def __init__(self, parts: AsyncIterator[httpx.Response | bytes]) -> None:
        self._parts = parts

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for part in self._parts:
            yield cast("bytes", part)

    async def aclose(self) -> None:
        await self._parts.aclose()  # type: ignore[attr-defined]  # an async generator, declared by what it yields


class PolicyTransport(httpx.BaseTransport):
    """Makes the requests of an `httpx.Client` under `policy`; see `AsyncPolicyTransport`. Bodies are read inside it.

    Raises:
        TypeError: a policy that only async code can use, such as `Timeout`; give the client itself a timeout.
    """

    def __init__(
        self,
        policy: Policy,
        inner: httpx.BaseTransport | None = None,
        *,
        failed: Callable[[httpx.Response], bool] = says_unwell,
    ) -> None:
        self._inner = httpx.HTTPTransport() if inner is None else inner
        self._failed = failed
        self._fetch = policy(self._whole)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Make the request.

        Raises:
            Rejected: a policy refused it.
        """
        try:
            return self._fetch(request)
        except BadStatus as bad:
            return bad.response

    def close(self) -> None:
        """Close the inner transport."""
        self._inner.close()

    def _whole(self, request: httpx.Request) -> httpx.Response:
        response = self._inner.handle_request(request)
        response.request = request
        try:
            response.read()
        finally:
            response.close()
        if self._failed(response):
            raise BadStatus(response)
        return response
