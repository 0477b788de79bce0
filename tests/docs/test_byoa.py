"""docs/byoa.md runs as written: on a real Slurm, with an engine that knows no model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml

from fabric.config import shipped_sites
from fabric.testing.hub import PROJECT, running_hub
from fabric.testing.instance import MODULE
from fabric.testing.slurm import running_slurm

PAGE = Path(__file__).parents[2] / "docs/byoa.md"
BLOCKS = re.compile(r"^```(console|python)\n(.*?)^```$", re.M | re.S).findall(PAGE.read_text())


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_page_runs_as_written(tmp_path: Path) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="sl") as short,
        running_slurm(Path(short)) as slurm,
        running_hub(tmp_path, sites=()) as hub,
    ):
        hub.catalog.add_model("brought", "1", source="fixed-delay:", context_tokens=2048)
        _, key = hub.keys.add_key(PROJECT, scopes=("query", "launch"))
        sites = tmp_path / "config" / "fabric" / "sites"
        sites.mkdir(parents=True)
        shipped = yaml.safe_load(shipped_sites()["local-slurm"].read_text())
        (sites / "here.yaml").write_text(yaml.safe_dump(shipped | {"name": "here"}))
        environ = {
            **os.environ,
            **slurm.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "FABRIC_BASE_URL": hub.base_url,
            "FABRIC_API_KEY": key,
            "FABRIC_STATE_DIR": str(tmp_path / "state"),
            "XDG_CONFIG_HOME": str(tmp_path / "config"),
            "MODEL": "brought@1",
            "MACHINE": "here",
        }
        script = "\n".join(
            line.removeprefix("$ ")
            for language, text in BLOCKS
            if language == "console"
            for line in text.splitlines()
        ).replace("--wait", f"--wait --module {MODULE}")
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            env=environ,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        assert "#SBATCH --time=30" in done.stdout
        assert "word0 word1" in done.stdout
        assert "its owner ended it" in done.stderr

        (program,) = (text for language, text in BLOCKS if language == "python")
        program = program.replace("instance(model", f'instance(module="{MODULE}", model')
        ran = subprocess.run(
            [sys.executable, "-c", program],
            env=environ,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.strip() == "word0 word1 word2 word3"


def test_page_is_short() -> None:
    assert len(PAGE.read_text().split()) <= 700
