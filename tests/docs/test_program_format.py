"""The program on the page of the format is valid, and its Python runs."""

from __future__ import annotations

import re
from pathlib import Path

from fabric.messages.program import Program
from fabric.programs import Checked
from fabric.testing.tiny_models import tiny_model

PAGE = (Path(__file__).parents[2] / "docs/program-format.md").read_text()


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.S)
    return str(found)


def test_the_page_s_program_is_checked_as_it_says() -> None:
    program = Program.model_validate_json(block("json"))
    manifest = tiny_model("llama").manifest
    wider = manifest.model_copy(
        update={
            "num_layers": 6,
            "points": tuple(
                spec.model_copy(update={"layers": tuple(range(6))}) if spec.layers else spec
                for spec in manifest.points
            ),
        }
    )
    space: dict[str, object] = {"program": program, "manifest": wider}
    exec(block("python"), space)
    checked = space["checked"]
    assert isinstance(checked, Checked)
    assert checked.runs[0].nodes[-1].shape == (1, 10)
    assert (checked.scopes, checked.lane) == ({"read"}, "boundary")
