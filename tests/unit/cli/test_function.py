"""``fabric-admin function`` without the service: what the catalog alone answers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from uuid import uuid4

import pytest
from click.testing import Result

from fabric.catalog import Catalog
from fabric.compute.functions import shipped_function, shipped_functions
from fabric.sql import Database, migrate
from fabric.testing.admin import Admin


class Functions(Admin):
    """Runs the commands on one database."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"sqlite:///{path}")
        with Database(self.url) as database:
            migrate(database)

    def run(self, *arguments: str, stdin: str | None = None) -> Result:
        return super().run("function", *arguments, stdin=stdin)

    def add(self, name: str, *, sha256: str = "", **more: str) -> str:
        id = str(uuid4())
        with Database(self.url) as database:
            known = sha256 or shipped_function(name).sha256
            Catalog(database).add_function(id, name, sha256=known, fabric_version="1", **more)
        return id


@pytest.fixture
def admin(tmp_path: Path) -> Functions:
    return Functions(tmp_path / "hub.db")


def test_nothing_is_registered_at_first(admin: Functions) -> None:
    assert admin.json("list") == []
    assert "fabric-admin function add" in admin.run("list").stderr


def test_a_dry_run_tells_what_would_be_registered(admin: Functions) -> None:
    known = admin.add("infer")
    plan = {one["name"]: one["id"] for one in admin.json("register", "--dry-run")}
    assert plan.pop("infer") == known, "its source has not changed"
    assert plan == dict.fromkeys(set(shipped_functions()) - {"infer"})
    forced = admin.json("register", "infer", "--force", "--dry-run")
    assert [one["id"] for one in forced] == [None]
    assert "to be registered" in admin.run("register", "--dry-run").stdout
    assert len(admin.json("list")) == 1


def test_a_function_for_others_is_another_function(admin: Functions) -> None:
    admin.add("infer")
    group = str(uuid4())
    shared = admin.add("infer", visibility="group", group_id=group)
    plan = admin.json("register", "infer", "--group", group, "--dry-run")
    assert plan[0]["id"] == shared
    assert admin.json("register", "infer", "--public", "--dry-run")[0]["id"] is None


def test_what_has_not_changed_is_not_registered_again(admin: Functions) -> None:
    """No client is made: without credentials that would fail."""
    known = admin.add("infer")
    assert [one["id"] for one in admin.json("register", "infer")] == [known]


def test_a_list_says_what_is_current_and_names_what_has_drifted(admin: Functions) -> None:
    admin.add("infer")
    drifted = admin.add("describe_site", sha256="0" * 64)
    admin.add("gone", sha256="1" * 64)
    states = {one["name"]: one["state"] for one in admin.json("list")}
    assert states == {"describe_site": "drifted", "gone": "not shipped", "infer": "current"}
    listed = admin.run("list")
    assert listed.exit_code == 0
    for part in (drifted, "0" * 64, shipped_function("describe_site").sha256):
        assert part in listed.stderr
    assert "`fabric-admin function register describe_site`" in listed.stderr


def test_one_of_several_must_be_named_by_its_id(admin: Functions) -> None:
    ids = [admin.add("infer"), admin.add("infer", visibility="public")]
    refused = admin.run("retire", "infer", "-y")
    assert refused.exit_code == 3
    assert all(id in refused.stderr for id in ids)
    assert admin.run("show", "nothing").exit_code == 3


def test_help_needs_no_service() -> None:
    code = """
import sys
from click.testing import CliRunner
from fabric.cli.main import fabric_admin
assert CliRunner().invoke(fabric_admin, ["function", "register", "--help"]).exit_code == 0
print([m for m in ("globus_compute_sdk", "globus_sdk", "sqlalchemy") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
