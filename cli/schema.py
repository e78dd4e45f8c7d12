"""``manifest.schema.json``: the JSON schema by which editors check and complete manifests.

Made from the stages' configs: ``python -m cli.schema`` in a checkout writes the file anew.
"""

from __future__ import annotations

import json
from typing import Any, Final

from .manifest import NAME_PATTERN, packaged_file
from .stages import STAGES

FILE: Final = "manifest.schema.json"


def manifest_schema() -> dict[str, Any]:
    """The schema of a manifest, with every stage's keys, types, bounds, defaults and descriptions."""
    definitions: dict[str, Any] = {}
    stages: dict[str, Any] = {}
    for name, stage in STAGES.items():
        schema = stage.config_class.model_json_schema(ref_template="#/$defs/{model}")
        definitions.update(schema.pop("$defs", {}))
        schema.pop("required", None)  # what a manifest leaves out may come from --set
        schema["type"] = ["object", "null"]
        stages[name] = {"description": stage.about, **schema}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "clips manifest",
        "description": "One file is one run: clips run FILE does its stages in order.",
        "type": "object",
        "additionalProperties": False,
        "required": ["name", "stages"],
        "properties": {
            "name": {"type": "string", "pattern": NAME_PATTERN, "description": "Name of the run under runs/."},
            "work": {"type": "string", "default": ".", "description": "Work folder, from the current folder."},
            "stages": {"type": "object", "additionalProperties": False, "minProperties": 1, "properties": stages},
        },
        "$defs": definitions,
    }


def schema_text() -> str:
    return json.dumps(manifest_schema(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    packaged_file(FILE).write_text(schema_text())
