"""How events are configured; read from `MAINSTAY_EVENTS_…`."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, ImportString, SecretStr, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from mainstay.core import ConfigurationError, FullJitter, Retry, Settings
from mainstay.events.event import TOPIC_RULE, EventDefinition, is_topic

__all__ = ["EventsSettings", "KafkaToken"]

_SERVER = re.compile(r"(?P<host>\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+):(?P<port>[0-9]{1,5})")
_LAST_PORT = 65_535
_INSTANCE = re.compile(r"[A-Za-z0-9._-]{1,249}")

# Options of Kafka's clients that change how much is carried at once, and nothing that is promised: each with the least
# and the most that is taken, or with the values that there are.
_CLIENT_OPTIONS: dict[str, tuple[int, int] | frozenset[str]] = {
    "batch.size": (0, 16 * 1024 * 1024),
    "compression.type": frozenset({"none", "gzip", "snappy", "lz4", "zstd"}),
    "connections.max.idle.ms": (10_000, 86_400_000),
    "fetch.max.bytes": (1024, 1024 * 1024 * 1024),
    "fetch.max.wait.ms": (1, 10_000),
    "fetch.min.bytes": (1, 64 * 1024 * 1024),
    "linger.ms": (0, 5_000),
    "max.partition.fetch.bytes": (1024, 1024 * 1024 * 1024),
    "metadata.max.age.ms": (1_000, 3_600_000),
    "retry.backoff.ms": (10, 60_000),
}


@dataclass(frozen=True, slots=True)
class KafkaToken:
    """A token for OAUTHBEARER, as its issuer has given it.

    Args:
        value: what the broker is shown.
        expires_in_seconds: how long it counts from now. A new one is asked for before that time is over.
    """

    value: SecretStr
    expires_in_seconds: float


_SOURCE = r"^[A-Za-z0-9._:@/+=-]{1,128}$"


class EventsSettings(Settings):
    """Settings of `EventsModule`. One that the chosen transport cannot honour is an error, never ignored.

    Attributes:
        transport: where events travel. `sql` is a durable log in the service's own database, `kafka` is Apache Kafka,
            `memory` is for tests and loses everything when the process ends.
        source: the name of this service, written into each event it publishes. By default it is the one that another
            module of the App knows (`ObservabilitySettings.service_name`), and `mainstay` where none does. On `kafka`
            there must be one, and for ever: consumer groups and the topic of dead letters are called by it.
        partitions: into how many ordered parts each topic is divided when it is created; for `sql`, all topics.
        topics: the topic of an event type, where it is neither the one that its class says nor the default: the type
            without its last word, so that `order.placed` and `order.paid` share the topic `order` and one order's
            events keep their order.
        outbox: `kafka` only, there on by default. Events are written to the Database, in the unit of work that is open,
            and relayed from there; without it `publish` waits for the broker. The `sql` log is its own outbox.
        outbox_bytes: how much of the outbox is in memory at once while it is relayed.
        concurrency: how many events each consumer group of a process handles at once.
        window_bytes: about how much of the topics each consumer group of a process has in memory at once.
        retry_attempts: how often a handler is called before its event becomes a dead letter, unless `on(retry=…)` says
            it.
        retry_initial_seconds, retry_max_seconds: the waits between attempts, exponential with full jitter.
        crash_attempts: how often the call of an event may end its process before the event is given up. Counted in the
            Database; on `kafka` without one nothing is counted, and the event is called for ever.
        drain_seconds: how long handlers may take to finish when their partition moves to another process.
        stuck_seconds: an event in flight for longer than this makes the health degraded.
        send_seconds: how long a confirmation by the broker may take.
        lease_seconds: how long a killed process keeps its lanes and partitions from others. Default: 6.0, the
            least that brokers take by their own defaults (`group.min.session.timeout.ms`).
        inbox_days: how long the inbox remembers an event: the window within which a duplicate is recognised.
        dead_letter_days: how long dead letters that were redriven or discarded can still be listed. Those that wait are
            kept for as long as they do. Not for the topic that a service on `kafka` without outbox keeps them in.
        log_days: `sql` only: how long events stay in the log at least, and how long a group without any process keeps
            there what it has not read.
        kafka_client: by what the cluster is reached: aiokafka, or `confluent`, which is librdkafka; each is an extra.
        kafka_servers: addresses to find the cluster by, `host:port,host:port`.
        kafka_create_topics: create the topics that do not exist. Default: True.
        kafka_replicas: how many brokers keep each topic that is created; by default what the cluster says.
        kafka_protocol: `SSL` encrypts, `SASL_PLAINTEXT` shows an account, `SASL_SSL` does both. Default: `PLAINTEXT`.
        kafka_ca_file: certificates of the authorities that may have signed the brokers', in PEM form. By default those
            that the system trusts.
        kafka_certificate_file: the certificate that this service shows to brokers that ask for one, in PEM form.
        kafka_key_file: its private key, in PEM form. By default it is in the file of the certificate.
        kafka_key_password: of the private key, if it has one.
        kafka_mechanism: how SASL shows the account. Default: `PLAIN`.
        kafka_username, kafka_password: the account, for all mechanisms but `OAUTHBEARER`.
        kafka_token: `OAUTHBEARER` only: an async function without parameters that gets a `KafkaToken` from its issuer;
            in the environment its place, `package.module:function`. It is called when a token is needed and then once
            before each expires, not for each connection.
        kafka_instance_id: a name of this process that it keeps over restarts and shares with no other, such as that of
            a pod of a StatefulSet. A process that is back within `lease_seconds` finds its partitions waiting, without
            a rebalance; one that stops for good keeps them from others for so long.
        kafka_options: options of the client, by Kafka's names: `batch.size`, `compression.type`,
            `connections.max.idle.ms`, `fetch.max.bytes`, `fetch.max.wait.ms`, `fetch.min.bytes`, `linger.ms`,
            `max.partition.fetch.bytes`, `metadata.max.age.ms`, `retry.backoff.ms`.
        registry_url: of the schema registry that decoders of `avro` and `protobuf` ask, `https://host:port`.
        registry_username, registry_password: the account that it is shown, by basic authentication.
        registry_token: what it is shown instead, as a bearer's.
        registry_ca_file: certificates of the authorities that may have signed its own, in PEM form. By default those
            that the system trusts.
        registry_seconds: how long its answer may take.
    """

    model_config = SettingsConfigDict(env_prefix="MAINSTAY_EVENTS_")

    transport: Literal["sql", "kafka", "memory"] = "sql"
    source: str = Field(default="mainstay", pattern=_SOURCE)
    partitions: int = Field(default=8, ge=1, le=1024)
    topics: dict[str, str] = Field(default_factory=dict[str, str])
    outbox: bool | None = None
    outbox_bytes: int = Field(default=8 * 1024 * 1024, ge=1024)
    concurrency: int = Field(default=64, ge=1, le=10_000)
    window_bytes: int = Field(default=64 * 1024 * 1024, ge=1024)
    retry_attempts: int = Field(default=5, ge=1)
    retry_initial_seconds: float = Field(default=0.2, ge=0, allow_inf_nan=False)
    retry_max_seconds: float = Field(default=10.0, ge=0, allow_inf_nan=False)
    crash_attempts: int = Field(default=3, ge=1)
    drain_seconds: float = Field(default=10.0, gt=0, le=3600)
    stuck_seconds: float = Field(default=60.0, gt=0, allow_inf_nan=False)
    send_seconds: float = Field(default=30.0, ge=1, le=3600)
    lease_seconds: float = Field(default=6.0, ge=1, le=3600)
    inbox_days: float = Field(default=7.0, gt=0, allow_inf_nan=False)
    dead_letter_days: float = Field(default=30.0, gt=0, allow_inf_nan=False)
    log_days: float = Field(default=7.0, gt=0, allow_inf_nan=False)
    kafka_client: Literal["aiokafka", "confluent"] = "aiokafka"
    kafka_servers: str | None = None
    kafka_create_topics: bool = True
    kafka_replicas: int | None = Field(default=None, ge=1)
    kafka_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    kafka_ca_file: str | None = None
    kafka_certificate_file: str | None = None
    kafka_key_file: str | None = None
    kafka_key_password: SecretStr | None = None
    kafka_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"] = "PLAIN"
    kafka_username: str | None = None
    kafka_password: SecretStr | None = None
    kafka_token: ImportString[Callable[[], Awaitable[KafkaToken]]] | None = None
    kafka_instance_id: str | None = None
    kafka_options: dict[str, int | str] = Field(default_factory=dict[str, int | str])
    registry_url: str | None = None
    registry_username: str | None = None
    registry_password: SecretStr | None = None
    registry_token: SecretStr | None = None
    registry_ca_file: str | None = None
    registry_seconds: float = Field(default=5.0, gt=0, le=60)

    @field_validator("topics")
    @classmethod
    def _are_topics(cls, topics: dict[str, str]) -> dict[str, str]:
        for topic in topics.values():
            if not is_topic(topic):
                msg = f"{topic!r} is no name of a topic: {TOPIC_RULE}"
                raise ValueError(msg)
        return topics

    @field_validator("kafka_servers")
    @classmethod
    def _are_addresses(cls, servers: str | None) -> str | None:
        if servers is None:
            return None
        addresses = [address.strip() for address in servers.split(",")]
        for address in addresses:
            match = _SERVER.fullmatch(address)
            if match is None or not 0 < int(match["port"]) <= _LAST_PORT:
                msg = (
                    f"{address!r} is no address of a broker: write host:port,host:port, without brackets or quotes "
                    "around them, and without a protocol, which is kafka_protocol"
                )
                raise ValueError(msg)
        return ",".join(addresses)

    @field_validator("registry_url")
    @classmethod
    def _is_url(cls, url: str | None) -> str | None:
        if url is None:
            return None
        try:
            parts = urlsplit(url)
            well_formed = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
            well_formed = well_formed and parts.username is None and not parts.query and not parts.fragment
        except ValueError:
            well_formed = False
        if not well_formed:
            msg = (
                "it is no address of a schema registry: write https://host:port, with a path if it has one. Its "
                "account is registry_username and registry_password"
            )
            raise ValueError(msg)
        return url

    @field_validator("kafka_instance_id")
    @classmethod
    def _is_instance(cls, name: str | None) -> str | None:
        if name is not None and _INSTANCE.fullmatch(name) is None:
            msg = f"{name!r} is no name of a member: 1 to 249 letters, digits, dots, underscores and hyphens"
            raise ValueError(msg)
        return name

    @field_validator("kafka_options")
    @classmethod
    def _are_options(cls, options: dict[str, int | str]) -> dict[str, int | str]:
        for name, value in options.items():
            allowed = _CLIENT_OPTIONS.get(name)
            if allowed is None:
                msg = f"{name!r} cannot be passed to the client; {', '.join(_CLIENT_OPTIONS)} can"
                raise ValueError(msg)
            if isinstance(allowed, frozenset):
                taken, wanted = value in allowed, f"one of {', '.join(sorted(allowed))}"
            else:
                taken = isinstance(value, int) and allowed[0] <= value <= allowed[1]
                wanted = f"a whole number from {allowed[0]} to {allowed[1]}"
            if not taken:
                msg = f"{name!r} is {value!r}, and must be {wanted}"
                raise ValueError(msg)
        return options

    @model_validator(mode="after")
    def _honoured(self) -> Self:
        for field in sorted(self.model_fields_set):
            if getattr(self, field) is not None:
                msg = self._cannot_honour(field)
                if msg is not None:
                    raise ValueError(msg)
        missing = self._missing_of_registry() or (self._missing() if self.transport == "kafka" else None)
        if missing is not None:
            raise ValueError(missing)
        return self

    def _cannot_honour(self, field: str) -> str | None:
        if self.transport != "kafka" and (
            field.startswith("kafka_") or field in {"outbox", "outbox_bytes", "send_seconds"}
        ):
            own = field == "outbox" and self.transport == "sql"
            why = "its log is its own outbox" if own else "it has no use for it"
            return f"transport {self.transport!r} cannot honour {field}: {why}; leave it out, or use transport 'kafka'"
        if self.transport != "sql" and field == "log_days":
            return f"transport {self.transport!r} cannot honour log_days: only the sql log is deleted by this service"
        if self.transport == "memory" and field in {"lease_seconds", "crash_attempts"}:
            return f"transport 'memory' cannot honour {field}: no other process takes part"
        if not self.kafka_create_topics and field in {"partitions", "kafka_replicas"}:
            return f"kafka_create_topics=False cannot honour {field}: their creator decides; leave it out"
        return self._cannot_show(field)

    def _cannot_show(self, field: str) -> str | None:
        """Why a connection has no use for a setting: certificates without TLS, an account that no broker is shown."""
        sasl = self.kafka_protocol.startswith("SASL")
        if (not sasl and field in {"kafka_mechanism", "kafka_username", "kafka_password", "kafka_token"}) or (
            not self.kafka_protocol.endswith("SSL")
            and field in {"kafka_ca_file", "kafka_certificate_file", "kafka_key_file", "kafka_key_password"}
        ):
            return f"kafka_protocol {self.kafka_protocol!r} cannot honour {field}: leave it out, or use 'SASL_SSL'"
        if field in (
            {"kafka_username", "kafka_password"} if self.kafka_mechanism == "OAUTHBEARER" else {"kafka_token"}
        ):
            return f"kafka_mechanism {self.kafka_mechanism!r} cannot honour {field}: leave it out"
        return None

    def _missing_of_registry(self) -> str | None:
        """Which setting those of the schema registry need, or do not go with."""
        mine = [field for field in sorted(self.model_fields_set) if field.startswith("registry_")]
        if self.registry_url is None:
            return next((f"{field} needs registry_url" for field in mine if getattr(self, field) is not None), None)
        if (self.registry_username is None) != (self.registry_password is None):
            return "registry_username and registry_password need each other"
        if self.registry_username is not None and self.registry_token is not None:
            return "registry_token and registry_username exclude each other: leave one of them out"
        if self.registry_ca_file is not None and not self.registry_url.startswith("https:"):
            return "registry_ca_file needs a registry_url that begins with https:"
        return None

    def _missing(self) -> str | None:
        """Which setting the others need."""
        if not self.kafka_servers:
            return "transport 'kafka' needs kafka_servers: set MAINSTAY_EVENTS_KAFKA_SERVERS=host:port"
        if self.kafka_certificate_file is None and (self.kafka_key_file or self.kafka_key_password):
            return "a private key needs kafka_certificate_file: the certificate that belongs to it"
        if self.kafka_protocol.startswith("SASL"):
            if self.kafka_mechanism == "OAUTHBEARER":
                if self.kafka_token is None:
                    return "kafka_mechanism 'OAUTHBEARER' needs kafka_token: a function that gets a KafkaToken"
            elif not (self.kafka_username and self.kafka_password):
                return f"kafka_protocol {self.kafka_protocol!r} needs kafka_username and kafka_password"
        return None

    def named(self, service_name: str | None) -> Self:
        """These settings, with the name of the service as the source unless they say one.

        Raises:
            ConfigurationError: that name can be no source, or there is none and Kafka needs one.
        """
        if "source" in self.model_fields_set:
            return self
        if service_name is not None:
            if not re.fullmatch(_SOURCE, service_name):
                msg = (
                    f"the service is called {service_name!r}, which events cannot carry as their source: set "
                    f"{self.variable('source')} to a name of up to 128 letters, digits and ._:@/+=-"
                )
                raise ConfigurationError(msg)
            return self.model_copy(update={"source": service_name})
        if self.transport == "kafka":
            msg = (
                "on Kafka a service has a name, or its groups and dead letters would be those of every other without "
                f"one: set {self.variable('source')}=orders, or ObservabilitySettings(service_name=…)"
            )
            raise ConfigurationError(msg)
        return self

    @property
    def writes_database(self) -> bool:
        """Whether publishing writes to the Database: the `sql` log, or the outbox in front of Kafka."""
        return self.transport == "sql" or (self.transport == "kafka" and self.outbox is not False)

    def topic_of(self, event: EventDefinition) -> str:
        """The topic that the events of a class travel on."""
        return self.topics.get(event.type) or event.topic or event.type.rpartition(".")[0] or event.type

    def retry(self) -> Retry:
        """The policy of handlers that state none."""
        return Retry(self.retry_attempts, FullJitter(self.retry_initial_seconds, self.retry_max_seconds))
