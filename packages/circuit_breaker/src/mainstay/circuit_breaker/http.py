"""httpx transports that make every request under a policy.

    client = httpx.AsyncClient(transport=AsyncPolicyTransport(http_read("catalogue")))

A response that says the server is not well (429, 500 and above, unless told otherwise) is a failure to the policies,
its `Retry-After` is honoured by a retry, and in the end the caller gets the response as it is, not an exception.
"""

from __future__ import annotations

import email.utils
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import cast

import httpx

from mainstay.circuit_breaker.errors import CircuitBreakerError, Rejected
from mainstay.circuit_breaker.policy import Policy

__all__ = ["AsyncPolicyTransport", "BadStatus", "PolicyTransport", "retry_after", "says_unwell"]


LONGEST_WAIT_SECONDS = 3600.0
"""A server that asks for more patience than this is not waited for: its answer stands."""


class BadStatus(CircuitBreakerError):
    """The server answered that it could not do its work. Policies see this; the caller gets the response."""

    code = "EXT_HTTP_STATUS"
    status = 502
    title = "Bad status of a called service"
    retryable = True

    def __init__(self, response: httpx.Response) -> None:
        seconds = retry_after(response.headers)
        super().__init__(f"HTTP {response.status_code}", retry_after_seconds=seconds)
        self.response = response
        if seconds is not None and seconds > LONGEST_WAIT_SECONDS:
            self.retryable = False


def says_unwell(response: httpx.Response) -> bool:
    """Whether the status speaks of the server's state rather than of the request: 429, 500 and above."""
    return response.status_code >= 500 or response.status_code == 429  # noqa: PLR2004  HTTP's own numbers


def retry_after(headers: httpx.Headers) -> float | None:
    """Seconds that `Retry-After` asks to wait, given as seconds or as a date; None where it is missing or malformed."""
    value = headers.get("retry-after", "").strip()
    if value.isascii() and value.isdigit():
        return min(float(value), _AGES)
    try:
        at = email.utils.parsedate_to_datetime(value)
        if at.tzinfo is None:
            at = at.replace(tzinfo=UTC)
        return min(max(0.0, (at - datetime.now(UTC)).total_seconds()), _AGES)
    except (ValueError, OverflowError):  # no date, or one that no calendar has
        return None


_AGES = 1e9  # thirty years: a longer time no clock can wait


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

    A request whose body is a stream of its own (`content=` of a generator or a file, `files=`) is not repeated once
    that stream has begun: it cannot be sent again. What the attempt before said comes out.
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
        with _Body.of(request) as body:
            try:
                if self._fetch is not None:
                    return _for_caller(request, await self._fetch(request))
                assert self._open is not None  # noqa: S101  one of the two is there
                parts = self._open(request)
                head = cast("httpx.Response", await anext(parts))
            except BadStatus as bad:
                return _for_caller(request, bad.response)
            except _Spent:
                return _for_caller(request, body.take_answer())
        return _for_caller(request, head, _Rest(parts))

    async def aclose(self) -> None:
        """Close the inner transport."""
        await self._inner.aclose()

    async def _whole(self, request: httpx.Request) -> httpx.Response:
        response = await self._begin(request)
        # Inside the policies: a body that breaks off or hangs is the server's failure.
        return _judged(await self._read(response), self._failed)

    async def _parts(self, request: httpx.Request) -> AsyncIterator[httpx.Response | bytes]:
        response = await self._begin(request)
        try:
            if self._failed(response):
                raise _bad(await self._read(response))
            yield response
            # The bytes as they came: the response made for the caller decodes them.
            async for part in cast("httpx.AsyncByteStream", response.stream):
                yield part
        finally:
            await response.aclose()

    async def _begin(self, request: httpx.Request) -> httpx.Response:
        _Body.refuse_repetition(request)
        response = await self._inner.handle_async_request(request)
        response.request = request
        return response

    @staticmethod
    async def _read(response: httpx.Response) -> httpx.Response:
        try:
            raw = b"".join([part async for part in cast("httpx.AsyncByteStream", response.stream)])
        finally:
            await response.aclose()
        return _with(response, httpx.ByteStream(raw))


