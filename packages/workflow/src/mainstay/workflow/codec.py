"""What stands between the values of runs and the tables: encryption, compression, or both."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

__all__ = ["PayloadCodec"]


class PayloadCodec(ABC):
    """Encrypts or compresses inputs, arguments, results, signals and published values before they are stored.

    Given to `WorkflowModule.for_feature(flows, codec)`, at most one in an App. Payloads that were stored without one
    are read as they are, so it can be added to a service that has runs. What an error says, notes, ids, names and the
    context of a run are stored in plain text.

    Attributes:
        name: stands before each payload, for ever; letters, digits and `-`. Keys and their rotation are the codec's own
            matter: it says within the payload which key it used, and keeps old ones for reading.
    """

    name: ClassVar[str]

    @abstractmethod
    def encode(self, payload: bytes, run_id: str) -> bytes:
        """What is stored for a payload. It is called on the event loop, so it takes microseconds.

        Where it raises anything, the run is parked, and callers of the engine get `PayloadNotStored`.

        Args:
            payload: JSON, in UTF-8.
            run_id: whose it is. A codec that authenticates binds the payload to it, so that one cannot be moved to
                another run.
        """

    @abstractmethod
    def decode(self, stored: bytes, run_id: str) -> bytes:
        """The payload again.

        Raises:
            Exception: any, where it cannot be read. The run is parked with a note that says so, without its text.
        """
