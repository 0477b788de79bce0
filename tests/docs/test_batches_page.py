"""docs/batches.md runs as written."""

from __future__ import annotations

from pathlib import Path

import pytest

from fabric.sdk import Fabric
from fabric.testing.commands import get_environ, read_blocks, run_blocks
from fabric.testing.hub import MODEL, running_hub, wait_until

PAGE = Path(__file__).parents[2] / "docs/batches.md"


@pytest.mark.slow
def test_the_page_runs_as_written(tmp_path: Path) -> None:
    with running_hub(tmp_path) as hub, Fabric(hub.base_url, hub.api_key) as fabric:
        environ = get_environ(tmp_path, hub, MODEL=MODEL)
        outputs = run_blocks(read_blocks(PAGE), environ, tmp_path)
        assert "3 of 3, 0 failed" in outputs[1]
        assert all(f'"custom_id": "q{number}"' in outputs[1] for number in (1, 2, 3))
        assert "word0 word1" in outputs[1]
        wait_until(lambda: all(one.is_over for one in fabric.batches()), timeout_s=60)
        assert [one.num_completed for one in fabric.batches()] == [3, 3]


def test_page_is_short() -> None:
    assert len(PAGE.read_text().split()) <= 250