class PolicyTransport(httpx.BaseTransport):
    """Makes the requests of an `httpx.Client` under `policy`; see `AsyncPolicyTransport`.

    Raises:
        TypeError: a policy that only async code can use, such as `Timeout` (give the client itself a timeout), or
            `stream` with one that cannot stand around a stream.
    """

    def __init__(
        self,
        policy: Policy,
        inner: httpx.BaseTransport | None = None,
        *,
        failed: Callable[[httpx.Response], bool] = says_unwell,
        stream: bool = False,
    ) -> None:
        self._inner = httpx.HTTPTransport() if inner is None else inner
        self._failed = failed
        self._fetch = None if stream else policy(self._whole)
        self._open = policy._build("sync_stream", self._parts) if stream else None

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Make the request.

        Raises:
            Rejected: a policy refused it.
        """
        with _Body.of(request) as body:
            try:
                if self._fetch is not None:
                    return _for_caller(request, self._fetch(request))
                assert self._open is not None  # noqa: S101  one of the two is there
                parts = self._open(request)
                head = cast("httpx.Response", next(parts))
            except BadStatus as bad:
                return _for_caller(request, bad.response)
            except _Spent:
                return _for_caller(request, body.take_answer())
        return _for_caller(request, head, _SyncRest(parts))

    def close(self) -> None:
        """Close the inner transport."""
        self._inner.close()

    def _whole(self, request: httpx.Request) -> httpx.Response:
        response = self._begin(request)
        return _judged(self._read(response), self._failed)

    def _parts(self, request: httpx.Request) -> Iterator[httpx.Response | bytes]:
        response = self._begin(request)
        try:
            if self._failed(response):
                raise _bad(self._read(response))
            yield response
            yield from cast("httpx.SyncByteStream", response.stream)
        finally:
            response.close()

    def _begin(self, request: httpx.Request) -> httpx.Response:
        _Body.refuse_repetition(request)
        response = self._inner.handle_request(request)
        response.request = request
        return response

    @staticmethod
    def _read(response: httpx.Response) -> httpx.Response:
        try:
            raw = b"".join(cast("httpx.SyncByteStream", response.stream))
        finally:
            response.close()
        return _with(response, httpx.ByteStream(raw))


# Responses. Policies get one that has been read, the caller one that has not: httpx reads it, measures `elapsed` by
# that, and leaves `iter_raw` for the bytes as they came.


def _with(response: httpx.Response, stream: httpx.ByteStream) -> httpx.Response:
    whole = _for_caller(response.request, response, stream)
    whole.read()
    return whole


def _for_caller(
    request: httpx.Request,
    response: httpx.Response,
    stream: httpx.AsyncByteStream | httpx.SyncByteStream | None = None,
) -> httpx.Response:
    return httpx.Response(
        response.status_code,
        headers=response.headers,
        stream=response.stream if stream is None else stream,
        extensions=response.extensions,
        request=request,
    )


def _judged(response: httpx.Response, failed: Callable[[httpx.Response], bool]) -> httpx.Response:
    if failed(response):
        raise _bad(response)
    body = response.request.stream
    if isinstance(body, _Body):
        body.answer = response
    return response


def _bad(response: httpx.Response) -> BadStatus:
    bad = BadStatus(response)
    body = response.request.stream
    if isinstance(body, _Body) and body.begun:
        bad.retryable = False  # waiting for another attempt would be in vain
    return bad


class _Rest(httpx.AsyncByteStream):
    """The parts after the head."""

    def __init__(self, parts: AsyncIterator[httpx.Response | bytes]) -> None:
        self._parts = parts

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for part in self._parts:
            yield cast("bytes", part)

    async def aclose(self) -> None:
        await self._parts.aclose()  # type: ignore[attr-defined]  # an async generator, declared by what it yields


class _SyncRest(httpx.SyncByteStream):
    """The parts after the head."""

    def __init__(self, parts: Iterator[httpx.Response | bytes]) -> None:
        self._parts = parts

    def __iter__(self) -> Iterator[bytes]:
        for part in self._parts:
            yield cast("bytes", part)

    def close(self) -> None:
        self._parts.close()  # type: ignore[attr-defined]  # a generator, declared by what it yields


# Requests.


class _Spent(Rejected):
    """The body has been sent and cannot be sent again. No retry repeats it, and the error before comes out."""


class _Body(httpx.AsyncByteStream, httpx.SyncByteStream):
    """A body that can be sent once, and knows whether that has begun."""

    def __init__(self, stream: object) -> None:
        self.begun = False
        self.answer: httpx.Response | None = None
        self._stream = stream

    @classmethod
    @contextmanager
    def of(cls, request: httpx.Request) -> Generator[_Body]:
        """Watch the body of `request` inside the block, unless it is bytes, which can be sent any number of times."""
        stream = request.stream
        body = cls(stream)
        if not isinstance(stream, httpx.ByteStream):
            request.stream = body
        try:
            yield body
        finally:
            request.stream = stream

    @staticmethod
    def refuse_repetition(request: httpx.Request) -> None:
        """Refuse a request that has begun to send such a body."""
        if isinstance(request.stream, _Body) and request.stream.begun:
            name = "the body of the request"
            raise _Spent(name, "sent already, and not to be had again: give the client bytes to have it repeated")

    def take_answer(self) -> httpx.Response:
        """What the attempt before got, where a retry did not like it."""
        assert self.answer is not None  # noqa: S101  an attempt that raised comes out of the retry as its error
        return self.answer

    async def __aiter__(self) -> AsyncIterator[bytes]:
        self.begun = True
        async for part in cast("httpx.AsyncByteStream", self._stream):
            yield part

    def __iter__(self) -> Iterator[bytes]:
        self.begun = True
        yield from cast("httpx.SyncByteStream", self._stream)
