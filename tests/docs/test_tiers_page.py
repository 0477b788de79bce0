"""docs/tiers.md runs as written, and says what the code does."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx
import pytest

from fabric.broker import PROMISES, BrokerSettings
from fabric.ledger.rates import TIERS
from fabric.sdk import Fabric
from fabric.testing.commands import get_environ, read_blocks, run_blocks
from fabric.testing.hub import running_hub

PAGE = Path(__file__).parents[2] / "docs/tiers.md"
TEXT = PAGE.read_text()
ROWS = re.compile(r"^\| (\w+) \| (.+?) \| (.+?) \| (.+?) \| (.+?) \| (.+?) \|$", re.M).findall(TEXT)


@pytest.mark.slow
def test_the_page_runs_as_written(tmp_path: Path) -> None:
    with running_hub(tmp_path) as hub, Fabric(hub.base_url, hub.api_key) as fabric:
        for _ in range(20):
            fabric.complete("one two", max_tokens=4)
        outputs = run_blocks(read_blocks(PAGE), get_environ(tmp_path, hub), tmp_path)
        metrics = httpx.get(f"{hub.base_url}/metrics").text
    assert "1,000,000 requests of 800 and 100 tokens" in outputs[0]
    assert [line.split()[0] for line in outputs[1].splitlines()] == ["alpha", "beta"]
    slo, queue = (json.loads(line) for line in re.findall(r'\{"data":.*?"list"\}', outputs[2]))
    assert {one["tier"] for one in slo["data"]} == set(PROMISES)
    assert queue["data"] == []
    told = re.search(r"^interactive +(\S+) +(\S+ s) .*changed$", outputs[3], re.M)
    assert told is not None
    assert told.groups() == ("2", "1.5 s")
    for name in re.findall(r"^\| `(fabric_\w+)`", TEXT, re.M):
        assert f"# TYPE {name} gauge" in metrics


def test_the_promises_are_those_of_the_page() -> None:
    shown = {name: cells for name, *cells in ROWS}
    for tier, promise in PROMISES.items():
        first, token, share, answered, costs = shown[tier]
        assert _seconds(first) == promise.first_token_s
        assert _seconds(token) == promise.token_s
        assert share == ("-" if promise.first_token_s is None else f"{promise.share_in_time:.0%}")
        assert answered.split("%")[0] == f"{100 * promise.share_answered:g}"
        assert tier not in TIERS or float(costs) == float(TIERS[tier])
    weights = [f"{promise.weight:g} to {tier}" for tier, promise in PROMISES.items()]
    assert all(one in TEXT for one in weights[:3])
    assert (BrokerSettings().batch_share, BrokerSettings().introspection_share) == (0.75, 0.5)


def _seconds(text: str) -> float | None:
    if text == "-":
        return None
    value, unit = text.split()
    return float(value) / (1000 if unit == "ms" else 1)
