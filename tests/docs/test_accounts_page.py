"""docs/accounts.md runs as written."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from fabric.catalog import RunRecord
from fabric.messages import RunState, Usage
from fabric.sql import utc_now
from fabric.testing.commands import get_environ, read_blocks
from fabric.testing.hub import PROJECT, RunningHub, running_hub

PAGE = Path(__file__).parents[2] / "docs/accounts.md"


def record_runs(hub: RunningHub) -> None:
    """What some days of use would have left to measure."""
    hub.catalog.record_runs(
        [
            RunRecord(
                id=f"run_{number:032x}",
                project="before",
                key_id="k",
                model="fixed@1",
                digest=None,
                state=RunState.COMPLETED,
                created_at=utc_now(),
                site="alpha",
                usage=Usage(
                    prompt_tokens=100 + 37 * number,
                    output_tokens=10 + 13 * number % 90,
                    device_s=0.1 + 0.01 * number,
                ),
            )
            for number in range(30)
        ]
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_page_runs_as_written(tmp_path: Path) -> None:
    with running_hub(tmp_path, sites=["alpha"]) as hub:
        record, key = hub.keys.add_key(PROJECT)
        record_runs(hub)
        environ = get_environ(
            tmp_path,
            hub,
            FABRIC_API_KEY=key,
            FABRIC_HUB_DATABASE_URL=f"sqlite:///{tmp_path / 'hub.sqlite'}",
            FABRIC_MODEL="fixed",
            KEY_ID=record.id,
        )
        ran = [block.run(environ, tmp_path, timeout_s=240) for block in read_blocks(PAGE)]
        outputs = [one.stdout + one.stderr for one in ran]
        hub.ledger.verify()
        allocations = {one.name: one for one in hub.ledger.allocations(PROJECT)}
    assert allocations[f"allocation:{PROJECT}:alpha:2027"].available_usu == 20_000_000
    assert allocations[f"allocation:{PROJECT}:*:2027/{record.id}"].available_usu == 20_000_000
    assert "share of" in outputs[2]
    rows = list(csv.DictReader((tmp_path / "physics.csv").read_text().splitlines()))
    assert [row["kind"] for row in rows].count("refund") == 1
    assert "30 runs" in outputs[5]
    assert "2.500000" in outputs[6]
    assert "The ledger adds up." in outputs[6]


def test_page_is_short() -> None:
    assert len(PAGE.read_text().split()) <= 900
