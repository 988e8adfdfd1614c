"""python -m export.schemas [folder]: writes manifest.schema.json and profiles.schema.json into docs/schemas.

JSON Schemas (2020-12) of a bundle's two JSON files, from the classes that read them. They do not contain the conditions
between fields.
"""

import json
import sys
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from export.bundle import Manifest
from training.steering import ProfileFile

FILES: dict[str, type[Any]] = {"manifest": Manifest, "profiles": ProfileFile}
FOLDER = Path(__file__).parents[1] / "docs" / "schemas"


def main(folder: Path) -> None:
    """Write both schemas into the folder, with the docstrings of fields as descriptions."""
    for name, kind in FILES.items():
        kind.__pydantic_config__ = ConfigDict(use_attribute_docstrings=True)  # not in the server: it reads the source
        write(name, kind, folder)


def write(name: str, kind: type[Any], folder: Path) -> None:
    """Write the schema of <name>.json into the folder."""
    schema = {"$schema": GenerateJsonSchema.schema_dialect, **TypeAdapter(kind).json_schema()}
    (folder / f"{name}.schema.json").write_text(json.dumps(schema, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else FOLDER)
