"""Typed events over Kafka or the own database: at least once, ordered by key, effects exactly once where asked."""

from mainstay.events.dead_letters import DeadLetter, DeadLetters
from mainstay.events.errors import (
    DecodeError,
    EventsError,
    ForgetError,
    NotParkedError,
    NotScheduledError,
    PauseError,
    PublishError,
    RedriveError,
    RefusedError,
    SchemaError,
    TransportError,
)
from mainstay.events.event import Event, Version
from mainstay.events.log import (
    EventLog,
    GroupMember,
    GroupState,
    LoggedEvent,
    PartitionLag,
    PartitionState,
    StuckEvent,
    TopicState,
)
from mainstay.events.metadata import Metadata
from mainstay.events.module import EventConsumers, EventsModule
from mainstay.events.parked import ParkedKey, ParkedKeys
from mainstay.events.pauses import Pause, Pauses
from mainstay.events.publisher import EventPublisher
from mainstay.events.refused import RefusedEvent, RefusedEvents
from mainstay.events.router import EventRouter
from mainstay.events.scheduled import ScheduledEvent, ScheduledEvents
from mainstay.events.settings import EventsSettings, KafkaToken
from mainstay.events.strategies import RetryLater

__all__ = [
    "DeadLetter",
    "DeadLetters",
    "DecodeError",
    "Event",
    "EventConsumers",
    "EventLog",
    "EventPublisher",
    "EventRouter",
    "EventsError",
    "EventsModule",
    "EventsSettings",
    "ForgetError",
    "GroupMember",
    "GroupState",
    "KafkaToken",
    "LoggedEvent",
    "Metadata",
    "NotParkedError",
    "NotScheduledError",
    "ParkedKey",
    "ParkedKeys",
    "PartitionLag",
    "PartitionState",
    "Pause",
    "PauseError",
    "Pauses",
    "PublishError",
    "RedriveError",
    "RefusedError",
    "RefusedEvent",
    "RefusedEvents",
    "RetryLater",
    "ScheduledEvent",
    "ScheduledEvents",
    "SchemaError",
    "StuckEvent",
    "TopicState",
    "TransportError",
    "Version",
]
