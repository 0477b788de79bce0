"""The example of docs/planning.md prints what the page shows."""

import re
from pathlib import Path

from fabric.testing.commands import Block, get_environ

PAGE = Path(__file__).parents[2] / "docs/planning.md"
[(COMMAND, SHOWN)] = re.findall(r"^```console\n\$ (.*?)\n(.*?)^```$", PAGE.read_text(), re.M | re.S)


def test_example_prints_what_the_page_shows(tmp_path: Path) -> None:
    done = Block(language="console", text=COMMAND).run(get_environ(tmp_path), tmp_path)
    assert done.stdout == SHOWN


def test_page_is_short() -> None:
    assert len(PAGE.read_text().replace(SHOWN, "").split()) <= 250
