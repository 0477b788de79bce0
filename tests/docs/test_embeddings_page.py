"""docs/embeddings.md runs as written."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fabric.config import load_site
from fabric.engine.source import ModelSource
from fabric.testing.commands import get_environ, read_blocks, run_blocks
from fabric.testing.engine import DIMENSIONS
from fabric.testing.hub import MODEL, running_hub

PAGE = Path(__file__).parents[2] / "docs/embeddings.md"
[SITE] = re.findall(r"^```yaml\n(.*?)^```$", PAGE.read_text(), re.M | re.S)


@pytest.mark.slow
def test_the_page_runs_as_written(tmp_path: Path) -> None:
    with running_hub(tmp_path, sites=["alpha"]) as hub:
        environ = get_environ(tmp_path, hub, MODEL=MODEL)
        outputs = run_blocks(read_blocks(PAGE), environ, tmp_path)
    lines = outputs[0].splitlines()
    assert [len(json.loads(line)) for line in lines] == [DIMENSIONS, DIMENSIONS]
    assert outputs[1] == f"{DIMENSIONS} 6 6\n2\n"


def test_the_site_of_the_page_has_models_of_both_kinds(tmp_path: Path) -> None:
    (tmp_path / "lab.yaml").write_text(SITE)
    sources = [ModelSource.parse(model.source) for model in load_site(tmp_path / "lab.yaml").models]
    assert [source.embeds_sentences for source in sources] == [False, True]


def test_page_is_short() -> None:
    assert len(PAGE.read_text().split()) <= 200
