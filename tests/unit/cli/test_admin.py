"""Administrators' commands on a real database."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from fabric.auth import Keys
from fabric.cli.main import fabric_admin
from fabric.sql import Database
from fabric.testing.admin import Admin


@pytest.fixture
def project(admin: Admin) -> str:
    admin.ok("project", "add", "astro", "--title", "Astronomy")
    return "astro"


def test_a_key_is_shown_once_and_works(admin: Admin, project: str) -> None:
    secret = admin.ok("key", "add", project, "--label", "laptop").stdout.strip()
    with Database(admin.url) as database:
        identity = Keys(database).authenticate(secret)
    assert (identity.project, identity.scopes) == ("astro", {"query"})
    assert secret not in admin.ok("key", "show").stdout
    assert secret not in admin.ok("key", "show", "--format", "json").stdout


def test_a_key_can_be_limited_and_revoked(admin: Admin, project: str) -> None:
    options = ["--max-concurrent", "2", "--expires", "2030-01-01"]
    key = admin.json("key", "add", project, *options)
    assert (key["max_concurrent"], key["expires_at"]) == (2, "2030-01-01T00:00:00+00:00")
    assert admin.json("key", "modify", key["id"], "--label", "new")["label"] == "new"
    admin.ok("key", "delete", key["id"], "-y")
    assert admin.json("key", "show", key["id"])["revoked_at"] is not None


def test_an_agents_key_needs_a_site_that_exists(admin: Admin, project: str) -> None:
    options = ["key", "add", project, "--scope", "site", "--site", "alpha"]
    refused = admin.run(*options)
    assert (refused.exit_code, refused.stdout) == (3, "")
    assert "The site 'alpha' is not in the catalog" in refused.stderr
    admin.ok("site", "add", "alpha")
    assert admin.json(*options)["site"] == "alpha"


@pytest.mark.parametrize(
    "command",
    [
        ("alloc", "add", "astro", "--su", "1", "--ends", "2020-01-01"),
        ("alloc", "modify", "astro", "--ends", "2020-01-01"),
        ("key", "add", "astro", "--expires", "2020-01-01"),
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_an_end_that_is_over_is_refused(
    admin: Admin, project: str, command: tuple[str, ...]
) -> None:
    refused = admin.run(*command)
    assert refused.exit_code == 3
    assert "'2020-01-01T00:00:00+00:00': it is over" in refused.stderr
    assert admin.json("alloc", "show") == admin.json("key", "show", "--project", project) == []


def test_a_key_cannot_end_in_the_past(admin: Admin, project: str) -> None:
    key = admin.json("key", "add", project)
    refused = admin.run("key", "modify", key["id"], "--expires", "2020-01-01")
    assert (refused.exit_code, "it is over" in refused.stderr) == (3, True)
    assert admin.json("key", "show", key["id"])["expires_at"] is None


def test_an_allocation_is_not_changed_by_nothing(admin: Admin, project: str) -> None:
    admin.ok("alloc", "add", project, "--su", "10")
    refused = admin.run("alloc", "modify", project)
    assert refused.exit_code == 3
    assert "--su, --amount, --starts, --ends" in refused.stderr


def test_prices_and_grants_of_what_is_not_there_are_told(admin: Admin, project: str) -> None:
    prices = ("--prompt", "1", "--output", "2")
    told = admin.ok("rate", "add", "smol@1", "gamma", *prices).stderr
    assert "There is no model 'smol@1' yet" in told
    assert "There is no site 'gamma' yet" in told
    assert "There is no" not in admin.ok("rate", "add", "*", "*", *prices).stderr
    grant = ("grant", "add", f"project:{project}", "--site")
    assert "There is no site 'gamma' yet" in admin.ok(*grant, "gamma").stderr
    admin.ok("site", "add", "alpha")
    assert "There is no" not in admin.ok(*grant, "alpha").stderr


def test_a_site_file_that_is_not_there_is_told_so(admin: Admin, tmp_path: Path) -> None:
    admin.ok("site", "add", "alpha")
    refused = admin.run("site", "modify", "alpha", "--file", str(tmp_path / "none.yaml"))
    assert refused.exit_code == 3
    assert "there is no such file" in refused.stderr
    assert "YAML" not in refused.stderr


def test_grants_are_exact_to_the_micro_su(admin: Admin, project: str) -> None:
    admin.ok("alloc", "add", project, "--su", "10")
    admin.ok("alloc", "modify", project, "--su", "0.000001")
    admin.ok("alloc", "modify", project, "--su", "-3")
    (allocation,) = admin.json("alloc", "show")
    assert allocation["available_usu"] == 7_000_001
    assert "7.000001" in admin.ok("alloc", "show").stdout
    admin.ok("db", "verify")


def test_more_than_there_is_cannot_be_taken_back(admin: Admin, project: str) -> None:
    admin.ok("alloc", "add", project, "--su", "1")
    refused = admin.run("alloc", "modify", project, "--su", "-2")
    assert refused.exit_code == 3
    assert "only 1.000000 SU are not held or spent" in refused.stderr
    assert admin.json("alloc", "show")[0]["available_usu"] == 1_000_000


def test_a_grant_that_fails_leaves_no_allocation(admin: Admin, project: str) -> None:
    assert admin.run("alloc", "add", project, "--su", "0").exit_code == 3
    assert admin.json("alloc", "show") == []


def test_an_allocation_is_for_a_project_and_a_site_that_exist(admin: Admin, project: str) -> None:
    assert "no project 'nope'" in admin.run("alloc", "add", "nope", "--su", "1").stderr
    refused = admin.run("alloc", "add", project, "--site", "nowhere", "--su", "1")
    assert "The site 'nowhere' is not in the catalog" in refused.stderr
    assert admin.run("alloc", "modify", project, "--su", "1").exit_code == 3


def test_a_closed_allocation_is_empty_and_over(admin: Admin, project: str) -> None:
    admin.ok("alloc", "add", project, "--su", "5", "--ends", "2999-01-01")
    admin.ok("alloc", "delete", project, "-y")
    (allocation,) = admin.json("alloc", "show")
    assert allocation["available_usu"] == 0
    assert allocation["ends_at"] < "2999"
    assert "closed" in admin.ok("alloc", "show").stdout


def test_prices_are_those_of_the_closest_match(admin: Admin) -> None:
    admin.ok("site", "add", "alpha")
    admin.ok("site", "add", "beta")
    admin.ok("model", "add", "toy", "--source", "x:y", "--context-tokens", "512")
    admin.ok("rate", "add", "*", "*", "--prompt", "10", "--cached-prompt", "1", "--output", "40")
    admin.ok("rate", "add", "*", "beta", "--prompt", "0.25", "--output", "0.5")
    rates = {entry["site"]: entry["rate"] for entry in admin.json("rate", "show")}
    assert (rates["alpha"]["prompt_usu"], rates["alpha"]["cached_prompt_usu"]) == ("10", "1")
    assert (rates["beta"]["prompt_usu"], rates["beta"]["cached_prompt_usu"]) == ("0.25", "0.25")
    assert "* at beta" in admin.ok("rate", "show").stdout
    programs = ("--hook-in", "0.001", "--hook-out", "0.01", "--device", "1000")
    admin.ok("rate", "add", "*", "alpha", "--prompt", "1", "--output", "2", *programs)
    (found,) = admin.json("rate", "show", "--site", "alpha")
    priced = [found["rate"][name] for name in ("hook_in_usu", "hook_out_usu", "device_usu")]
    assert priced == ["0.001", "0.01", "1000"]


def test_a_missing_price_is_told(admin: Admin) -> None:
    assert "There is no price for * at *." in admin.ok("rate", "show").stderr


def test_sites_are_changed_and_read_from_files(admin: Admin, tmp_path: Path) -> None:
    file = tmp_path / "gamma.yaml"
    file.write_text("name: gamma\ntitle: Centre G\n")
    admin.ok("site", "add", "--file", str(file))
    gamma = admin.json("site", "show", "gamma")
    assert gamma["display"] == "Centre G"
    assert admin.json("site", "modify", "gamma", "--state", "disabled")["state"] == "disabled"
    file.write_text("name: [")
    assert admin.run("site", "add", "--file", str(file)).exit_code == 3
    assert admin.run("site", "add").exit_code == 2


def test_models_have_versions(admin: Admin) -> None:
    for revision in ("1", "2"):
        options = ["--revision", revision, "--source", "x:y", "--context-tokens", "512"]
        admin.ok("model", "add", "toy", *options)
    assert admin.json("model", "show", "toy")["revision"] == "2"
    assert admin.json("model", "modify", "toy@1", "--context-tokens", "99")["context_tokens"] == 99
    assert admin.run("model", "delete", "toy", "-y").exit_code == 3
    admin.ok("model", "delete", "toy@2", "-y")
    assert admin.json("model", "show", "toy")["revision"] == "1"


@pytest.mark.parametrize(
    "made",
    [["project", "add", "astro"], ["site", "add", "alpha"]],
)
def test_nothing_is_deleted_unasked(admin: Admin, made: list[str]) -> None:
    admin.ok(*made)
    noun, _, name = made
    refused = admin.run(noun, "delete", name)
    assert refused.exit_code == 3
    assert "Nothing was changed; -y does it without asking." in refused.stderr
    assert admin.json(noun, "show", name)["name"] == name
    admin.ok(noun, "delete", name, "-y")
    assert admin.run(noun, "show", name).exit_code == 3


def test_a_database_that_cannot_be_used_names_the_setting(tmp_path: Path) -> None:
    for url in ("nonsense", f"sqlite:///{tmp_path}/none/hub.db", "mysql://x/y"):
        refused = Admin(url).run("db", "verify")
        assert refused.exit_code == 3
        assert "hub.database_url" in refused.stderr


def test_without_a_database_the_state_directorys_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FABRIC_STATE_DIR", str(tmp_path / "state"))
    done = CliRunner().invoke(fabric_admin, ["project", "add", "astro"])
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "state/fabric.db").stat().st_mode & 0o077 == 0


def test_groups_of_a_project_are_kept(admin: Admin, project: str) -> None:
    group = "6c91e6eb-085c-11e6-a7a5-22000bf2d559"
    added = admin.json("project", "group", "add", project, group, "--max-concurrent", "2")
    assert (added["group_id"], added["project"], added["scopes"]) == (group, project, ["query"])
    assert admin.json("project", "group", "show", project) == [added]
    shown = admin.ok("project", "group", "show").stdout
    assert group in shown
    assert admin.json("project", "group", "add", project, group) == added
    assert admin.run("project", "group", "add", project, "physicists").exit_code == 3
    assert admin.run("project", "group", "add", "absent", group).exit_code == 3
    assert admin.run("project", "group", "add", project, group, "--scope", "site").exit_code == 2
    assert admin.run("project", "group", "delete", project, group).exit_code == 3
    admin.ok("project", "group", "delete", project, group, "-y")
    assert admin.json("project", "group", "show") == []
    assert admin.run("project", "group", "delete", project, group, "-y").exit_code == 3


def test_a_project_is_kept_at_sites(admin: Admin) -> None:
    admin.ok("site", "add", "alpha")
    admin.ok("project", "add", "clinic", "--site", "alpha")
    changed = admin.ok("project", "modify", "clinic", "--site", "alpha", "--site", "beta")
    assert "sites: alpha -> alpha beta" in changed.stderr
    assert "There is no site 'beta' yet" in changed.stderr
    assert "alpha beta" in admin.ok("project", "show").stdout
    assert admin.json("project", "modify", "clinic", "--any-site")["sites"] == []
    nothing = admin.run("project", "modify", "clinic")
    assert (nothing.exit_code, "say at least one of" in nothing.stderr) == (3, True)
    assert admin.run("project", "modify", "clinic", "--any-site", "--site", "a").exit_code == 2


def test_deleted_project_takes_its_groups_along(admin: Admin, project: str) -> None:
    admin.ok("project", "group", "add", project, "6c91e6eb-085c-11e6-a7a5-22000bf2d559")
    admin.ok("project", "delete", project, "-y")
    assert admin.json("project", "group", "show") == []


@pytest.mark.parametrize(
    "named",
    [
        ("alloc", "astro"),
        ("key", "5b1e0c7a94d2"),
        ("maintenance", "alpha", "mnt_1"),
        ("model", "gpt2@1"),
        ("project", "astro"),
        ("site", "alpha"),
        ("tier", "interactive"),
        ("user", "astro", "alice@example.edu"),
    ],
    ids=lambda named: named[0],
)
def test_a_change_that_changes_nothing_names_what_can_be_changed(
    admin: Admin, named: tuple[str, ...]
) -> None:
    kind, *name = named
    refused = admin.run(kind, "modify", *name)
    assert refused.exit_code != 0
    told = " ".join(refused.stderr.split())
    assert "nothing to change was given; say at least one of --" in told
    assert any(one in told for one in name)


def test_lists_of_users_refuse_what_they_would_not_heed(admin: Admin, project: str) -> None:
    for options in (["--blocked", "--project", project], ["--added", "--since", "2030-01-01"]):
        assert admin.run("user", "show", *options).exit_code == 2
