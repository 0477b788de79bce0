"""Accounts behind a real hub: who pays, what lapses, what is kept and charged, what comes back."""

from __future__ import annotations

import csv
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from decimal import Decimal
from pathlib import Path

import pytest

from fabric.broker import BrokerSettings
from fabric.errors import InsufficientBalance
from fabric.sdk import Fabric
from fabric.sql import utc_now
from fabric.testing.engine import FixedDelayEngine
from fabric.testing.hub import PROJECT, RunningHub, running_hub, wait_until

GENERAL = f"allocation:{PROJECT}:*"
NEVER = BrokerSettings(facts_ttl_s=0.0)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[RunningHub]:
    with running_hub(
        tmp_path,
        sites=["alpha"],
        engine=lambda: FixedDelayEngine(token_s=0.001),
        grant_usu=1000,
        broker=NEVER,
    ) as hub:
        yield hub


def ask(hub: RunningHub, key: str, max_tokens: int = 5) -> int:
    with Fabric(hub.base_url, key, num_retries=0) as fabric:
        return fabric.complete("one two three", max_tokens=max_tokens).charge_usu


def available(hub: RunningHub, name: str) -> int:
    return hub.ledger.allocation(name).available_usu


def test_a_holder_pays_from_its_share_and_from_nothing_else(hub: RunningHub) -> None:
    record, key = hub.keys.add_key(PROJECT)
    share = hub.ledger.open_share(GENERAL, record.id)
    hub.ledger.grant(share, 40)
    charged_usu = ask(hub, key)
    wait_until(lambda: available(hub, share) == 40 - charged_usu, timeout_s=30)
    assert available(hub, GENERAL) == 960
    with pytest.raises(InsufficientBalance) as caught:
        ask(hub, key, max_tokens=100)
    assert caught.value.detail["account"] == share
    others_usu = ask(hub, hub.api_key, max_tokens=100)
    wait_until(lambda: available(hub, GENERAL) == 960 - others_usu, timeout_s=30)


def test_the_hub_lets_a_period_lapse(tmp_path: Path) -> None:
    settings = BrokerSettings(lease_s=1.0)
    with running_hub(tmp_path, sites=[], grant_usu=1000, broker=settings) as hub:
        hub.ledger.modify_allocation(GENERAL, ends_at=utc_now() + timedelta(seconds=0.2))
        wait_until(lambda: available(hub, GENERAL) == 0, timeout_s=60)
        assert hub.ledger.statement(PROJECT).lines[-1].kind == "expiry"


def test_what_is_kept_in_the_cache_is_charged_and_recorded(hub: RunningHub) -> None:
    price = Decimal("1000")
    hub.ledger.set_rate(
        "*", "alpha", prompt_usu=0, cached_prompt_usu=0, output_usu=0, kv_block_usu=price
    )
    hub.ledger.grant(GENERAL, 10**9)
    with Fabric(hub.base_url, hub.api_key) as fabric:
        answer = fabric.complete("one two three", max_tokens=20, deadline_s=60)
        wait_until(lambda: fabric.run(answer.run_id).state == "completed", timeout_s=30)
    # 20 steps of a millisecond with two blocks for 23 tokens, at 1000 a block and second.
    assert answer.charge_usu == 40


def test_a_refund_is_on_the_statement_that_users_read(hub: RunningHub, tmp_path: Path) -> None:
    with Fabric(hub.base_url, hub.api_key) as fabric:
        answer = fabric.complete("one two three", max_tokens=5)
        wait_until(lambda: len(fabric.usage().lines) == 2, timeout_s=30)
        hub.ledger.refund(answer.run_id, memo="node failed")
        *_, charge, refund = fabric.usage().lines
    assert (refund.kind, refund.amount_usu) == ("refund", -charge.amount_usu)
    assert refund.mends == charge.entry
    printed = subprocess.run(
        [sys.executable, "-m", "fabric.cli", "usage", "--csv"],
        env=os.environ
        | {
            "FABRIC_BASE_URL": hub.base_url,
            "FABRIC_API_KEY": hub.api_key,
            "FABRIC_STATE_DIR": str(tmp_path / "state"),
        },
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout
    rows = list(csv.DictReader(io.StringIO(printed)))
    assert [row["kind"] for row in rows] == ["grant", "charge", "refund"]
    assert rows[2]["mends"] == rows[1]["entry"]
