"""What all nouns of ``fabric-admin`` have in common."""

from __future__ import annotations

import json
import os
import re
import shlex
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from fabric.auth import Users
from fabric.catalog import Catalog, RunRecord
from fabric.cli.main import fabric_admin
from fabric.cli.output import Output
from fabric.messages import RunState, new_id
from fabric.sql import Database
from fabric.testing.admin import Admin

GROUP = "6c91e6eb-085c-11e6-a7a5-22000bf2d559"
ENDPOINT = "4b116d3c-1703-4f8f-9f6f-39921e5864df"
ANVIL = f"""
name: anvil
title: Anvil
executor: {{kind: globus-compute, endpoint_id: {ENDPOINT}}}
"""

PRICES = (
    *("--prompt", "--cached-prompt", "--output", "--hook-in", "--hook-out", "--device"),
    *("--kv-block", "--adapter", "--fine-tune", "--stored"),
)

Leaf = tuple[tuple[str, ...], click.Command]


def leaves(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[Leaf]:
    ctx = click.Context(group)
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        assert command is not None
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from leaves(command, (*path, name))


COMMANDS = list(leaves(fabric_admin))


def named(leaf: Leaf) -> str:
    return " ".join(leaf[0])


class Furnished(Admin):
    """Runs commands on a database, in which there is one of everything."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "hub.db"
        super().__init__(f"sqlite:///{self.path}")
        (folder / "anvil.yaml").write_text(ANVIL)
        self.ok("project", "add", "astro", "--title", "Astronomy")
        self.ok("project", "group", "add", "astro", GROUP)
        self.ok("user", "add", "astro", "bob@example.edu")
        self.ok("user", "block", "carol@example.edu", "--reason", "left", "-y")
        self.ok("site", "add", "--file", str(folder / "anvil.yaml"))
        self.ok("model", "add", "gpt2", "--source", "/models/gpt2", "--context-tokens", "1024")
        self.ok("key", "add", "astro", "--scope", "site", "--site", "anvil", "--label", "agent")
        self.ok("alloc", "add", "astro", "--su", "10")
        self.ok("rate", "add", "gpt2", "anvil", "--prompt", "1", "--output", "2")
        with Database(self.url) as database:
            self.instance = Catalog(database).add_launch("anvil", "gpt2")[0].instance
        (self.key,) = self.json("key", "show")
        self.ok("limit", "add", f"key:{self.key['id']}", "--requests", "5")

    def contents(self) -> list[str]:
        with sqlite3.connect(self.path) as connection:
            return list(connection.iterdump())

    def filled(self, args: str) -> list[str]:
        return shlex.split(args.format(key=self.key["id"], instance=self.instance, group=GROUP))


@pytest.fixture
def admin(tmp_path: Path) -> Furnished:
    return Furnished(tmp_path)


@pytest.mark.parametrize("leaf", COMMANDS, ids=named)
def test_help_teaches_by_examples_that_are_understood(
    leaf: Leaf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("anvil.yaml", "anvil.key", "jobs.txt"):
        Path(name).touch()
    path, _ = leaf
    text = CliRunner().invoke(fabric_admin, [*path, "--help"]).stdout
    assert max(map(len, text.splitlines())) <= 80
    examples = re.findall(
        r"(?<=\s)fabric-admin ([^>|()]+?)(?: +[>|)]|\n)", text.split("Example")[1]
    )
    assert examples
    for example in examples:
        ctx = click.Context(fabric_admin, info_name="fabric-admin")
        words, command = shlex.split(example), fabric_admin
        while isinstance(command, click.Group):
            inner = command.get_command(ctx, words[0])
            assert inner is not None, example
            command, words = inner, words[1:]
        with command.make_context("example", words, parent=ctx):
            pass
        assert example.startswith(path[0])


CHANGES = (
    "project add bio --title Biology",
    "project modify astro --title Stars",
    "project modify astro --site anvil",
    "project delete astro -y",
    "project group add astro 00000000-085c-11e6-a7a5-22000bf2d559",
    "project group delete astro {group} -y",
    "user add astro alice@example.edu",
    "user modify astro bob@example.edu --scope launch",
    "user delete astro bob@example.edu -y",
    "user block alice@example.edu -y",
    "user unblock carol@example.edu -y",
    "site add polaris",
    "site modify anvil --state disabled",
    "maintenance add anvil --from 2999-01-01 --until 2999-01-02",
    "site delete anvil -y",
    "model add gpt2 --revision 2 --source /models/new --context-tokens 1024",
    "model modify gpt2@1 --dtype float32",
    "model delete gpt2@1 -y",
    "key add astro --label laptop",
    "key modify {key} --max-concurrent 3",
    "key delete {key} -y",
    "replica delete {instance} -y",
    "grant add project:astro --model gpt2",
    "grant close model gpt2",
    "limit add project:astro --requests 5",
    "limit delete key:{key} -y",
    "alloc add astro --site anvil --su 2",
    "alloc modify astro --su 2",
    "alloc delete astro -y",
    "alloc share astro {key} --su 1",
    "rate add * * --prompt 1 --output 2",
    "rate modify gpt2 anvil --output 3",
    "rate unit add node-hour --su 2",
)


@pytest.mark.parametrize("change", CHANGES)
def test_a_dry_run_says_what_would_change_and_changes_nothing(
    admin: Furnished, change: str
) -> None:
    before, args = admin.contents(), admin.filled(change)
    told = admin.ok(*args, "--dry-run")
    assert "Nothing was changed: this was a dry run." in told.stderr
    assert admin.json(*args, "--dry-run")
    assert admin.contents() == before
    assert "dry run" not in admin.ok(*args).stderr
    assert admin.contents() != before


def test_a_dry_run_tells_fields_before_and_after(admin: Furnished) -> None:
    told = admin.json("site", "modify", "anvil", "--state", "disabled", "--dry-run")
    assert told["changes"] == {"state": {"from": "enabled", "to": "disabled"}}
    assert told["record"]["state"] == "disabled"
    text = admin.ok("site", "modify", "anvil", "--state", "disabled").stderr
    assert "state: enabled -> disabled" in text
    again = admin.ok("site", "modify", "anvil", "--state", "disabled").stderr
    assert "is like that already" in again


def test_a_dry_run_is_refused_what_would_be_refused(admin: Furnished) -> None:
    for args in (
        ["project", "delete", "nope", "--dry-run"],
        ["model", "add", "gpt2", "--source", "/other", "--context-tokens", "1024", "--dry-run"],
    ):
        refused = admin.run(*args)
        assert refused.exit_code == 3
        assert refused.stderr.startswith("Error: ")


def test_a_dry_run_prints_no_key_that_will_not_work(admin: Furnished) -> None:
    told = admin.ok("key", "add", "astro", "--dry-run")
    assert told.stdout == ""
    assert "fab_" not in admin.ok("key", "add", "astro", "--dry-run", "--format", "json").stdout


def test_a_dry_run_leaves_a_new_database_without_tables(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'new.db'}"
    args = ["project", "add", "astro", "--dry-run", "--database", url]
    assert CliRunner().invoke(fabric_admin, args).exit_code == 0
    with sqlite3.connect(tmp_path / "new.db") as connection:
        assert connection.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)


@pytest.mark.parametrize(
    ("again", "other"),
    [
        ("project add astro", "project add astro --title Astrology"),
        ("project group add astro {group}", "project group add astro {group} --scope admin"),
        ("user add astro BOB@example.edu", "user add astro bob@example.edu --scope admin"),
        ("user block Carol@example.edu -y", "user block carol@example.edu -y --reason other"),
        ("site add anvil", "site add anvil --display Other"),
        (
            "model add gpt2 --source /models/gpt2 --context-tokens 1024",
            "model add gpt2 --source /models/gpt2 --context-tokens 2048",
        ),
    ],
)
def test_what_is_there_is_added_again_without_harm_unless_it_differs(
    admin: Furnished, again: str, other: str
) -> None:
    before = admin.contents()
    assert "is like that already" in admin.ok(*admin.filled(again)).stderr
    admin.json(*admin.filled(again))
    refused = admin.run(*admin.filled(other), "--format", "json")
    assert refused.exit_code == 3
    assert json.loads(refused.stderr)["error"]["code"] == "already_exists"
    assert admin.contents() == before


def test_tables_fit_eighty_columns(admin: Furnished) -> None:
    for noun in ("site", "endpoint", "model", "replica", "project", "key", "limit", "function"):
        lines = admin.ok(noun, "show").stdout.splitlines()
        assert noun == "function" or len(lines) > 1
        assert max(map(len, lines), default=0) <= 80, noun
    assert max(map(len, admin.ok("project", "group", "show").stdout.splitlines())) <= 80
    tiers = admin.ok("tier", "show").stdout.splitlines()
    assert max(map(len, tiers)) <= 80
    shown = {line.split()[0]: line.split()[1] for line in tiers[1:]}
    assert shown == {
        "interactive": "1.5",
        "standard": "1",
        "introspection": "as",
        "batch": "0.5",
    }


LISTS = (
    *("site show", "endpoint show", "model show", "replica show", "project show"),
    *("user show --added", "user show --blocked", "key show", "grant show", "limit show"),
    *("audit show", "alloc show", "alloc statement " + "physics-" * 7, "rate show", "tier show"),
    *("rate unit show", "maintenance show", "project group show"),
)


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Furnished:
    """A database in which everything has a long name."""
    admin = Furnished(tmp_path_factory.mktemp("crowded"))
    project, site, model = "physics-" * 7, "s" * 30, "llama-3-70b-instruct"
    person = "firstname.lastname@department.university.edu"
    prices = [word for price in PRICES for word in (price, "123.456789")]
    for words in (
        ["project", "add", project, "--title", "A very long title of a very large group " * 3],
        ["project", "group", "add", project, GROUP, "--scope", "launch", "--scope", "query"],
        ["user", "add", project, person, "--scope", "launch", "--scope", "query"],
        ["user", "block", person, "--reason", "a laptop that was stolen " * 4, "-y"],
        ["site", "add", site],
        ["model", "add", model, "--source", "/" + "folder/" * 12, "--context-tokens", "131072"],
        ["key", "add", project, "--label", "a label that says very much"],
        ["alloc", "add", project, "--site", site, "--period", "2027-first-half", "--su", "1000000"],
        ["alloc", "add", project, "--su", "1000000", "--ends", "2999-01-01"],
        ["alloc", "share", project, f"globus:{GROUP}", "--su", "10"],
        ["rate", "add", model, site, *prices],
        ["rate", "unit", "add", "node-hour-of-the-large-memory-partition", "--su", "2.5"],
        ["grant", "add", f"user:{person}", "--model", model, "--site", site],
        ["limit", "add", f"user:{person}", "--requests", "600", "--tokens", "1000000"],
        ["maintenance", "add", site, "--from", "2999-01-01", "--until", "2999-01-02"],
    ):
        admin.ok(*words)
    return admin


@pytest.mark.parametrize("words", LISTS)
def test_a_terminal_of_eighty_columns_shows_all_of_a_table(
    crowded: Furnished, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, *rows = crowded.ok(*words.split()).stdout.removeprefix("SU per million\n").splitlines()
    assert rows
    monkeypatch.setattr(Output, "is_terminal", True)
    for name, value in (("COLUMNS", "80"), ("TERM", "dumb")):
        monkeypatch.setenv(name, value)
    told = crowded.ok(*words.split()).stdout
    assert "…" not in told
    assert not Counter(re.findall(r"\w", "".join(rows))) - Counter(told), told
    if "──" in told:  # else each row is a block of lines
        assert max(map(len, told.splitlines())) <= 80


def test_one_record_is_shown_whole(admin: Furnished) -> None:
    told = admin.ok("site", "show", "anvil").stdout
    assert ENDPOINT in told
    assert admin.instance in admin.ok("replica", "show", admin.instance).stdout
    assert admin.run("replica", "show", "inst_none").exit_code == 3


def test_a_site_is_told_its_changed_file(admin: Furnished, tmp_path: Path) -> None:
    file = tmp_path / "anvil.yaml"
    file.write_text(ANVIL.replace("title: Anvil", "title: Anvil, GPU nodes"))
    changed = admin.json("site", "modify", "anvil", "--file", str(file))
    assert changed["facts"]["title"] == changed["display"] == "Anvil, GPU nodes"
    file.write_text(ANVIL.replace("anvil", "bridges"))
    refused = admin.run("site", "modify", "anvil", "--file", str(file))
    assert refused.exit_code == 3
    assert "'bridges'" in refused.stderr


def test_users_are_those_who_asked_the_latest_first(admin: Furnished) -> None:
    made = datetime(2030, 1, 1, tzinfo=UTC)
    asked = [("5b1e0c7a94d2", 0), ("globus:6c91e6eb-085c-11e6-a7a5-22000bf2d559", 1)]
    with Database(admin.url) as database:
        for key_id, hours in [*asked, asked[0]]:
            run = RunRecord(
                id=new_id("run"),
                project="astro",
                key_id=key_id,
                model="gpt2@1",
                state=RunState.COMPLETED,
                charge_usu=1_500_000,
                created_at=made + timedelta(hours=hours),
            )
            Catalog(database).record_runs([run])
        Users(database).note_login(asked[1][0].removeprefix("globus:"), "alice@example.edu")
    person, key = admin.json("user", "show", "--project", "astro")
    assert (person["key_id"], person["num_runs"]) == (asked[1][0], 1)
    assert (person["name"], person["blocked"]) == ("alice@example.edu", False)
    assert (key["num_runs"], key["charge_usu"], key["name"]) == (2, 3_000_000, "")
    later = admin.json("user", "show", "--since", "2030-01-01T00:30:00")
    assert [one["key_id"] for one in later] == [asked[1][0]]
    admin.ok("user", "block", "alice@example.edu", "-y")
    table = admin.ok("user", "show").stdout
    assert "3.000000" in table
    assert re.search(r"alice@example\.edu .* blocked$", table, re.M)
    assert max(map(len, table.splitlines())) <= 80
    assert admin.run("user", "show", "--project", "nope").exit_code == 3


def test_a_replica_that_was_ended_may_not_come_back(admin: Furnished) -> None:
    ended = admin.json("replica", "delete", admin.instance, "-y", "--reason", "wrong weights")
    assert admin.json("audit", "show", "--limit", "1")[0]["what"] == "replica delete"
    assert (ended["state"], ended["ended_reason"]) == ("stopped", "wrong weights")
    assert admin.json("replica", "show") == []
    assert [one["instance"] for one in admin.json("replica", "show", "--all")] == [admin.instance]


def test_bash_completes_nouns_verbs_and_options() -> None:
    def complete(*words: str) -> list[str]:
        script = (
            'eval "$(fabric-admin completion bash)"\n'
            f"COMP_WORDS=(fabric-admin {' '.join(words)}) COMP_CWORD={len(words)}\n"
            'eval "$(complete -p fabric-admin | sed -E "s/.*-F ([^ ]+) .*/\\1/")" fabric-admin\n'
            'printf "%s\\n" "${COMPREPLY[@]}"\n'
        )
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-c", script],
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    assert complete("pro") == ["project"]
    assert complete("project", "mod") == ["modify"]
    assert complete("project", "modify", "--dr") == ["--dry-run"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_are_given_what_they_evaluate(shell: str) -> None:
    done = CliRunner().invoke(fabric_admin, ["completion", shell], prog_name="fabric-admin")
    assert f"_FABRIC_ADMIN_COMPLETE={shell}_complete" in done.stdout
