"""docs/byoa.md runs as written: on a real Slurm, with an engine that knows no model."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import yaml

from fabric.config import shipped_sites
from fabric.testing.commands import Block, get_environ, read_blocks
from fabric.testing.hub import PROJECT, running_hub
from fabric.testing.instance import MODULE
from fabric.testing.slurm import running_slurm

PAGE = Path(__file__).parents[2] / "docs/byoa.md"


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
        environ = get_environ(
            tmp_path,
            hub,
            **slurm.environ,
            FABRIC_API_KEY=key,
            MODEL="brought@1",
            MACHINE="here",
        )
        *commands, program = read_blocks(PAGE)
        typed = "".join(block.text for block in commands)
        typed = typed.replace("--wait", f"--wait --module {MODULE}")
        done = Block(language="console", text=typed).run(environ, tmp_path, timeout_s=240)
        assert "#SBATCH --time=30" in done.stdout
        assert "your project's requests for this model go nowhere else while" in done.stdout
        assert "word0 word1" in done.stdout
        assert "its owner ended it" in done.stderr

        text = program.text.replace("instance(model", f'instance(module="{MODULE}", model')
        ran = Block(language=program.language, text=text).run(environ, tmp_path)
        assert ran.stdout.strip() == "word0 word1 word2 word3"


def test_page_is_short() -> None:
    assert len(PAGE.read_text().split()) <= 700
