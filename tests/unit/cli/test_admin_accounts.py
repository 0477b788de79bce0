"""Allocations, rates and reconciliation as administrators handle them, on a real database."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from click.testing import CliRunner
from sqlalchemy import insert, select, update

import fabric.batches  # noqa: F401 - whose table of files is filled here
from fabric.catalog import Catalog, RunRecord
from fabric.cli.admin import rate_measure
from fabric.cli.main import fabric_admin
from fabric.ledger import Ledger
from fabric.ledger.sacct import COMMAND
from fabric.messages import RunState, Usage
from fabric.sql import Database, metadata, utc_now
from fabric.testing.admin import Admin

SACCT = "11|COMPLETED|1795297935|1795301535|billing=4,gres/gpu=4,node=1\n"


class Books(Admin):
    """Commands on a database whose ledger is used meanwhile."""

    def charge(self, run: str, amount_usu: int) -> None:
        with Database(self.url) as database:
            ledger = Ledger(database)
            ledger.hold(run, allocation="allocation:astro:*", amount_usu=amount_usu, lease_s=60)
            ledger.settle(run, amount_usu, site="alpha", memo="=HYPERLINK(1)")


@pytest.fixture
def admin(tmp_path: Path) -> Books:
    admin = Books(f"sqlite:///{tmp_path / 'hub.db'}")
    admin.ok("project", "add", "astro")
    admin.ok("site", "add", "alpha")
    return admin


def available(admin: Books) -> dict[str, int]:
    return {one["name"]: one["available_usu"] for one in admin.json("alloc", "show")}


def test_periods_are_told_apart(admin: Books) -> None:
    for period in ("2026", "2027"):
        admin.ok("alloc", "add", "astro", "--period", period, "--su", "5")
    refused = admin.run("alloc", "modify", "astro", "--su", "1")
    assert refused.exit_code == 3
    assert "2026, 2027; name one" in refused.stderr
    admin.ok("alloc", "modify", "astro", "--period", "2027", "--su", "1")
    assert available(admin) == {
        "allocation:astro:*:2026": 5_000_000,
        "allocation:astro:*:2027": 6_000_000,
    }
    assert "for 2030" in admin.run("alloc", "delete", "astro", "--period", "2030", "-y").stderr


def test_a_share_is_for_a_key_of_the_project(admin: Books) -> None:
    admin.ok("alloc", "add", "astro", "--su", "5")
    admin.ok("project", "add", "bio")
    mine = admin.json("key", "add", "astro")["id"]
    theirs = admin.json("key", "add", "bio")["id"]
    admin.ok("alloc", "share", "astro", mine, "--su", "2", "--key", "once")
    admin.ok("alloc", "share", "astro", mine, "--su", "2", "--key", "once")
    admin.ok("alloc", "share", "astro", mine, "--su", "-0.5")
    assert available(admin) == {
        "allocation:astro:*": 3_500_000,
        f"allocation:astro:*/{mine}": 1_500_000,
    }
    assert mine in admin.ok("alloc", "show").stdout
    assert admin.run("alloc", "share", "astro", theirs, "--su", "1").exit_code == 3
    for nobody in ("globus:me", "globus:", f"globus:{str(UUID(int=0xA)).upper()}"):
        refused = admin.run("alloc", "share", "astro", nobody, "--su", "1")
        assert (refused.exit_code, nobody in refused.stderr) == (3, True)
    assert admin.run("alloc", "share", "astro", mine, "--su", "9").exit_code == 3
    admin.ok("alloc", "delete", "astro", "-y")
    assert set(available(admin).values()) == {0}


def test_amounts_can_be_given_in_a_centres_unit(admin: Books) -> None:
    assert "rate unit add" in admin.run("alloc", "add", "astro", "--amount", "4 node-hour").stderr
    admin.ok("rate", "unit", "add", "node-hour", "--su", "2.5")
    admin.ok("alloc", "add", "astro", "--amount", "4 node-hour")
    admin.ok("alloc", "add", "astro", "--site", "alpha", "--su", "1")
    admin.ok("alloc", "exchange", "astro", "--to", "alpha", "--amount", "0.4 node-hour")
    assert available(admin) == {
        "allocation:astro:*": 9_000_000,
        "allocation:astro:alpha": 2_000_000,
    }
    assert admin.json("rate", "unit", "show")[0]["usu"] == "2500000"
    for wrong in (
        ["--amount", "many node-hour"],
        ["--amount", "4node-hour"],
        ["--su", "1e999999999"],
        ["--su", "1", "--amount", "1 node-hour"],
        [],
    ):
        assert admin.run("alloc", "exchange", "astro", "--to", "alpha", *wrong).exit_code == 2


def test_a_statement_is_a_table_json_or_csv(admin: Books) -> None:
    admin.ok("alloc", "add", "astro", "--su", "5", "--memo", "first year")
    admin.charge("run_1", 2_000_000)
    refund = admin.json("alloc", "refund", "run_1", "--su", "0.5", "--memo", "node failed")
    assert (refund["refunded_usu"], refund["charged_usu"]) == (500_000, 2_000_000)
    assert admin.run("alloc", "refund", "run_1", "--su", "2").exit_code == 3
    printed = admin.ok("alloc", "statement", "astro", "--csv").stdout
    rows = list(csv.DictReader(io.StringIO(printed)))
    assert [(row["kind"], row["amount_su"], row["balance_su"]) for row in rows] == [
        ("grant", "5.000000", "5.000000"),
        ("charge", "-2.000000", "3.000000"),
        ("refund", "0.500000", "3.500000"),
    ]
    assert rows[2]["mends"] == rows[1]["entry"]
    assert rows[1]["memo"] == "'=HYPERLINK(1)"  # text for a spreadsheet
    assert len(admin.json("alloc", "statement", "astro")["lines"]) == 3
    text = admin.ok("alloc", "statement", "astro", "--limit", "2")
    assert "refund" in text.stdout
    assert "older lines" in text.stderr
    assert admin.run("alloc", "statement", "nobody").exit_code == 3


def test_prices_are_followed_by_others_and_taken_back_before_they_count(admin: Books) -> None:
    admin.ok("rate", "add", "*", "alpha", "--prompt", "10", "--output", "40", "--stored", "3")
    later = ["--from", "2999-01-01"]
    changed = admin.json("rate", "modify", "*", "alpha", "--output", "50", *later)
    assert [changed[name] for name in ("prompt_usu", "output_usu", "stored_usu")] == [
        "10",
        "50",
        "3",
    ]
    (now,) = admin.json("rate", "show", "--site", "alpha")
    assert now["rate"]["output_usu"] == "40"
    assert len(admin.json("rate", "show", "--all")) == 2
    assert "STORED" in admin.ok("rate", "show").stdout
    admin.ok("rate", "delete", "*", "alpha", *later, "-y")
    assert len(admin.json("rate", "show", "--all")) == 1
    assert admin.run("rate", "delete", "*", "alpha", *later, "-y").exit_code == 3
    assert admin.run("rate", "modify", "*", "beta", "--output", "1").exit_code == 3
    assert admin.run("rate", "add", "*", "*", "--prompt", "1").exit_code == 2


def test_rates_are_measured_from_runs(admin: Books) -> None:
    admin.ok(
        "model",
        "add",
        "smol",
        "--revision",
        "1",
        "--context-tokens",
        "2048",
        "--source",
        "fixed-delay:",
    )
    too_few = admin.run("rate", "measure", "smol", "alpha", "--node-hour", "3.6")
    assert too_few.exit_code == 3
    assert "The 0 runs" in too_few.stderr
    with Database(admin.url) as database:
        Catalog(database).record_runs([run(number) for number in range(30)])
    command = ["rate", "measure", "smol", "alpha", "--node-hour", "3.6"]
    found = admin.json(*command)
    assert found["measured"]["r2"] == pytest.approx(1)
    assert float(found["prices"]["prompt_usu"]) == pytest.approx(1, abs=1e-4)  # 1 ms at 1 mSU/s
    assert float(found["prices"]["output_usu"]) == pytest.approx(20, abs=1e-4)
    assert "--apply" in admin.ok(*command).stderr
    admin.ok("rate", "add", "*", "*", "--prompt", "1", "--output", "1", "--stored", "7")
    admin.ok(*command, "--apply")
    (rate,) = admin.json("rate", "show", "--model", "smol@1", "--site", "alpha")
    assert float(rate["rate"]["prompt_usu"]) == float(found["prices"]["prompt_usu"])
    assert rate["rate"]["stored_usu"] == "7"


def test_a_model_is_measured_though_others_were_asked_since(
    admin: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    admin.ok("model", "add", "smol", "--context-tokens", "2048", "--source", "fixed-delay:")
    later = {"model": "busy@1", "created_at": datetime(2026, 2, 1, tzinfo=UTC)}
    elsewhere = {"site": "beta", "created_at": datetime(2026, 2, 1, tzinfo=UTC)}
    with Database(admin.url) as database:
        Catalog(database).record_runs(
            [
                *(run(number) for number in range(30)),
                *(replace(run(number), id=f"run_m{number}", **later) for number in range(30)),
                *(replace(run(number), id=f"run_s{number}", **elsewhere) for number in range(30)),
            ]
        )
    monkeypatch.setattr(rate_measure, "MAX_RUNS", 25)
    found = admin.json("rate", "measure", "smol", "alpha", "--node-hour", "3.6")
    assert found["measured"]["num_runs"] == 25


def run(number: int) -> RunRecord:
    prompt, output = 100 + 37 * number % 500, 10 + 13 * number % 90
    return RunRecord(
        id=f"run_{number}",
        project="astro",
        key_id="k",
        model="smol@1",
        digest=None,
        state=RunState.COMPLETED,
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        site="alpha",
        usage=Usage(
            prompt_tokens=prompt, output_tokens=output, device_s=prompt * 1e-3 + output * 0.02
        ),
    )


def test_storage_is_charged_once_a_day(admin: Books) -> None:
    admin.ok("rate", "add", "*", "*", "--prompt", "1", "--output", "1", "--stored", "1000000")
    assert admin.json("alloc", "rent") == []
    store(admin, 2**29)
    (refused,) = admin.json("alloc", "rent")
    assert "0 micro-SU available" in refused["state"]
    admin.ok("alloc", "add", "astro", "--su", "5")
    assert admin.json("alloc", "rent") == [
        {"project": "astro", "gib": "0.500000", "su": "0.500000", "state": "charged"}
    ]
    admin.ok("alloc", "rent")
    with Database(admin.url) as database, database.transaction() as connection:
        connection.execute(update(metadata.tables["files"]).values(num_bytes=2**30))
    assert admin.json("alloc", "rent")[0]["state"] == "charged today already"
    assert available(admin) == {"allocation:astro:*": 4_500_000}


def test_jobs_are_reconciled_once(admin: Books, tmp_path: Path) -> None:
    admin.ok("rate", "unit", "add", "node-hour", "--su", "2")
    jobs = tmp_path / "jobs.txt"
    jobs.write_text(SACCT)
    command = ["reconcile", "alpha", str(jobs), "--unit", "node-hour"]
    found = admin.json(*command)
    assert found["jobs"] == [
        {"job": "11", "charge_usu": 2_000_000, "billed_usu": 0, "overhead_usu": 2_000_000}
    ]
    assert admin.json(*command)["jobs"] == []
    gpus = ["reconcile", "alpha", "-", "--unit", "node-hour", "--tres", "gres/gpu"]
    assert "8.000000" in admin.ok(*gpus, stdin=SACCT.replace("11|", "12|")).stdout
    admin.ok("db", "verify")
    assert admin.run(*gpus, stdin="<html>").exit_code == 3
    ended = (Path(__file__).parents[2] / "data/pbs/finished.json").read_text()
    pbs = ["reconcile", "alpha", "-", "--unit", "node-hour", "--scheduler", "pbs"]
    (job,) = admin.json(*pbs, stdin=f'{{"Jobs": {{"7.pbs": {ended}}}}}')["jobs"]
    assert (job["job"], job["charge_usu"]) == ("7.pbs", 0)
    assert admin.run(*pbs, "--tres", "ngpus", stdin=SACCT).exit_code == 3
    assert admin.run("reconcile", "nowhere", str(jobs), "--unit", "node-hour").exit_code == 3


@pytest.mark.parametrize(
    "command",
    [
        "alloc refund run_1",
        "alloc exchange astro --to alpha --su 1",
        "alloc rent",
        "rate unit add gpu-hour --su 1",
        "rate delete * * --from 2999-01-01 -y",
        "reconcile alpha - --unit node-hour",
    ],
)
def test_a_dry_run_changes_nothing_and_the_log_has_what_was_changed(
    admin: Books, command: str
) -> None:
    admin.ok("rate", "unit", "add", "node-hour", "--su", "2")
    prices = ["--prompt", "1", "--output", "1", "--stored", "1000000"]
    admin.ok("rate", "add", "*", "*", *prices)
    admin.ok("rate", "add", "*", "*", *prices, "--from", "2999-01-01")
    admin.ok("alloc", "add", "astro", "--su", "5")
    admin.ok("alloc", "add", "astro", "--site", "alpha", "--su", "5")
    admin.charge("run_1", 2_000_000)
    store(admin, 2**29)
    num_logged = len(admin.json("audit", "show"))
    before = kept(admin)
    dry = admin.ok(*command.split(), "--dry-run", stdin=SACCT)
    assert "Nothing was changed" in dry.stderr
    assert kept(admin) == before
    assert len(admin.json("audit", "show")) == num_logged
    admin.ok(*command.split(), stdin=SACCT)
    assert kept(admin) != before
    [latest, *others] = admin.json("audit", "show")
    assert len(others) == num_logged
    assert command.startswith(latest["what"])
    admin.ok("db", "verify")


def kept(admin: Books) -> list[Any]:
    with Database(admin.url) as database, database.read() as connection:
        tables = [metadata.tables[name] for name in ("journal", "entries", "accounts", "units")]
        rows = [connection.execute(select(table)).all() for table in tables]
    return [*rows, admin.json("rate", "show", "--all")]


def store(admin: Books, num_bytes: int) -> None:
    file = {"id": "file-1", "project": "astro", "filename": "f", "purpose": "batch"}
    times = {"created_at": utc_now(), "expires_at": utc_now()}
    with Database(admin.url) as database, database.transaction() as connection:
        row = file | times | {"num_bytes": num_bytes}
        connection.execute(insert(metadata.tables["files"]), row)


def test_help_tells_the_command_whose_output_is_read() -> None:
    assert COMMAND in CliRunner().invoke(fabric_admin, ["reconcile", "--help"]).stdout
