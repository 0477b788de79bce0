"""The published schema is the one of this version, and stays what JSON Schema allows."""

from __future__ import annotations

import json
from pathlib import Path

from fabric.programs import json_schema

PUBLISHED = Path(__file__).parents[3] / "docs/program.schema.json"


def test_the_published_schema_is_current() -> None:
    made = json.dumps(json_schema(), indent=1, sort_keys=True) + "\n"
    assert PUBLISHED.read_text() == made, (
        "write it again: python -c 'import json; from fabric.programs import json_schema;"
        " print(json.dumps(json_schema(), indent=1, sort_keys=True))' > docs/program.schema.json"
    )


def test_every_operation_is_in_it() -> None:
    schema = json_schema()
    definitions = schema["$defs"]
    assert isinstance(definitions, dict)
    operations = {
        op
        for definition in definitions.values()
        for field in [definition.get("properties", {}).get("op", {})]
        for op in [field.get("const"), *field.get("enum", [])]
        if op
    }
    assert {"read", "write", "grad", "save", "model.unembed", "einsum", "log_softmax"} <= operations
    assert all(
        d.get("additionalProperties") is False for d in definitions.values() if "properties" in d
    )
