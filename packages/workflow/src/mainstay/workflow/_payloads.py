"""Payloads as they are stored: JSON, or what a codec makes of it."""

from __future__ import annotations

import base64
import binascii

from mainstay.workflow.codec import PayloadCodec
from mainstay.workflow.errors import Parked, PayloadNotStored, PayloadUnreadable

_MARK = "~"  # no JSON begins with it


class Payloads:
    """Seals and opens payloads by the App's codec; without one they stay as they are."""

    def __init__(self, codec: PayloadCodec | None = None) -> None:
        self._codec = codec

    def seal(self, payload: str, run_id: str) -> str:
        """The text to store.

        Raises:
            PayloadNotStored: the codec cannot encode the payload.
        """
        if self._codec is None:
            return payload
        try:
            text = base64.b64encode(self._codec.encode(payload.encode(), run_id)).decode()
        except Exception as error:
            # Its message might hold some of the payload.
            msg = f"the codec {self._codec.name!r} cannot store a payload of run {run_id!r} ({type(error).__name__})"
            raise PayloadNotStored(msg) from error
        return f"{_MARK}{self._codec.name}:{text}"

    def open(self, stored: str, run_id: str) -> str:
        """The payload again.

        Raises:
            PayloadUnreadable: there is no such codec here, or it cannot read the text.
        """
        if not stored.startswith(_MARK):
            return stored
        name, _, text = stored[len(_MARK) :].partition(":")
        if self._codec is None or self._codec.name != name:
            msg = (
                f"a payload of run {run_id!r} was stored by the codec {name!r}, which this App does not have: add it "
                "with WorkflowModule.for_feature(…); for the command, name the App that has it with --app"
            )
            raise PayloadUnreadable(msg)
        try:
            return self._codec.decode(base64.b64decode(text, validate=True), run_id).decode()
        except (binascii.Error, UnicodeDecodeError) as error:
            msg = f"a payload of run {run_id!r} is not what the codec {name!r} stored ({type(error).__name__})"
            raise PayloadUnreadable(msg) from None
        except Exception as error:  # noqa: BLE001  the codec's own
            # Its message might hold some of the payload.
            msg = f"the codec {name!r} cannot read a payload of run {run_id!r} ({type(error).__name__})"
            raise PayloadUnreadable(msg) from None

    def seal_or_park(self, payload: str, run_id: str) -> str:
        """What `seal` gives, for a run that is being executed.

        Raises:
            Parked: the codec cannot encode the payload.
        """
        try:
            return self.seal(payload, run_id)
        except PayloadNotStored as error:
            msg = f"{error}. Mend that, then resume the run"
            raise Parked(msg) from error

    def open_or_park(self, stored: str, run_id: str) -> str:
        """What `open` gives, for a run that is being executed.

        Raises:
            Parked: it cannot be read.
        """
        try:
            return self.open(stored, run_id)
        except PayloadUnreadable as error:
            raise Parked(str(error)) from error

    def shown(self, stored: str, run_id: str) -> str:
        """The payload for people, or in words that it cannot be read here."""
        try:
            return self.open(stored, run_id)
        except PayloadUnreadable as error:
            return f"({error})"
