"""Protocol Buffers, by the descriptors that the registry keeps: no generated code is needed to read them."""

from __future__ import annotations

from base64 import b64decode
from importlib import import_module
from typing import TYPE_CHECKING, Any

from google.protobuf import descriptor_pool, json_format
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.message_factory import GetMessageClass

from mainstay.events.errors import DecodeError
from mainstay.events.foreign import Data

if TYPE_CHECKING:
    from mainstay.events._registry import Answer

_WELL_KNOWN = "google/protobuf/"
_LONGEST_PATH = 32


def _built_in() -> dict[str, FileDescriptorProto]:
    """Files that a registry of Confluent's has by itself: schemas import them, and do not refer to them.

    What the first one holds are options of fields, which say nothing of a value.
    """
    meta = FileDescriptorProto(name="confluent/meta.proto", package="confluent", syntax="proto3")
    decimal = FileDescriptorProto(name="confluent/type/decimal.proto", package="confluent.type", syntax="proto3")
    message = decimal.message_type.add(name="Decimal")
    kinds = ("TYPE_BYTES", "TYPE_UINT32", "TYPE_INT32")
    for number, (name, kind) in enumerate(zip(("value", "precision", "scale"), kinds, strict=True), 1):
        message.field.add(name=name, number=number, type=kind, label="LABEL_OPTIONAL")
    return {each.name: each for each in (meta, decimal)}


_BUILT_IN = _built_in()


class ProtobufSchema:
    """See `Schema`: a file of messages; before each value stands which one it is.

    Args:
        file: the file's descriptor.
    """

    def __init__(self, file: Any) -> None:
        self._file = file
        self._classes: dict[tuple[int, ...], Any] = {}  # by the place of their message in the file

    def read(self, payload: bytes) -> Data:
        """See `Schema`."""
        path, begin = _path(payload)
        message_class = self._classes.get(path)
        if message_class is None:
            message_class = self._classes[path] = GetMessageClass(self._message(path))
        name: str = message_class.DESCRIPTOR.full_name
        try:
            message = message_class.FromString(payload[begin:])
            # Fields that are not written have their defaults, which no reader could tell from absent ones.
            json = json_format.MessageToJson(
                message, always_print_fields_with_no_presence=True, preserving_proto_field_name=True, indent=None
            )
        except Exception as error:
            msg = f"the value is no {name} as its schema says: {type(error).__name__}"
            raise DecodeError(msg) from error
        return Data(name, json)

    def _message(self, path: tuple[int, ...]) -> Any:
        messages: list[Any] = list(self._file.message_types_by_name.values())
        try:
            found = messages[path[0]]
            for index in path[1:]:
                found = found.nested_types[index]
        except IndexError:
            msg = f"the value is message {list(path)} of its schema, which has none there"
            raise DecodeError(msg) from None
        return found


def _path(payload: bytes) -> tuple[tuple[int, ...], int]:
    """Which message a value is, by its place in the file, and where the value itself begins."""
    try:
        count, at = _number(payload, 0)
        if not 0 <= count <= _LONGEST_PATH:
            raise IndexError
        path: list[int] = []
        for _ in range(count):
            index, at = _number(payload, at)
            if index < 0:
                raise IndexError
            path.append(index)
    except IndexError:
        msg = "the value does not say which message of its schema it is"
        raise DecodeError(msg) from None
    return tuple(path) or (0,), at  # the first one is written as no place at all


def _number(payload: bytes, at: int) -> tuple[int, int]:
    """A number of variable length, in zigzag."""
    value = shift = 0
    while True:
        byte = payload[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:  # noqa: PLR2004  the last one
            return (value >> 1) ^ -(value & 1), at
        shift += 7
        if shift > 31:  # noqa: PLR2004  of 32 bits
            raise IndexError


def schema_of(answer: Answer) -> ProtobufSchema:
    """The schema, with the files that it imports.

    Raises:
        Exception: they are no descriptors, or one is missing.
    """
    pool = descriptor_pool.DescriptorPool()
    return ProtobufSchema(pool.FindFileByName(_add(pool, "", answer, set())))


def _add(pool: Any, name: str, answer: Answer, done: set[str]) -> str:
    file = FileDescriptorProto.FromString(b64decode(answer.text))
    file.name = name or file.name or "schema.proto"
    done.add(file.name)
    for imported in file.dependency:
        if imported in done:
            continue
        if imported in answer.references:
            _add(pool, imported, answer.references[imported], done)
        elif imported.startswith(_WELL_KNOWN):
            done.add(imported)
            module = import_module(imported.removesuffix(".proto").replace("/", ".") + "_pb2")
            _add_known(pool, module.DESCRIPTOR, done)
        elif imported in _BUILT_IN:
            done.add(imported)
            pool.Add(_BUILT_IN[imported])
        else:
            msg = f"it imports {imported}, which it does not refer to"
            raise ValueError(msg)
    pool.Add(file)
    return str(file.name)


def _add_known(pool: Any, descriptor: Any, done: set[str]) -> None:
    for each in descriptor.dependencies:
        if each.name not in done:
            done.add(each.name)
            _add_known(pool, each, done)
    file = FileDescriptorProto()
    descriptor.CopyToProto(file)
    pool.Add(file)
