"""The settings of the database package."""

from __future__ import annotations

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import SettingsConfigDict
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from mainstay.core import Settings

__all__ = ["DatabaseSettings"]

_DRIVERS = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+asyncpg", "postgres": "postgresql+asyncpg"}


class DatabaseSettings(Settings):
    """Where the database is, and how long to wait for it.

    Attributes:
        url: `sqlite+aiosqlite:///path`, `sqlite+aiosqlite:///:memory:` or `postgresql+asyncpg://user:pass@host/name`.
            The driver may be left out. A secret, because of the password in it.
        direct_url: the same PostgreSQL past a pooler, where `url` leads by way of one: hints between processes
            (`Database.listen`) need a server of their own. A secret, too.
        pool_size: connections for units of work and reads, at most; 1 or more.
        pool_timeout_seconds: how long a unit of work or a read waits for one of them before `DatabaseBusy`.
        recorder_connections: further connections (PostgreSQL) on which the writes outside units of work are committed
            in groups. Writes of one route always take the same one.
        busy_timeout_seconds: how long a write waits for SQLite's one writer, for a lock, or for a server that is being
            restarted, before it fails.
        idle_transaction_seconds: how long a transaction on PostgreSQL may do nothing before the server rolls it back
            and ends its connection. So long may a process that froze, or lost its network, hold up those that wait for
            its locks; and no longer may a unit of work await anything but the database.
        statement_timeout_seconds: how long PostgreSQL may take for one statement before it is cancelled and its
            connection taken for lost.
        migrate: whether a start brings the tables in SQLite up to date. Without it a start on old tables is refused, as
            on PostgreSQL, and no file is made: so it is for commands that only read.
    """

    model_config = SettingsConfigDict(env_prefix="MAINSTAY_DATABASE_")

    url: SecretStr = SecretStr("sqlite+aiosqlite:///mainstay.db")
    direct_url: SecretStr | None = None
    pool_size: int = Field(default=10, ge=1)
    pool_timeout_seconds: float = Field(default=5.0, gt=0)
    recorder_connections: int = Field(default=1, ge=1, le=16)
    busy_timeout_seconds: float = Field(default=10.0, gt=0)
    idle_transaction_seconds: float = Field(default=10.0, gt=0)
    statement_timeout_seconds: float = Field(default=60.0, gt=0)
    migrate: bool = True

    @field_validator("url")
    @classmethod
    def _supported(cls, value: SecretStr) -> SecretStr:
        parse_url(value.get_secret_value())
        return value

    @field_validator("direct_url")
    @classmethod
    def _a_server(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and parse_url(value.get_secret_value()).get_backend_name() != "postgresql":
            msg = "is no address of a PostgreSQL: only there do hints between processes need one"
            raise ValueError(msg)
        return value

    @property
    def dialect(self) -> str:
        """`sqlite` or `postgresql`."""
        return parse_url(self.url.get_secret_value()).get_backend_name()


def shown(url: URL) -> str:
    """A URL for people: without its password, and without the parameters, which may hold another."""
    return url.set(query={}).render_as_string(hide_password=True)


def parse_url(url: str) -> URL:
    """The URL with the driver this package uses.

    Raises:
        ValueError: it is no database URL, or of a database or driver that is not supported; never repeats the URL.
    """
    try:
        parsed = make_url(url.strip())
    except (ArgumentError, ValueError):
        msg = "is no database URL: write sqlite+aiosqlite:///path or postgresql+asyncpg://user:password@host/name"
        raise ValueError(msg) from None
    name = _DRIVERS.get(parsed.drivername, parsed.drivername)
    if name not in _DRIVERS.values():
        msg = f"{parsed.drivername} is not supported: use sqlite+aiosqlite or postgresql+asyncpg"
        raise ValueError(msg)
    # What follows the first @ of a password reads as host or name, and those are printed.
    if name != _DRIVERS["sqlite"] and "@" in f"{parsed.host}{parsed.database}":
        msg = "has more than one @: percent-encode the password, in which @ is %40"
        raise ValueError(msg)
    parsed = parsed.set(drivername=name)
    if name != _DRIVERS["sqlite"]:
        _check_parameters(parsed)
    return parsed


_PARAMETERS = frozenset(
    {
        "application_name",
        "channel_binding",
        "connect_timeout",
        "dbname",
        "gsslib",
        "host",
        "krbsrvname",
        "options",
        "passfile",
        "password",
        "port",
        "ssl",
        "ssl_max_protocol_version",
        "ssl_min_protocol_version",
        "sslcert",
        "sslcrl",
        "sslkey",
        "sslmode",
        "sslnegotiation",
        "sslpassword",
        "sslrootcert",
        "target_session_attrs",
        "user",
    }
)
"""libpq's parameters that work: those that asyncpg knows, and `connect_timeout`. `ssl` is `sslmode` by another name."""


def _check_parameters(url: URL) -> None:
    query = url.query
    unknown = sorted(set(query) - _PARAMETERS)
    if unknown:
        msg = f"has parameters that are not supported ({', '.join(unknown)}): leave them out"
        raise ValueError(msg)
    if query.get("channel_binding") == "require":
        msg = "asks for channel_binding=require, which asyncpg cannot do: leave it out, and use sslmode=verify-full"
        raise ValueError(msg)
    seconds = query.get("connect_timeout", "0")
    if not (isinstance(seconds, str) and seconds.isdecimal()):
        msg = "has a connect_timeout that is no number of seconds"
        raise ValueError(msg)


def variable_of_url() -> str:
    """The environment variable that sets the URL."""
    return f"{DatabaseSettings.model_config.get('env_prefix', '')}URL"
