"""``fabric-admin grant|limit|audit``, and the entry that every command leaves which changes
something."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from fastapi.routing import APIRoute

from fabric.cli.main import fabric_admin
from fabric.gateway.access import Needs, declarations
from fabric.gateway.app import ROUTERS
from fabric.testing.admin import Admin

GROUP = "6c91e6eb-085c-11e6-a7a5-22000bf2d559"


@pytest.fixture
def admin(admin: Admin) -> Admin:
    admin.ok("project", "add", "astro")
    return admin


# ---- grants --------------------------------------------------------------------------------------


def test_a_grant_is_added_shown_changed_and_taken_back(admin: Admin) -> None:
    made = admin.json("grant", "add", "project:astro", "--model", "llama", "--mode", "query")
    assert (made["subject"], made["model"], made["site"]) == ("project:astro", "llama", None)
    assert made["modes"] == ["query"]
    assert admin.json("grant", "show") == [made]
    shown = admin.ok("grant", "show")
    assert made["id"] in shown.stdout
    assert "Private: model llama." in shown.stderr
    assert max(map(len, shown.stdout.splitlines())) <= 80
    again = ["grant", "add", "project:astro", "--model", "llama"]
    assert "like that already" in admin.ok(*again, "--mode", "query").stderr
    assert admin.run(*again, "--mode", "embed").exit_code == 3
    changed = admin.json("grant", "modify", made["id"], "--tier", "batch", "--mode", "embed")
    assert (changed["modes"], changed["tiers"]) == (["embed"], ["batch"])
    assert admin.json("grant", "show", made["id"]) == changed
    assert admin.run("grant", "delete", made["id"]).exit_code == 3
    admin.ok("grant", "delete", made["id"], "-y")
    assert admin.json("grant", "show") == []
    assert "Private: model llama." in admin.ok("grant", "show").stderr


def test_what_is_private_is_opened_only_when_asked_for(admin: Admin) -> None:
    admin.ok("grant", "close", "site", "alpha")
    assert admin.run("grant", "open", "site", "alpha").exit_code == 3
    assert "site alpha" in admin.ok("grant", "show").stderr
    admin.ok("grant", "open", "site", "alpha", "-y")
    assert "Private: nothing." in admin.ok("grant", "show").stderr
    assert admin.run("grant", "open", "site", "alpha", "-y").exit_code == 3


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["add", "astro", "--model", "llama"], 3),
        (["add", "project:absent", "--model", "llama"], 3),
        (["add", "project:astro"], 3),
        (["add", "project:astro", "--model", "llama@1"], 3),
        (["add", "project:astro", "--model", "llama", "--mode", "fly"], 2),
        (["add", "project:astro", "--model", "llama", "--tier", "now"], 2),
        (["modify", "absent", "--mode", "query"], 3),
        (["delete", "absent", "-y"], 3),
        (["close", "project", "astro"], 2),
    ],
)
def test_what_cannot_be_granted_changes_nothing(admin: Admin, args: list[str], code: int) -> None:
    refused = admin.run("grant", *args)
    assert refused.exit_code == code, refused.stderr
    assert admin.json("grant", "show") == []
    assert admin.json("audit", "verify")["entries"] == 1


# ---- limits --------------------------------------------------------------------------------------


def test_a_person_is_let_in_and_kept_out(admin: Admin) -> None:
    admin.json("project", "add", "astro")
    added = admin.json("user", "add", "astro", "Alice@Example.edu", "--scope", "launch")
    assert (added["user"], added["scopes"]) == ("alice@example.edu", ["launch"])
    assert "alice@example.edu" in admin.ok("user", "show", "--added").stdout
    changed = admin.json("user", "modify", "astro", "alice@example.edu", "--max-concurrent", "8")
    assert admin.json("user", "show", "--added", "--project", "astro") == [changed]
    asked = admin.run("user", "block", "alice@example.edu")
    assert (asked.exit_code, "-y does it" in asked.stderr) == (3, True)
    admin.ok("user", "block", "alice@example.edu", "--reason", "a stolen laptop", "-y")
    assert "a stolen laptop" in admin.ok("user", "show", "--blocked").stdout
    admin.ok("user", "unblock", "alice@example.edu", "-y")
    assert "Nobody is kept out." in admin.ok("user", "show", "--blocked").stderr
    admin.ok("user", "delete", "astro", "alice@example.edu", "-y")
    assert admin.json("user", "show", "--added") == []
    assert admin.run("user", "show", "--added", "--blocked").exit_code == 2
    assert "NAME@DOMAIN" in admin.run("user", "add", "astro", "alice").stderr


def test_a_limit_is_added_shown_changed_and_taken_away(admin: Admin) -> None:
    made = admin.json("limit", "add", "project:astro", "--requests", "60", "--tokens", "1000")
    assert (made["requests_per_min"], made["tokens_per_min"]) == (60, 1000)
    assert admin.run("limit", "add", "project:astro", "--requests", "9").exit_code == 3
    again = admin.ok("limit", "add", "project:astro", "--requests", "60")
    assert "like that already" in again.stderr
    changed = admin.json("limit", "modify", "project:astro", "--concurrent", "4")
    assert changed == made | {"max_concurrent": 4}
    assert admin.json("limit", "show", "project:astro") == changed
    assert "1000" in admin.ok("limit", "show").stdout
    admin.ok("limit", "delete", "project:astro", "-y")
    assert admin.json("limit", "show") == []
    for verb in ("show", "modify", "delete"):
        yes = ["-y"] if verb == "delete" else []
        assert admin.run("limit", verb, "project:astro", *yes).exit_code == 3


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["project:astro"], 3),
        (["project:astro", "--requests", "0"], 2),
        (["project:astro", "--requests", "x"], 2),
        (["project:astro", "--tokens", "9" * 30], 3),
        (["*", "--requests", "1"], 3),
        (["group:*", "--requests", "1"], 3),
    ],
)
def test_what_is_no_limit_is_refused(admin: Admin, args: list[str], code: int) -> None:
    assert admin.run("limit", "add", *args).exit_code == code
    assert admin.json("limit", "show") == []


# ---- tiers ---------------------------------------------------------------------------------------


def test_a_tier_is_changed_shown_and_reset(admin: Admin) -> None:
    released = admin.json("tier", "show")
    assert [one["tier"] for one in released if one["changed"]] == []
    before = next(one for one in released if one["tier"] == "interactive")
    tried = admin.json("tier", "modify", "interactive", "--first-token", "1", "--dry-run")
    assert tried["changes"]["first_token_s"] == {"from": 2.0, "to": 1.0}
    assert admin.json("tier", "show") == released
    changed = admin.json("tier", "modify", "interactive", "--charge-factor", "2.25")
    assert changed == before | {"charge_factor": "2.25", "changed": ["charge_factor"]}
    again = admin.json("tier", "modify", "interactive", "--first-token", "1", "--answered", "0.9")
    assert again["changed"] == ["charge_factor", "first_token_s", "share_answered"]
    assert (again["first_token_s"], again["admit_s"]) == (1.0, 1.0)
    assert admin.json("tier", "show", "interactive") == again
    assert "changed" in admin.ok("tier", "show").stdout
    assert admin.run("tier", "delete", "interactive").exit_code == 3
    admin.ok("tier", "delete", "interactive", "-y")
    assert admin.json("tier", "show") == released
    assert admin.run("tier", "delete", "interactive", "-y").exit_code == 3


@pytest.mark.parametrize(
    ("args", "code", "told"),
    [
        (["standard"], 3, "--charge-factor, --weight"),
        (["standard", "--charge-factor", "nan"], 3, "1000"),
        (["standard", "--charge-factor", "0"], 3, "1000"),
        (["standard", "--charge-factor", "1e300"], 3, "1000"),
        (["standard", "--charge-factor", "0.12345678"], 3, "six decimal places"),
        (["standard", "--weight", "-1"], 3, "from 0.001"),
        (["standard", "--weight", "many"], 2, "many"),
        (["standard", "--first-token", "inf"], 3, "86400"),
        (["standard", "--in-time", "1"], 3, "0.9999"),
        (["batch", "--weight", "1"], 3, "--weight"),
        (["batch", "--first-token", "1"], 3, "--first-token"),
        (["introspection", "--charge-factor", "2"], 3, "--charge-factor"),
        (["urgent", "--weight", "1"], 2, "urgent"),
    ],
)
def test_what_is_no_parameter_of_a_tier_changes_nothing(
    admin: Admin, args: list[str], code: int, told: str
) -> None:
    refused = admin.run("tier", "modify", *args)
    assert refused.exit_code == code, refused.stderr
    assert told in refused.stderr
    assert not any(one["changed"] for one in admin.json("tier", "show"))


# ---- the audit log -------------------------------------------------------------------------------


def test_the_log_says_who_did_what(admin: Admin) -> None:
    made = admin.json("key", "add", "astro", "--label", "laptop")
    [entry, first] = admin.json("audit", "show")
    assert (first["what"], entry["what"]) == ("project add", "key add")
    assert entry["who"].startswith("cli:")
    [row] = entry["after"]
    assert (row["table"], row["id"], row["label"]) == ("api_keys", made["id"], "laptop")
    assert made["key"] not in json.dumps(entry)
    shown = admin.ok("audit", "show", "--limit", "1").stdout
    assert "key add" in shown
    assert "+api_keys" in shown
    assert admin.json("audit", "show", "--since", "2999-01-01") == []


def test_a_check_of_the_log_is_compared_with_an_earlier_one(admin: Admin) -> None:
    noted = admin.ok("audit", "verify").stdout.strip()
    admin.ok("project", "modify", "astro", "--title", "Stars")
    assert admin.json("audit", "verify", "--noted", noted)["entries"] == 2
    broken = admin.run("audit", "verify", "--noted", "0123" * 16)
    assert broken.exit_code == 1
    assert "0123" * 16 in broken.stderr
    mistyped = admin.run("audit", "verify", "--noted", noted[:8])
    assert (mistyped.exit_code, "not a whole hash" in mistyped.stderr) == (3, True)


# Each command that works on the database, in an order in which they all can; ``...`` is what the
# command before it has printed as the id of what it made.
CHANGES: list[tuple[str, list[str]]] = [
    ("project add", ["bio"]),
    ("project modify", ["bio", "--title", "Biology"]),
    ("project group add", ["bio", GROUP]),
    ("project group delete", ["bio", GROUP, "-y"]),
    ("user add", ["bio", "alice@example.edu"]),
    ("user modify", ["bio", "alice@example.edu", "--max-concurrent", "3"]),
    ("user delete", ["bio", "alice@example.edu", "-y"]),
    ("user block", ["alice@example.edu", "-y"]),
    ("user unblock", ["alice@example.edu", "-y"]),
    ("site add", ["alpha"]),
    ("site modify", ["alpha", "--state", "disabled"]),
    ("maintenance add", ["alpha", "--from", "2999-01-01", "--until", "2999-01-02"]),
    ("maintenance modify", ["alpha", "...", "--until", "2999-01-03"]),
    ("maintenance delete", ["alpha", "...", "-y"]),
    ("model add", ["toy", "--source", "x:y", "--context-tokens", "512"]),
    ("model modify", ["toy", "--context-tokens", "99"]),
    ("rate add", ["*", "*", "--prompt", "1", "--output", "2"]),
    ("rate modify", ["*", "*", "--output", "3", "--from", "2999-01-01"]),
    ("rate delete", ["*", "*", "--from", "2999-01-01", "-y"]),
    ("rate unit add", ["node-hour", "--su", "2"]),
    ("alloc add", ["bio", "--su", "2"]),
    ("alloc modify", ["bio", "--su", "1"]),
    ("alloc share", ["bio", "globus:" + GROUP, "--su", "1"]),
    ("alloc add", ["bio", "--site", "alpha", "--su", "1"]),
    ("alloc exchange", ["bio", "--to", "alpha", "--su", "0.5"]),
    ("alloc delete", ["bio", "-y"]),
    ("key add", ["bio"]),
    ("key modify", ["...", "--label", "new"]),
    ("key delete", ["...", "-y"]),
    ("grant add", ["project:bio", "--model", "toy"]),
    ("grant modify", ["...", "--mode", "query"]),
    ("grant delete", ["...", "-y"]),
    ("grant open", ["model", "toy", "-y"]),
    ("grant close", ["model", "toy"]),
    ("limit add", ["project:bio", "--requests", "5"]),
    ("limit modify", ["project:bio", "--requests", "6"]),
    ("limit delete", ["project:bio", "-y"]),
    ("tier modify", ["interactive", "--weight", "5"]),
    ("tier delete", ["interactive", "-y"]),
    ("model delete", ["toy", "-y"]),
    ("site delete", ["alpha", "-y"]),
    ("project delete", ["bio", "-y"]),
]
ELSEWHERE = {
    # They read, or change files, endpoints and the Globus service, not the hub's database.
    *("hub", "site validate", "site list-shipped", "site run", "site show", "alloc balance"),
    *("endpoint render", "endpoint check", "endpoint install", "db migrate", "db verify"),
    *("model show", "function show", "project show", "project group show"),
    *("key show", "grant show", "limit show", "audit show", "audit verify", "alloc show"),
    *("rate show", "rate unit show", "alloc statement", "endpoint show", "replica show"),
    *("maintenance show", "user show", "tier show", "doctor", "completion"),
}
NEED_MORE = {
    # They change what no command makes: launches, charges of runs and of jobs, what is stored.
    *("replica delete", "alloc refund", "alloc rent", "rate measure", "reconcile"),
}
ONLY_WITH_GLOBUS = {
    # They write what the service answered; tests/integration/test_registered_functions.py runs
    # them.
    *("function add", "function delete"),
}


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[str]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield " ".join((*path, name))


def test_every_command_is_known_to_change_something_or_not_to() -> None:
    told = {command for command, _ in CHANGES} | ELSEWHERE | NEED_MORE | ONLY_WITH_GLOBUS
    assert set(commands(fabric_admin)) == told


def test_every_command_that_changes_something_is_in_the_log(tmp_path: Path) -> None:
    admin, made, seq = Admin(f"sqlite:///{tmp_path / 'all.db'}"), "", 0
    for command, args in CHANGES:
        filled = [made if arg == "..." else arg for arg in args]
        printed = admin.json(*command.split(), *filled)
        if isinstance(printed, dict):
            made = str(printed.get("id", made))
        [latest] = admin.json("audit", "show", "--limit", "1")
        assert latest["what"] == command
        assert latest["seq"] > seq
        assert latest["before"] or latest["after"]
        seq = latest["seq"]
    assert admin.json("audit", "verify")["entries"] == seq


def test_no_route_lets_administrators_change_something_unlogged() -> None:
    """There is none: administrators work on the database. One that comes must write the log."""
    unlogged = [
        route.path
        for router in ROUTERS
        for route in router.routes
        if isinstance(route, APIRoute)
        and isinstance(needs := declarations(route)[0], Needs)
        and needs.scope == "admin"
        and route.methods - {"GET", "HEAD"}
    ]
    assert unlogged == []
