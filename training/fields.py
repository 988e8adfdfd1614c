"""Types for fields of JSON files, and the error message for an invalid one.

Pydantic and the standard library only: the server imports this module.
"""

import functools
import re
import reprlib
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, Field, GetPydanticSchema, TypeAdapter, ValidationError, WrapValidator

T = TypeVar("T")
MOST = 2**53
"""Largest count: every whole number up to it is exactly a float."""
AS_INTEGER = BeforeValidator(lambda value: int(value) if isinstance(value, float) and value.is_integer() else value)
"""JSON has only one type of number, so 1.0 is an integer."""
Count = Annotated[int, Field(strict=True, ge=1, lt=MOST), AS_INTEGER]
Natural = Annotated[int, Field(strict=True, ge=0, lt=MOST), AS_INTEGER]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
ALLOWED = {
    "dataclass_type": "a JSON object",
    "dict_type": "a JSON object",
    "greater_than_equal": "{ge} or more",
    "string_pattern_mismatch": "{pattern}",
    "too_short": "{min_length} or more entries",
    "tuple_type": "a JSON array",
    "unexpected_keyword_argument": "no such field",
}
"""What is allowed, by pydantic's error type, where pydantic's own message speaks of Python types."""
adapter: Callable[[Any], TypeAdapter[Any]] = functools.cache(TypeAdapter)
"""Adapters are made on first use: programs that read no file, such as clients, need none."""


def read_as(kind: Any) -> GetPydanticSchema:
    """For Annotated: the field is read as this type, which converts to the annotated one."""
    return GetPydanticSchema(lambda _, handler: handler.generate_schema(kind))


def checked_as(kind: Any) -> GetPydanticSchema:
    """For Annotated: the field is checked as this type, but its value is kept unchanged."""
    return read_as(Annotated[kind, WrapValidator(lambda value, check: (check(value), value)[1])])


def read(kind: type[T], value: Any, error: type[Exception], where: str = "") -> T:
    """A JSON value as an object of this type. Raises `error` with one sentence, prefixed by `where`."""
    try:
        content: T = adapter(kind).validate_python(value)
    except ValidationError as invalid:
        raise error(where + sentence(invalid)) from invalid
    return content


def sentence(error: ValidationError) -> str:
    """The first error as a sentence: the path to the field, its shortened value, and what is allowed."""
    first = error.errors(include_url=False)[0]
    path = _path(first["loc"])
    match first["type"]:
        case "missing":
            return f"{path} is missing"
        case "value_error":
            return f"{path}: {first['ctx']['error']}".removeprefix("the content: ")
        case kind if kind in ALLOWED:
            allowed = ALLOWED[kind].format(**first.get("ctx", {}))
        case _:
            allowed = re.sub(r"^\w+ should (be|have|match) ", "", first["msg"])
    return f"{path} is {reprlib.repr(first['input']):.100}; allowed: {allowed}"


def _path(location: tuple[int | str, ...]) -> str:
    if location[-1:] == ("[key]",):
        return f"a key of {_path(location[:-2])}"
    names = (f".{part}" if str(part).isidentifier() else f"[{part!r}]" for part in location)
    return "".join(names).removeprefix(".") or "the content"
