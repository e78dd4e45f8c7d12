"""``manifest.schema.json``, by which editors check and complete manifests, and ``eval.schema.json`` of eval's results.

Made from the configs and the result class: ``python -m cli.schema`` in a checkout writes the files anew.
"""

from __future__ import annotations

import json
from typing import Any, Final

from .manifest import NAME_PATTERN, packaged_file
from .manifest_reader import REPEATED
from .stages import STAGES

FILE: Final = "manifest.schema.json"
EVAL_FILE: Final = "eval.schema.json"


def manifest_schema() -> dict[str, Any]:
    """The schema of a manifest, with every stage's keys, types, bounds, defaults and descriptions."""
    definitions: dict[str, Any] = {}
    stages: dict[str, Any] = {}
    for name, stage in STAGES.items():
        schema = stage.config_class.model_json_schema(ref_template="#/$defs/{model}")
        definitions.update(schema.pop("$defs", {}))
        schema.pop("required", None)  # what a manifest leaves out may come from --set, or from an arm
        schema["type"] = ["object", "null"]
        definitions[name] = {"description": stage.about, **schema}
        stages[name] = {"$ref": f"#/$defs/{name}"}
    labelled = {f"^{name} {NAME_PATTERN[1:]}": stages[name] for name in REPEATED}
    arm = {
        "expected": {"type": "string", "description": "What others published of this variant, for the table."},
        "core": {"type": "boolean", "default": False, "description": "Whether --arms core takes it."},
        **{name: stages[name] for name, stage in STAGES.items() if stage.of_run},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "clips manifest",
        "description": "One file is one run: clips run FILE does its stages in order.",
        "type": "object",
        "additionalProperties": False,
        "required": ["name"],
        "anyOf": [{"required": ["stages"]}, {"required": ["include"]}],
        "properties": {
            "name": {"type": "string", "pattern": NAME_PATTERN, "description": "Name of the run under runs/."},
            "work": {"type": "string", "default": ".", "description": "Work folder, from the current folder."},
            "include": {
                "type": "string",
                "description": "Manifest whose stages this one takes over, by the name of a packaged one or of a file "
                "beside it. Values given here win; further stages stand behind the one that they follow here.",
            },
            "without": {
                "type": "array",
                "items": {"type": "string"},
                "description": "Stages of the included manifest that are left out.",
            },
            "recipe": {
                "type": "object",
                "description": "What the manifest says of itself as a recipe, for `clips recipes`.",
            },
            "scales": {
                "type": "object",
                "description": "What --scale NAME changes in this manifest beyond the packaged values of that scale.",
                "additionalProperties": {"type": "object", "additionalProperties": False, "properties": stages},
            },
            "stages": {
                "type": "object",
                "description": "What is done, in this order. Stages with a folder of their own may be done several "
                f"times, each with a label of one word, such as `recaption short`: {', '.join(REPEATED)}.",
                "additionalProperties": False,
                "minProperties": 1,
                "properties": stages,
                "patternProperties": labelled,
            },
            "arms": {
                "description": "Variants to compare: what each changes in a run's stages. Each is run with every seed.",
                "type": "object",
                "minProperties": 1,
                "propertyNames": {"pattern": NAME_PATTERN},
                "additionalProperties": {"type": ["object", "null"], "additionalProperties": False, "properties": arm},
            },
            "seeds": {
                "description": "Training seeds of every arm.",
                "type": "array",
                "items": {"type": "integer", "minimum": 0},
                "minItems": 1,
                "uniqueItems": True,
                "default": [0],
            },
            "results": {
                "description": "File of the arms' figures, from the manifest's folder; the table is beside it as .md. "
                "Without it: results/NAME.json in the work folder.",
                "type": "string",
                "pattern": r"\.json$",
            },
        },
        "$defs": definitions,
    }


def eval_schema() -> dict[str, Any]:
    """The schema of what ``clips eval`` writes for each benchmark."""
    from clips_train.evals.result import Result

    about = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "clips evaluation result"}
    return {**Result.model_json_schema(), **about}


def schema_text(schema: dict[str, Any]) -> str:
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    packaged_file(FILE).write_text(schema_text(manifest_schema()))
    packaged_file(EVAL_FILE).write_text(schema_text(eval_schema()))
