"""Receipts: one entry, and the proof that a signed log contains it, to be checked without the database."""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast
from uuid import UUID

import sqlalchemy as sa

from mainstay.audit import _tree, tables
from mainstay.audit.entry import Entry
from mainstay.audit.errors import InvalidEntry, InvalidNote, InvalidReceipt, NotSealed, TamperedLog
from mainstay.audit.merkle import (
    consistency_ranges,
    included,
    inclusion_ranges,
    leaf_hash,
)
from mainstay.audit.note import Checkpoint, VerifierKey
from mainstay.database import Database

__all__ = ["Receipt", "prove", "prove_consistency"]

_FORMAT = "mainstay-audit-receipt-1"
_FIND = (
    sa.select(tables.log.c.leaf)
    .where(tables.log.c.entry_id == sa.bindparam("entry_id"))
    .order_by(tables.log.c.leaf)
    .limit(1)
)


@dataclass(frozen=True, slots=True)
class Receipt:
    """What proves one entry.

    Attributes:
        data: the exact bytes of the entry.
        index: its place in the log.
        hashes: the inclusion proof, from the leaf upwards.
        checkpoint: the signed note of the log that contains it.
    """

    data: bytes
    index: int
    hashes: tuple[bytes, ...]
    checkpoint: str

    def to_text(self) -> str:
        """One JSON document, to be kept or handed on."""
        return json.dumps(
            {
                "format": _FORMAT,
                "entry": self.data.decode(),
                "index": self.index,
                "proof": [b64encode(value).decode() for value in self.hashes],
                "checkpoint": self.checkpoint,
            },
            indent=2,
            ensure_ascii=False,
        )

    @classmethod
    def from_text(cls, text: str) -> Receipt:
        """Read it; says nothing yet of whether it is true.

        Raises:
            InvalidReceipt: it is no receipt.
        """
        try:
            fields = cast("dict[str, Any]", json.loads(text))
            index, checkpoint = fields["index"], fields["checkpoint"]
            if fields["format"] != _FORMAT or type(index) is not int or not isinstance(checkpoint, str):
                raise ValueError
            return cls(
                data=fields["entry"].encode(),
                index=index,
                hashes=tuple(b64decode(value, validate=True) for value in fields["proof"]),
                checkpoint=checkpoint,
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            msg = "this is no receipt of an audit entry"
            raise InvalidReceipt(msg) from error

    def verify(self, keys: Iterable[VerifierKey]) -> Entry:
        """The entry, if one of `keys` signed a log that contains it. Needs no database.

        Raises:
            InvalidReceipt: it proves nothing; the message says why.
        """
        try:
            checkpoint = Checkpoint.open(self.checkpoint, keys)
            entry = Entry.from_bytes(self.data)
        except (InvalidNote, InvalidEntry) as error:
            raise InvalidReceipt(str(error)) from error
        if not included(leaf_hash(self.data), self.index, checkpoint.size, self.hashes, checkpoint.root):
            msg = "the proof does not lead from the entry to the signed root"
            raise InvalidReceipt(msg)
        return entry


async def prove(database: Database, entry_id: UUID) -> Receipt:
    """The receipt of a sealed entry, against the newest checkpoint.

    Raises:
        NotSealed: there is no such entry in the log.
        TamperedLog: a row that the proof needs is missing, or is not what it must be.
        InvalidNote: the newest checkpoint is none.
    """
    rows = await database.read(_FIND, {"entry_id": entry_id})
    latest = await _tree.latest_checkpoint(database)
    if not rows or latest is None:
        msg = f"no entry {entry_id} in the audit log: there is none, or it waits for the sealer"
        raise NotSealed(msg)
    _, note = latest
    index, size = rows[0].leaf, size_in(note)
    if type(index) is not int or not 0 <= index < size:
        msg = f"entry {index!r} is outside of the {size} that the newest checkpoint signs"
        raise TamperedLog(msg)
    (data,) = await _tree.leaves(database, index, index + 1)
    return Receipt(data, index, tuple(await _tree.proof(database, inclusion_ranges(index, size))), note)


async def prove_consistency(database: Database, old: int, new: int) -> list[bytes]:
    """The hashes that show that the log of `old` entries is a beginning of the log of `new`; for `merkle.consistent`.

    Raises:
        ValueError: `old` is greater than `new`.
        TamperedLog: a row that the proof needs is missing.
    """
    return await _tree.proof(database, consistency_ranges(old, new))


def size_in(note: str) -> int:
    """The size that a checkpoint states, without looking at its signature.

    Raises:
        InvalidNote: it states none.
    """
    try:
        return int(note.split("\n", 2)[1])
    except (ValueError, IndexError) as error:
        msg = "this is no checkpoint"
        raise InvalidNote(msg) from error
