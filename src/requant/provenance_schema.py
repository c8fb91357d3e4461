"""The JSON schema of provenance.json, for who checks one without requant: written from the classes of its parts.

`python -m requant.provenance_schema` writes the shipped file. The config in a provenance is held against the schema of
configs itself, so that whatever builds a release can be published with it.
"""

import json
from typing import Any

from pydantic.json_schema import GenerateJsonSchema, models_json_schema

from requant.config import Config
from requant.provenance import SCHEMA, SHA256, Statement
from requant.records import write_text

COMPUTES = False  # it writes what provenances are held against

# Keys of a config that are paths: a published one names no place of the machine that it was written on.
PATHS = {
    "Benchmark": ("include_path",),
    "Model": ("path", "directory"),
    "Mount": ("source",),
    "Served": ("data",),
    "TextSource": ("path",),
}
PUBLIC_PATH = {"pattern": "^[^/~]"}
# How many entries the sections have of a config that builds one release.
ENTRIES = {"models": (1, 2), "benchmarks": (1, 1), "targets": (1, 1), "releases": (1, 1)}


class _Untitled(GenerateJsonSchema):
    """Without a title for each key, which would repeat the key."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def schema() -> dict[str, Any]:
    """The schema of a `Statement`, its config that of `config.Config`."""
    _, found = models_json_schema(
        [(Statement, "serialization"), (Config, "validation")], by_alias=True, schema_generator=_Untitled
    )
    parts = found["$defs"]
    for part in parts.values():
        for name, key in part.get("properties", {}).items():
            if name == "sha256":
                key |= SHA256
    for section, keys in PATHS.items():
        for key in keys:
            written = parts[section]["properties"][key]
            next(kind for kind in written.get("anyOf", [written]) if kind["type"] == "string").update(PUBLIC_PATH)
    config = parts["Config"]
    config["required"] = ["models", "calibrations", "benchmarks", "targets", "releases", "build", "device"]
    for section, (least, most) in ENTRIES.items():
        config["properties"][section] |= {"minProperties": least, "maxProperties": most}
    config["properties"]["build"]["maxItems"] = 1
    parts["Request"]["properties"]["config"] = {"$ref": "#/$defs/Config"}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "urn:requant:provenance.schema.json:v1",
        "title": "provenance.json of a release made by requant",
        "description": "An in-toto Statement v1 about the files of a release, with an SLSA provenance v1 predicate.",
        **{key: value for key, value in parts.pop("Statement").items() if key not in ("title", "description")},
        "$defs": parts,
    }


if __name__ == "__main__":
    write_text(SCHEMA, json.dumps(schema(), indent=1) + "\n")
