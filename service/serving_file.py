"""serving.json, next to the versions of a model: settings of this model, which override the server's flags.

python -m service.serving_file [folder]: writes its JSON Schema, serving.schema.json, into docs/schemas.
"""

import reprlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from service.config import Settings
from training.fields import AS_INTEGER, sentence

PER_MODEL = (
    "graph", "specialised", "instances", "threads", "max_batch", "max_delay_ms", "max_queue", "max_images",
    "default_profile", "default_budget", "min_budget", "target_latency_ms", "shadow_fraction",
)  # fmt: skip
"""The settings that can be set for each model."""


def _field(name: str) -> Any:
    """The JSON type of a setting, with its limits."""
    field = Settings.model_fields[name]
    return (Annotated[field.annotation, AS_INTEGER] if field.annotation is int else field.annotation), field


ServingFile: type[BaseModel] = create_model(
    "ServingFile",
    __config__=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False),
    __doc__="Settings of one model, in place of the server's flags. Omitted settings are those of the flags.",
    **{name: _field(name) for name in PER_MODEL},
)


def read(value: Any) -> Mapping[str, Any]:
    """The settings in the JSON value of a file, by name. Raises ValueError with a message of one sentence."""
    if not isinstance(value, dict):
        raise ValueError(f"the content is {reprlib.repr(value):.100}; allowed: a JSON object")
    try:
        return ServingFile.model_validate(value).model_dump(exclude_unset=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["type"] == "extra_forbidden":
            raise ValueError(
                f"{first['loc'][0]!r} is not a setting of a model; allowed: {', '.join(PER_MODEL)}"
            ) from error
        raise ValueError(sentence(error)) from error


if __name__ == "__main__":
    from export import schemas  # the server needs none

    schemas.write("serving", ServingFile, Path(sys.argv[1]) if sys.argv[1:] else schemas.FOLDER)
