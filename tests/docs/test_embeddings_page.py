"""docs/embeddings.md runs as written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fabric.config import load_site
from fabric.engine.source import ModelSource
from fabric.testing.engine import DIMENSIONS
from fabric.testing.hub import MODEL, running_hub

PAGE = Path(__file__).parents[2] / "docs/embeddings.md"
BLOCKS = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S).findall(PAGE.read_text())


@pytest.mark.slow
def test_the_page_runs_as_written(tmp_path: Path) -> None:
    with running_hub(tmp_path, sites=["alpha"]) as hub:
        environ = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "FABRIC_BASE_URL": hub.base_url,
            "FABRIC_API_KEY": hub.api_key,
            "FABRIC_STATE_DIR": str(tmp_path / "state"),
            "XDG_CONFIG_HOME": str(tmp_path / "config"),
            "OPENAI_BASE_URL": hub.openai_url,
            "OPENAI_API_KEY": hub.api_key,
            "MODEL": MODEL,
        }
        outputs = []
        for language, text in BLOCKS[1:]:
            script = "\n".join(line.removeprefix("$ ") for line in text.splitlines())
            argv = ["bash", "-euo", "pipefail", "-c", script]
            if language == "python":
                argv = [sys.executable, "-c", text]
            done = subprocess.run(
                argv, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=60
            )
            assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
            outputs.append(done.stdout)
    lines = outputs[0].splitlines()
    assert [len(json.loads(line)) for line in lines] == [DIMENSIONS, DIMENSIONS]
    assert outputs[1] == f"{DIMENSIONS} 6 6\n2\n"


def test_the_site_of_the_page_has_models_of_both_kinds(tmp_path: Path) -> None:
    (tmp_path / "lab.yaml").write_text(BLOCKS[0][1])
    sources = [ModelSource.parse(model.source) for model in load_site(tmp_path / "lab.yaml").models]
    assert [source.embeds_sentences for source in sources] == [False, True]


def test_page_is_short() -> None:
    assert len(PAGE.read_text().split()) <= 200
