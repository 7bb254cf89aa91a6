"""The schema registry, by the interface that Confluent's has and others share: schemas by the id before each value.

No call waits for it. An event whose schema is not known yet is tried again a moment later; meanwhile the schema is
asked for here. So a registry that is away or hangs holds up the events whose schemas it has yet to tell, and nothing
else. A schema never changes, and what is known stays known.

A registry that says itself that it has no schema of an id may not have heard of it yet. That is believed after half a
minute, and from then on at once; before, and for every other answer or none, the events wait.

Each question has a connection and a thread, and both end with it: one that is answered byte by byte without an end
would keep a thread that all share.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import ssl
from base64 import b64encode
from collections.abc import Mapping
from contextlib import suppress
from http.client import HTTPConnection, HTTPException
from importlib import import_module
from itertools import islice
from typing import Any, Literal, NamedTuple, NoReturn, Protocol, cast
from urllib.parse import quote, urlsplit

from mainstay.core import Clock, ConfigurationError, Drain, Health
from mainstay.events._sparing import said
from mainstay.events.errors import DecodeError, SchemaError
from mainstay.events.foreign import PREFIX, Data, is_by_registry
from mainstay.events.settings import EventsSettings

_log = logging.getLogger("mainstay.events")

_MOST = 1_000
"""Schemas that are kept in memory; of as many it is remembered that they are of no use."""
_LARGEST = 4 * 1024 * 1024
_AT_ONCE = 4
_AGAIN_SECONDS = 0.05
_AWAY_SECONDS = 1.0
_PATIENCE_SECONDS = 30.0
"""For how long the answer that there is no such schema is not believed."""
_REFUSED_SECONDS = 5.0
"""How long a schema is not asked for again that is of no use."""
_NOT_THERE = {40401, 40402, 40403}
"""No such subject, version, schema."""
_FORMATS: dict[str, tuple[str, str]] = {"avro": ("_avro", "fastavro"), "protobuf": ("_protobuf", "google")}
"""The file that reads each format, and what it needs."""


class Answer(NamedTuple):
    """A schema, as the registry tells it.

    Attributes:
        text: the schema.
        references: those that it names, by these names, each with its own.
    """

    text: str
    references: Mapping[str, Answer]


class Schema(Protocol):
    """A schema that is known."""

    def read(self, payload: bytes) -> Data:
        """Read what was written by it.

        Raises:
            DecodeError: this was not.
        """
        ...


class _Key(NamedTuple):
    format: Literal["avro", "protobuf"]
    id: int


class _NotThereError(Exception):
    """The registry says that it has nothing there.

    Args:
        path: of what was asked for.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path


class _UselessError(Exception):
    pass


def check_format(format: str) -> None:
    """See that what reads a format is installed.

    Raises:
        ConfigurationError: it is not.
    """
    if format in _FORMATS:
        file, needs = _FORMATS[format]
        try:
            import_module(f"mainstay.events.{file}")
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != needs:
                raise
            msg = f"a decoder of {format} needs an extra: pip install 'mainstay-events[{format}]'"
            raise ConfigurationError(msg) from error


def context_of(settings: EventsSettings) -> ssl.SSLContext:
    """What a connection to the registry trusts.

    Raises:
        ConfigurationError: the file of certificates is missing, or is none.
    """
    try:
        return ssl.create_default_context(cafile=settings.registry_ca_file)
    except OSError as error:
        msg = f"{settings.variable('registry_ca_file')}={settings.registry_ca_file}: {said(error)}"
        raise ConfigurationError(msg) from error


