"""What can go wrong with events.

EventsError             SYS_EVENTS          base
├── TransportError      EXT_EVENTS_TRANSPORT the cluster cannot be asked, or does not answer
├── PublishError        EXT_EVENTS_PUBLISH  the transport did not confirm an event: it may or may not have arrived
├── DecodeError         VAL_EVENTS_DECODE   bytes that are no event of ours: dead-lettered without another attempt
├── SchemaError         EXT_EVENTS_SCHEMA   a schema is not known yet: the record waits for the registry
├── RedriveError        RES_EVENTS_REDRIVE  a dead letter that is not there (any more)
├── ForgetError         RES_EVENTS_FORGET   a kind of event that a process handles, or none ever did
├── NotScheduledError   RES_EVENTS_NOT_SCHEDULED  an event that does not wait for its time (any more)
├── PauseError          RES_EVENTS_PAUSE    what is paused already, is not paused, or is not there to be paused
└── RefusedError        RES_EVENTS_REFUSED  a refused event that is not there (any more)

Mistakes in declarations are `TypeError` and `ValueError` where they are written, `ConfigurationError` where an App is
put together.
"""

from __future__ import annotations

from mainstay.core import MainstayError

__all__ = [
    "DecodeError",
    "ForgetError",
    "PauseError",
    "PublishError",
    "RedriveError",
    "RefusedError",
    "SchemaError",
    "TransportError",
]


class EventsError(MainstayError):
    """Base of the errors of events."""

    code = "SYS_EVENTS"
    status = 500
    title = "Events failed"


class TransportError(EventsError):
    """The cluster cannot be asked or does not answer; the message names it and says why."""

    code = "EXT_EVENTS_TRANSPORT"
    status = 503
    title = "Events unavailable"
    retryable = True
    no_effect = True
    public_message = "The events cannot be reached."


class PublishError(EventsError):
    """The event was not confirmed within the send deadline. `no_effect` is True where it certainly was not sent."""

    code = "EXT_EVENTS_PUBLISH"
    status = 502
    title = "Event not confirmed"
    retryable = True
    public_message = "The event could not be published."


class DecodeError(EventsError):
    """The record is not an event that this handler can read; another attempt would read the same bytes."""

    code = "VAL_EVENTS_DECODE"
    status = 422
    title = "Unreadable event"
    retryable = False
    no_effect = True
    public_message = "The event could not be read."


class SchemaError(EventsError):
    """The schema that a record was written by is not known yet, or its registry is away. The record waits for it."""

    code = "EXT_EVENTS_SCHEMA"
    status = 503
    title = "Schema not available"
    retryable = True
    no_effect = True
    public_message = "The event cannot be read at the moment."


class RedriveError(EventsError):
    """No dead letter has this id: it was redriven already, deleted, or never was."""

    code = "RES_EVENTS_REDRIVE"
    status = 404
    title = "No such dead letter"
    retryable = False
    no_effect = True
    public_message = "There is no such dead letter."


class RefusedError(EventsError):
    """No refused event has this id: it was sent again or discarded already, or never was."""

    code = "RES_EVENTS_REFUSED"
    status = 404
    title = "No such refused event"
    retryable = False
    no_effect = True
    public_message = "There is no such refused event."


class NotParkedError(EventsError):
    """No parked key has this id: it is free already, or never was parked."""

    code = "RES_EVENTS_NOT_PARKED"
    status = 404
    title = "No such parked key"
    retryable = False
    no_effect = True
    public_message = "There is no such parked key."


class NotScheduledError(EventsError):
    """No event with this id waits for its time: it was handed on or cancelled already, or never was scheduled."""

    code = "RES_EVENTS_NOT_SCHEDULED"
    status = 404
    title = "No such scheduled event"
    retryable = False
    no_effect = True
    public_message = "There is no such scheduled event."


class ForgetError(EventsError):
    """A kind of event cannot be forgotten: a process that serves has a handler for it, or none ever had."""

    code = "RES_EVENTS_FORGET"
    status = 409
    title = "Event cannot be forgotten"
    retryable = False
    no_effect = True
    public_message = "This kind of event cannot be forgotten."


class PauseError(EventsError):
    """This is paused already, is not paused, or no process has such a group or handler."""

    code = "RES_EVENTS_PAUSE"
    status = 409
    title = "Cannot be paused or resumed"
    retryable = False
    no_effect = True
    public_message = "There is nothing to be paused or resumed by this name."


class PausedError(EventsError):
    """A person has paused the event's kind or key: it waits until that is resumed."""

    code = "SYS_EVENTS_PAUSED"
    status = 503
    title = "Event paused"


class KeyIsParkedError(EventsError):
    """An event's key is parked: the event waits behind those in its queue."""

    code = "SYS_EVENTS_PARKED"
    status = 503
    title = "Key parked"


class SkippedError(EventsError):
    """A person has skipped the event, which had kept failing."""

    code = "SYS_EVENTS_SKIPPED"
    status = 500
    title = "Event skipped"


class ProcessEndedError(EventsError):
    """The processes that handled the event ended during its call, as often as is allowed: it is not called again.

    Args:
        times: how often.
    """

    code = "SYS_EVENTS_PROCESS_ENDED"
    status = 500
    title = "Process ended while handling"
    retryable = False
    public_message = "The event could not be handled."

    def __init__(self, times: int) -> None:
        super().__init__(
            f"its process ended {times} times while it was handled: no exception can say why. Look at what these "
            "processes ended with (exit status, out of memory, a watchdog), and then have it tried again"
        )


class NotHeldError(EventsError):
    """The partition belongs to another process by now: this one has stood still for longer than its lease."""

    code = "SYS_EVENTS_NOT_HELD"
    status = 503
    title = "Partition held elsewhere"


class NotHandledHereError(EventsError):
    """This process has no handler for the event, and another process of the group has one."""

    code = "SYS_EVENTS_ELSEWHERE"
    status = 503
    title = "Event handled elsewhere"
