"""``fabric explain`` as it is printed."""

from __future__ import annotations

from typing import Any

import pytest
from click.testing import CliRunner

from fabric.cli.commands.explain import explain
from fabric.messages import Candidate, Placement
from fabric.sdk import Fabric, Site


def site(name: str) -> Site:
    return Site(
        name=name,
        display=name,
        channel="session",
        state="ready",
        detail="account m1: 3 node-hours left, asked 4 min ago",
        replicas=(),
    )


@pytest.fixture
def corrections(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found: list[float] = []

    def answer(*_: object, **__: Any) -> Placement:
        lines = tuple(
            Candidate(
                site=f"s{number}",
                instance=f"inst_{number}",
                digest="sha256:aa",
                cost_s={"queue": 0.5},
                total_s=0.5,
                correction=correction,
            )
            for number, correction in enumerate(found)
        )
        return Placement(
            site="s0", instance="inst_0", digest="sha256:aa", reason="s0: why", candidates=lines
        )

    monkeypatch.setattr(Fabric, "explain", answer)
    monkeypatch.setattr(Fabric, "sites", lambda _: tuple(map(site, ("s0", "elsewhere"))))
    return found


@pytest.mark.parametrize(("given", "is_told"), [([1.0, 1.7], True), ([1.0, 1.0], False)])
def test_what_observation_corrected_is_told_where_it_did(
    corrections: list[float], given: list[float], is_told: bool
) -> None:
    corrections.extend(given)
    told = CliRunner().invoke(explain, ["hello", "--model", "smol"], terminal_width=200)
    assert told.exit_code == 0, told.output
    assert ("OBSERVED/PREDICTED" in told.output) == is_told
    assert ("1.70" in told.output) == is_told
    assert "\ns0: account m1: 3 node-hours left, asked 4 min ago\n" in told.output
    assert "elsewhere" not in told.output
