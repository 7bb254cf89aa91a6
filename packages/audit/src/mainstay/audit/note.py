"""Signed notes and the keys that sign them, in the form that transparency logs share (C2SP signed-note, Ed25519).

A note is a text, an empty line, and a line for each signature: `— name base64(key id ‖ signature)`. The key id is the
beginning of SHA-256(name ‖ newline ‖ 0x01 ‖ public key), so a reader knows which key to try. Keys are single lines too:
`PRIVATE+KEY+name+id+base64(0x01 ‖ seed)` signs and `name+id+base64(0x01 ‖ public key)` verifies. Any tool that knows
the format can check ours.
"""

from __future__ import annotations

import os
import re
from base64 import b64decode, b64encode
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256

from mainstay.audit import _ed25519
from mainstay.audit.errors import InvalidNote

__all__ = ["Checkpoint", "SigningKey", "VerifierKey"]

_ED25519 = b"\x01"
_KEY_BYTES = 33
_ID_BYTES = 4
_PRIVATE = "PRIVATE+KEY+"
_DASH = "— "
_SURROGATE = re.compile("[\ud800-\udfff]")  # half of a pair, which no encoding can store


class VerifierKey:
    """The public half: checks signatures. Its text may be published.

    Attributes:
        name: of the key, which a checkpoint repeats as its origin.
        text: the one line that `parse` reads.
    """

    def __init__(self, name: str, public: bytes) -> None:
        self.name = name
        self._public = public
        self.id = sha256(_named(name).encode() + b"\n" + _ED25519 + public).digest()[:_ID_BYTES]
        self.text = f"{name}+{self.id.hex()}+{b64encode(_ED25519 + public).decode()}"

    @classmethod
    def parse(cls, text: str) -> VerifierKey:
        """Read the line.

        Raises:
            InvalidNote: it is no verifier key.
        """
        if text.startswith(_PRIVATE):
            msg = "this is a private key, which must not be handed to verifiers: use its public half"
            raise InvalidNote(msg)
        name, key_id, public = _parts(text.strip(), "a verifier key is `name+id+base64`")
        key = cls(name, public)
        if key.id != key_id:
            msg = f"the id in the verifier key of {name} does not belong to its key"
            raise InvalidNote(msg)
        return key

    def signed(self, text: str, signature: bytes) -> bool:
        """Whether this key signed the text."""
        return _ed25519.signed(self._public, signature, text.encode())

    def __repr__(self) -> str:
        return f"<VerifierKey {self.text}>"


class SigningKey:
    """The private half.

    Whoever has it can sign a different history: keep it away from whoever can write the database.
    """

    def __init__(self, name: str, seed: bytes) -> None:
        self._seed = seed
        self._signer = _ed25519.Signer(seed)
        self.verifier = VerifierKey(name, self._signer.public)

    @classmethod
    def generate(cls, name: str) -> SigningKey:
        """Make a new key.

        Raises:
            InvalidNote: the name is empty or holds a space or a plus.
        """
        return cls(_named(name), os.urandom(_KEY_BYTES - 1))

    @classmethod
    def parse(cls, text: str) -> SigningKey:
        """Read the line that `private_text` is.

        Raises:
            InvalidNote: it is no private key; the message never repeats it.
        """
        text = text.strip()
        if not text.startswith(_PRIVATE):
            msg = "a signing key begins with PRIVATE+KEY+; `mainstay audit key NAME` makes one"
            raise InvalidNote(msg)
        name, key_id, seed = _parts(text.removeprefix(_PRIVATE), "a signing key is `PRIVATE+KEY+name+id+base64`")
        key = cls(name, seed)
        if key.verifier.id != key_id:
            msg = f"the id in the signing key of {name} does not belong to its key"
            raise InvalidNote(msg)
        return key

    def private_text(self) -> str:
        """The one line to keep secret."""
        key = self.verifier
        return f"{_PRIVATE}{key.name}+{key.id.hex()}+{b64encode(_ED25519 + self._seed).decode()}"

    def sign(self, text: str) -> str:
        """The signed note of a text that ends with a newline."""
        signature = b64encode(self.verifier.id + self._signer.sign(text.encode())).decode()
        return f"{text}\n{_DASH}{self.verifier.name} {signature}\n"

    def __repr__(self) -> str:
        return f"<SigningKey {self.verifier.name}>"


