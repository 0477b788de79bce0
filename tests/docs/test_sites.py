"""Every command in a console block of docs/sites.md runs, in order."""

import re
from pathlib import Path

import pytest

from fabric.testing.commands import get_environ, read_blocks, run_blocks

PAGE = Path(__file__).parents[2] / "docs/sites.md"


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_page_runs_as_written(tmp_path: Path) -> None:
    environ = get_environ(tmp_path, HOME=str(tmp_path))
    del environ["XDG_CONFIG_HOME"]
    _, validated = run_blocks(read_blocks(PAGE), environ, tmp_path)
    assert re.search(r"^lab +ok .*endpoint rendered$", validated, re.M)
    assert re.search(r"^alcf-polaris +ok ", validated, re.M)


def test_page_is_short() -> None:
    assert len(PAGE.read_text().split()) <= 500
