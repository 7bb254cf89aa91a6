"""Real Kafka, PostgreSQL, Redis and Prometheus on 127.0.0.1, for tests, benchmarks and demos of this repository."""

from mainstay_servers.failover import Forwarder, Pair, Standby
from mainstay_servers.install import MissingServer
from mainstay_servers.kafka import Kafka
from mainstay_servers.postgres import Databases, PgBouncer, Postgres, fresh_database
from mainstay_servers.process import Server, ServerError
from mainstay_servers.prometheus import Prometheus
from mainstay_servers.redis import Redis, flush
from mainstay_servers.secure import SecureKafka

__all__ = [
    "Databases",
    "Forwarder",
    "Kafka",
    "MissingServer",
    "Pair",
    "PgBouncer",
    "Postgres",
    "Prometheus",
    "Redis",
    "SecureKafka",
    "Server",
    "ServerError",
    "Standby",
    "flush",
    "fresh_database",
]