def open_note(note: str, keys: Iterable[VerifierKey]) -> tuple[str, VerifierKey]:
    """The text of a note, and which of `keys` signed it.

    Raises:
        InvalidNote: it is malformed, or none of the keys signed it. A signature that names one of the keys and is not
            of it makes the note invalid whatever else it carries.
    """
    head, separator, tail = note.rpartition("\n\n")
    if not separator or not tail.endswith("\n") or _SURROGATE.search(note):
        msg = "this is no signed note: a text, an empty line, and signatures"
        raise InvalidNote(msg)
    text = head + "\n"
    known = {(key.name, key.id): key for key in keys}
    by: VerifierKey | None = None
    for line in tail[:-1].split("\n"):
        name, _, encoded = line.removeprefix(_DASH).partition(" ")
        try:
            signature = b64decode(encoded, validate=True)
        except ValueError:
            signature = b""
        if not line.startswith(_DASH) or len(signature) <= _ID_BYTES:
            msg = "a signature line of the note is malformed"
            raise InvalidNote(msg)
        key = known.get((name, signature[:_ID_BYTES]))
        if key is None:
            continue  # a witness whom we do not know
        if not key.signed(text, signature[_ID_BYTES:]):
            msg = f"the note carries a signature of {name} that {name} did not make"
            raise InvalidNote(msg)
        by = key
    if by is None:
        msg = "the note is signed by none of the known keys"
        raise InvalidNote(msg)
    return text, by


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a sealer signs: this log, with so many entries, has this root.

    Attributes:
        origin: the name of the log, which is the name of its key.
        size: the number of entries.
        root: the tree's hash.
        time: when it was signed, ISO 8601.
    """

    origin: str
    size: int
    root: bytes
    time: str

    def to_text(self) -> str:
        """The text of the note."""
        return f"{self.origin}\n{self.size}\n{b64encode(self.root).decode()}\ntime {self.time}\n"

    @classmethod
    def open(cls, note: str, keys: Iterable[VerifierKey]) -> Checkpoint:
        """Read a signed checkpoint.

        Raises:
            InvalidNote: it is malformed, signed by none of the keys, or by the key of another log.
        """
        text, key = open_note(note, keys)
        lines = text.split("\n")
        try:
            origin, size, root, time, end = lines
            found = cls(origin, int(size), b64decode(root, validate=True), time.removeprefix("time "))
            if end or found.to_text() != text or len(found.root) != sha256().digest_size:
                raise ValueError
        except ValueError as error:
            msg = "the signed text is no checkpoint"
            raise InvalidNote(msg) from error
        if found.origin != key.name:
            msg = f"the checkpoint of {found.origin} is signed by {key.name}, which signs for another log"
            raise InvalidNote(msg)
        return found


def _named(name: str) -> str:
    if not name or "+" in name or not name.isprintable() or any(character.isspace() for character in name):
        msg = f"{name!r} is no name for a key: no spaces, no plus, not empty"
        raise InvalidNote(msg)
    return name


def _parts(text: str, form: str) -> tuple[str, bytes, bytes]:
    try:
        name, key_id, encoded = text.split("+", 2)
        key = b64decode(encoded, validate=True)
        if len(key) != _KEY_BYTES or key[:1] != _ED25519:
            raise ValueError
        return name, bytes.fromhex(key_id), key[1:]
    except ValueError:
        # Without `from`: the message of a cause could repeat a part of a private key.
        raise InvalidNote(form) from None
