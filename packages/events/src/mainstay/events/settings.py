"""How events are configured; read from `MAINSTAY_EVENTS_…`."""

from __future__ import annotations

import re
from typing import Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from mainstay.core import FullJitter, Retry, Settings
from mainstay.events.event import TOPIC_RULE, EventDefinition, is_topic

__all__ = ["EventsSettings"]

_SERVER = re.compile(r"(?P<host>\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+):(?P<port>[0-9]{1,5})")
_LAST_PORT = 65_535


class EventsSettings(Settings):
    """Settings of `EventsModule`. One that the chosen transport cannot honour is an error, never ignored.

    Attributes:
        transport: where events travel. `sql` is a durable log in the service's own database, `kafka` is Apache Kafka,
            `memory` is for tests and loses everything when the process ends.
        source: the name of this service, written into each event it publishes.
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
        lease_seconds: how long a killed process keeps its lanes and partitions from others; brokers want 6 or more.
        inbox_days: how long the inbox remembers an event: the window within which a duplicate is recognised.
        log_days: `sql` only: how long events stay in the log, handled or not.
        kafka_servers: addresses to find the cluster by, `host:port,host:port`.
        kafka_create_topics: create the topics that do not exist. Default: True.
        kafka_replicas: how many brokers keep each topic that is created; by default what the cluster says.
        kafka_protocol, kafka_mechanism, kafka_username, kafka_password, kafka_ca_file: how to connect securely.
    """

    model_config = SettingsConfigDict(env_prefix="MAINSTAY_EVENTS_")

    transport: Literal["sql", "kafka", "memory"] = "sql"
    source: str = Field(default="mainstay", min_length=1, max_length=128, pattern=r"^[A-Za-z0-9._:@/+=-]+$")
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
    lease_seconds: float = Field(default=10.0, ge=1, le=3600)
    inbox_days: float = Field(default=7.0, gt=0, allow_inf_nan=False)
    log_days: float = Field(default=7.0, gt=0, allow_inf_nan=False)
    kafka_servers: str | None = None
    kafka_create_topics: bool = True
    kafka_replicas: int | None = Field(default=None, ge=1)
    kafka_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    kafka_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = "PLAIN"
    kafka_username: str | None = None
    kafka_password: SecretStr | None = None
    kafka_ca_file: str | None = None

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

    @model_validator(mode="after")
    def _honoured(self) -> Self:
        for field in sorted(self.model_fields_set):
            if getattr(self, field) is None:
                continue
            if self.transport != "kafka" and (
                field.startswith("kafka_") or field in {"outbox", "outbox_bytes", "send_seconds"}
            ):
                why = (
                    "its log is its own outbox"
                    if field == "outbox" and self.transport == "sql"
                    else "it has no use for it"
                )
                msg = (
                    f"transport {self.transport!r} cannot honour {field}: {why}; leave it out, or use transport 'kafka'"
                )
                raise ValueError(msg)
            if self.transport != "sql" and field == "log_days":
                msg = (
                    f"transport {self.transport!r} cannot honour log_days: only the sql log is deleted by this service"
                )
                raise ValueError(msg)
            if self.transport == "memory" and field in {"lease_seconds", "crash_attempts"}:
                msg = f"transport 'memory' cannot honour {field}: no other process takes part"
                raise ValueError(msg)
            if not self.kafka_create_topics and field in {"partitions", "kafka_replicas"}:
                msg = (
                    f"kafka_create_topics=False cannot honour {field}: whoever creates the topics decides; leave it out"
                )
                raise ValueError(msg)
            if field in self._unused_by_protocol():
                msg = f"kafka_protocol {self.kafka_protocol!r} cannot honour {field}: leave it out, or use 'SASL_SSL'"
                raise ValueError(msg)
        if self.transport == "kafka":
            if not self.kafka_servers:
                msg = "transport 'kafka' needs kafka_servers: set MAINSTAY_EVENTS_KAFKA_SERVERS=host:port"
                raise ValueError(msg)
            if self.kafka_protocol.startswith("SASL") and not (self.kafka_username and self.kafka_password):
                msg = f"kafka_protocol {self.kafka_protocol!r} needs kafka_username and kafka_password"
                raise ValueError(msg)
        return self

    def _unused_by_protocol(self) -> set[str]:
        unused: set[str] = set()
        if not self.kafka_protocol.startswith("SASL"):  # an account that is never shown to the broker
            unused |= {"kafka_mechanism", "kafka_username", "kafka_password"}
        if not self.kafka_protocol.endswith("SSL"):
            unused |= {"kafka_ca_file"}
        return unused

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
