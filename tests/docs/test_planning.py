"""The example of docs/planning.md prints what the page shows."""

import os
import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs/planning.md"
[(COMMAND, SHOWN)] = re.findall(r"^```console\n\$ (.*?)\n(.*?)^```$", PAGE.read_text(), re.M | re.S)


def test_example_prints_what_the_page_shows() -> None:
    environ = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", COMMAND], env=environ, capture_output=True, text=True, check=True
    )
    assert done.stdout == SHOWN


def test_page_is_short() -> None:
    assert len(PAGE.read_text().replace(SHOWN, "").split()) <= 250
