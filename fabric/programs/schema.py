"""The JSON Schema of programs, as it is published."""

from __future__ import annotations

from fabric.messages.program import Program


def json_schema() -> dict[str, object]:
    """Return the JSON Schema (2020-12) of a program."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Intervention program, version 1",
        **{
            key: value
            for key, value in Program.model_json_schema().items()
            if key not in ("$schema", "title")
        },
    }
