"""Any protobuf message of a descriptor, and near misses of a valid one: strategies for hypothesis."""

import math
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st

Draw = st.DrawFn
TEXT = st.one_of(
    st.sampled_from(
        ["", "\0", "../../etc/passwd", "fashion_mnist", "Shirt", "3", "9" * 5000, "é" * 3000, "x" * 20_000]
    ),
    st.text(max_size=30),
)
BYTES = st.one_of(st.sampled_from([b"", bytes(784), b"\xff\xd8\xff", bytes(100_000)]), st.binary(max_size=60))
FLOATS = st.one_of(st.floats(width=32), st.sampled_from([0.0, -0.0, math.nan, math.inf, 1e6, 1e38]))


def whole(bits: int, signed: bool) -> st.SearchStrategy[int]:
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    return st.one_of(st.sampled_from([low, 0, 1, 2, 28, 257, high]), st.integers(low, high))


F = FieldDescriptor
SCALARS: dict[int, st.SearchStrategy[Any]] = {
    F.TYPE_STRING: TEXT, F.TYPE_BYTES: BYTES, F.TYPE_BOOL: st.booleans(), F.TYPE_FLOAT: FLOATS, F.TYPE_DOUBLE: FLOATS,
    F.TYPE_INT32: whole(32, True), F.TYPE_INT64: whole(64, True),
    F.TYPE_UINT32: whole(32, False), F.TYPE_UINT64: whole(64, False),
}  # fmt: skip


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def _fill(draw: Draw, message: Message, field: FieldDescriptor, depth: int) -> None:
    """Give a field a value of its type, or several."""
    name = field.name
    if _is_map(field):
        key, value = field.message_type.fields
        values = getattr(message, name)
        for _ in range(draw(st.integers(0, 2))):
            drawn = draw(st.one_of(st.sampled_from(["profile", "strength", "triton_x"]), SCALARS[key.type]))
            if value.message_type:
                values[drawn].CopyFrom(draw(messages(value.message_type, depth - 1)))
            else:
                values[drawn] = draw(SCALARS[value.type])
    elif field.message_type:
        for _ in range(draw(st.integers(0, 3)) if field.is_repeated else 1):
            place = getattr(message, name).add() if field.is_repeated else getattr(message, name)
            place.CopyFrom(draw(messages(field.message_type, depth - 1)))
    elif field.is_repeated:
        few = draw(st.lists(SCALARS[field.type], max_size=5))
        getattr(message, name).extend(few * draw(st.sampled_from([1, 1, 1, 200])))
    else:
        setattr(message, name, draw(SCALARS[field.type]))


@st.composite
def messages(draw: Draw, kind: Descriptor, depth: int = 4) -> Message:
    """Any field of any size, down to `depth` messages within each other."""
    message: Message = GetMessageClass(kind)()
    if kind.fields and depth:
        for field in draw(st.lists(st.sampled_from(list(kind.fields)), unique_by=lambda field: field.number)):
            _fill(draw, message, field, depth)
    return message


@st.composite
def mutated(draw: Draw, valid: Message) -> Message:
    """A valid message in which one to three fields, anywhere, were emptied, doubled or replaced."""
    message: Message = type(valid)()
    message.CopyFrom(valid)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(_places(message)))
        field = draw(st.sampled_from(list(place.DESCRIPTOR.fields)))
        match draw(st.sampled_from(["clear", "double", "replace"])):
            case "clear":
                place.ClearField(field.name)
            case "double" if field.is_repeated and not _is_map(field):
                getattr(place, field.name).MergeFrom(list(getattr(place, field.name)))
            case _:
                place.ClearField(field.name)
                _fill(draw, place, field, 2)
    return message


def _places(message: Message) -> list[Message]:
    """The message and all messages in it."""
    found = [message]
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        if _is_map(field):
            inner = list(value.values()) if field.message_type.fields_by_name["value"].message_type else []
        else:
            inner = list(value) if field.is_repeated else [value]
        found += [place for part in inner for place in _places(part)]
    return found