class SchemaRegistry:
    """The schemas that values of others were written by.

    Args:
        settings: where it is, and how this service shows who it is.
        clock: measures how long an answer counts.
    """

    def __init__(self, settings: EventsSettings, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self._url = (settings.registry_url or "").rstrip("/")
        self._tls = context_of(settings)
        self._known: dict[_Key, Schema] = {}
        self._useless: dict[_Key, tuple[str, float]] = {}  # why, and until when that counts
        self._missing: dict[_Key, float] = {}  # since when
        self._wanted: dict[_Key, None] = {}
        self._drain: Drain | None = None
        self._trouble: str | None = None

    def read(self, format: Literal["avro", "protobuf"], value: bytes) -> Data:
        """See `Schemas`."""
        if not is_by_registry(value):
            msg = "the value has no id of a schema before it: it was not written through a schema registry"
            raise DecodeError(msg)
        key = _Key(format, int.from_bytes(value[1:PREFIX], "big"))
        schema = self._known.get(key)
        if schema is None:
            self._want(key)
        return schema.read(value[PREFIX:])

    def _want(self, key: _Key) -> NoReturn:
        """Have a schema asked for.

        Raises:
            SchemaError: it is not known yet.
            DecodeError: it is of no use.
        """
        why, until = self._useless.get(key, ("", 0.0))
        if why and self._clock.monotonic() < until:
            raise DecodeError(why)
        if len(self._wanted) < _MOST:
            self._wanted[key] = None
        if self._drain is not None:
            self._drain.wake()
        away = self._trouble is not None or key in self._missing
        detail = self._trouble or f"the schema registry at {self._url} has yet to tell schema {key.id}"
        raise SchemaError(detail, retry_after_seconds=_AWAY_SECONDS if away else _AGAIN_SECONDS)

    async def run(self, drain: Drain) -> None:
        """Worker: asks for what is wanted."""
        self._drain = drain
        while not drain.begun:
            asked = list(islice(self._wanted, _AT_ONCE))
            if asked:
                await asyncio.gather(*map(self._ask, asked))
                for key in asked:  # until now it was wanted, and so not asked for twice
                    del self._wanted[key]
            else:
                await drain.pause(60.0, wakeable=True)

    async def _ask(self, key: _Key) -> None:
        try:
            async with asyncio.timeout(self._settings.registry_seconds):
                schema = await self._schema(key)
        except _NotThereError as error:
            self._trouble = None
            since = self._missing.setdefault(key, self._clock.monotonic())
            if key in self._useless or self._clock.monotonic() - since >= _PATIENCE_SECONDS:
                named = "" if error.path == _path_to(key) else f"{error.path}, which it names in "
                self._give_up(key, f"the schema registry at {self._url} has no {named}schema {key.id}")
        except _UselessError as error:
            self._trouble = None
            self._give_up(key, f"schema {key.id} of the registry at {self._url}: {error}")
        except Exception as error:  # noqa: BLE001  after any answer, what waits for it goes on waiting
            trouble = f"the schema registry at {self._url} does not answer as one: {said(error)}"
            if self._trouble is None:
                _log.warning("%s; events whose schema is not known wait for it", trouble)
            self._trouble = trouble
        else:
            self._trouble = None
            self._missing.pop(key, None)
            self._useless.pop(key, None)
            _bounded(self._known)[key] = schema

    def _give_up(self, key: _Key, why: str) -> None:
        self._missing.pop(key, None)
        _bounded(self._useless)[key] = why, self._clock.monotonic() + _REFUSED_SECONDS

    async def _schema(self, key: _Key) -> Schema:
        """Look a schema up with all that it names.

        Raises:
            _NotThereError, _UselessError: it is not there, or cannot be used.
            Exception: nothing is known.
        """
        form = "format=serialized&" if key.format == "protobuf" else ""
        seen: dict[str, Answer] = {}

        async def look(path: str) -> Answer:
            if path not in seen:
                # What was deleted is still what others have been written by; an id finds it without asking for that.
                gone = "" if path == _path_to(key) else "deleted=true"
                told = await self._get(f"{path}?{form}{gone}".rstrip("?&"))
                kind = told.get("schemaType") or "AVRO"
                if kind != key.format.upper():
                    msg = f"it is {kind}, and the topic is said to hold {key.format}"
                    raise _UselessError(msg)
                if len(seen) > _MOST:
                    msg = "it names too many others"
                    raise _UselessError(msg)
                references = cast("list[dict[str, Any]]", told.get("references") or [])
                text = str(told["schema"])
                seen[path] = Answer(text, {})  # for one that names itself
                named = {str(each["name"]): await look(_path_of(each)) for each in references}
                seen[path] = Answer(text, named)
            return seen[path]

        try:
            answer = await look(_path_to(key))
        except (KeyError, TypeError, AttributeError) as error:
            msg = "an answer of another form than a registry's"
            raise ValueError(msg) from error
        try:
            schema: Schema = import_module(f"mainstay.events.{_FORMATS[key.format][0]}").schema_of(answer)
        except Exception as error:
            msg = f"it cannot be used: {said(error)}"
            raise _UselessError(msg) from error
        return schema

    async def _get(self, path: str) -> dict[str, Any]:
        question = _Question(self._url, path, self._headers(), self._tls, self._settings.registry_seconds)
        try:
            return await asyncio.to_thread(question.ask)
        finally:
            question.give_up()

    def _headers(self) -> dict[str, str]:
        settings = self._settings
        headers = {"Accept": "application/vnd.schemaregistry.v1+json, application/json", "Connection": "close"}
        if settings.registry_token is not None:
            headers["Authorization"] = f"Bearer {settings.registry_token.get_secret_value()}"
        elif settings.registry_password is not None:
            account = f"{settings.registry_username}:{settings.registry_password.get_secret_value()}".encode()
            headers["Authorization"] = f"Basic {b64encode(account).decode()}"
        return headers

    async def health(self) -> Health:
        """Degraded while it does not answer."""
        if self._trouble is not None:
            return Health("degraded", self._trouble)
        return Health("ok", f"{len(self._known)} schemas of the registry at {self._url} are known")

    async def wrong(self) -> list[str]:
        """What is wrong with the connection, a sentence each."""
        try:
            async with asyncio.timeout(self._settings.registry_seconds):
                await self._get("/config")
        except (OSError, HTTPException) as error:
            return [f"the schema registry at {self._url} cannot be asked: {said(error)}"]
        except (_NotThereError, ValueError):
            return []
        return []


class _Question:
    """A question to the registry. A redirect is no answer: another server would be shown the account.

    Args:
        url: of the registry.
        path: what to ask for.
        headers: what to show.
        tls: what is trusted, where the address begins with https:.
        seconds: for how long each step may wait for the network.
    """

    def __init__(self, url: str, path: str, headers: Mapping[str, str], tls: ssl.SSLContext, seconds: float) -> None:
        self._at = urlsplit(url)
        self._path = path
        self._headers = headers
        self._tls = tls if self._at.scheme == "https" else None
        self._seconds = seconds
        self._line: socket.socket | None = None
        self._given_up = False

    def ask(self) -> dict[str, Any]:
        """The answer; for a thread.

        Raises:
            _NotThereError: there is none.
            Exception: nothing is known.
        """
        host, port = self._at.hostname or "", self._at.port or (80 if self._tls is None else 443)
        connection = HTTPConnection(host, port)
        plain = socket.create_connection((host, port), self._seconds)
        try:
            self._line = plain.dup()  # since TLS takes the other one over, which could then not be ended from outside
            if self._given_up:
                msg = "given up"
                raise TimeoutError(msg)
            connection.sock = plain if self._tls is None else self._tls.wrap_socket(plain, server_hostname=host)
            connection.request("GET", f"{self._at.path}{self._path}", headers=dict(self._headers))
            response = connection.getresponse()
            status, body = response.status, response.read(_LARGEST + 1)
        finally:
            connection.close()
            plain.close()
            if self._line is not None:
                self._line.close()
        if status != 200:  # noqa: PLR2004  OK
            if _code_in(body) in _NOT_THERE:
                raise _NotThereError(self._path.partition("?")[0])
            msg = f"HTTP status {status}"
            raise ConnectionError(msg)
        if len(body) > _LARGEST:
            msg = "an answer of more than 4 MiB"
            raise ValueError(msg)
        told: object = json.loads(body)
        if not isinstance(told, dict):
            msg = "an answer of another form than a registry's"
            raise ValueError(msg)  # noqa: TRY004  as all that is wrong with one
        return cast("dict[str, Any]", told)

    def give_up(self) -> None:
        """Have the thread end that is asking, if one still is."""
        self._given_up = True
        if self._line is not None:
            with suppress(OSError):  # it has ended meanwhile
                self._line.shutdown(socket.SHUT_RDWR)


def _path_to(key: _Key) -> str:
    return f"/schemas/ids/{key.id}"


def _path_of(reference: Mapping[str, Any]) -> str:
    return f"/subjects/{quote(str(reference['subject']), safe='')}/versions/{int(reference['version'])}"


def _code_in(body: bytes) -> int | None:
    try:
        told: object = json.loads(body)
    except ValueError:
        return None
    return cast("dict[str, Any]", told).get("error_code") if isinstance(told, dict) else None


def _bounded(kept: dict[_Key, Any]) -> dict[_Key, Any]:
    """A place for one more: the oldest makes it."""
    while len(kept) >= _MOST:
        del kept[next(iter(kept))]
    return kept
