"""``fabric-admin maintenance`` and a site's limit, on a real database."""

from __future__ import annotations

import pytest

from fabric.cli.exits import Exit
from fabric.testing.admin import Admin


@pytest.fixture
def admin(admin: Admin) -> Admin:
    admin.json("site", "add", "polaris")
    return admin


TIMES = ("--from", "2038-01-11 08:00:00", "--until", "2038-01-11 18:00:00")


def test_maintenance_is_planned_shown_and_deleted(admin: Admin) -> None:
    added = admin.json("maintenance", "add", "polaris", *TIMES, "--reason", "new disks")
    assert added["starts_at"].startswith("2038-01-11T08:00:00")
    shown = admin.run("maintenance", "show")
    assert "2038-01-11 08:00" in shown.output
    assert "new disks" in shown.output
    assert max(len(line) for line in shown.output.splitlines()) <= 80
    assert admin.json("maintenance", "show", "polaris") == [{"site": "polaris", **added}]
    asked = admin.run("maintenance", "delete", "polaris", added["id"])
    assert asked.exit_code == Exit.REFUSED
    admin.json("maintenance", "delete", "polaris", added["id"], "--yes")
    assert "No maintenance is planned." in admin.run("maintenance", "show").output


def test_maintenance_takes_longer_than_was_planned(admin: Admin) -> None:
    first = admin.json("maintenance", "add", "polaris", *TIMES, "--reason", "new disks")
    later = ("--from", "2038-02-01", "--until", "2038-02-02")
    second = admin.json("maintenance", "add", "polaris", *later)
    told = admin.ok("maintenance", "modify", "polaris", first["id"], "--until", "2038-01-12")
    assert "ends at: 2038-01-11" in told.stderr.replace("_", " ")
    shown = admin.json("maintenance", "show", "polaris")
    assert [one["id"] for one in shown] == [first["id"], second["id"]]
    assert (shown[0]["ends_at"][:10], shown[0]["reason"]) == ("2038-01-12", "new disks")
    past = ("--from", "2038-03-01", "--until", "2038-03-02", "--reason", "later")
    admin.ok("maintenance", "modify", "polaris", first["id"], *past)
    shown = admin.json("maintenance", "show", "polaris")
    assert [(one["id"], one["reason"]) for one in shown] == [
        (second["id"], ""),
        (first["id"], "later"),
    ]
    for words, why in (
        ((first["id"], "--from", "2038-02-01"), f"{second['id']} is planned then"),
        ((first["id"], "--until", "2038-01-01"), "it is not after starts_at"),
        ((first["id"], "--from", "1999-01-01", "--until", "1999-01-02"), "it is over"),
        (("mnt_0", "--until", "2039-01-01"), "'mnt_0'"),
    ):
        refused = admin.run("maintenance", "modify", "polaris", *words)
        assert (refused.exit_code, why in refused.stderr) == (Exit.REFUSED, True), refused.stderr
    assert admin.json("maintenance", "show", "polaris") == shown


def test_what_cannot_be_planned_is_refused_with_the_reason(admin: Admin) -> None:
    admin.json("maintenance", "add", "polaris", *TIMES)
    twice = admin.run("maintenance", "add", "polaris", *TIMES)
    assert twice.exit_code == Exit.REFUSED
    assert "is planned then; delete it first" in twice.stderr
    unknown = admin.run("maintenance", "add", "aurora", *TIMES)
    assert unknown.exit_code == Exit.REFUSED
    assert "'aurora' is not in the catalog" in unknown.stderr
    wrong = admin.run("maintenance", "add", "polaris", "--from", "soon", "--until", "later")
    assert wrong.exit_code == 2
    nobody = admin.run("maintenance", "delete", "polaris", "mnt_0", "--yes")
    assert "'mnt_0'" in nobody.stderr


def test_a_site_is_limited_and_the_limit_lifted(admin: Admin) -> None:
    site = admin.json("site", "modify", "polaris", "--max-in-flight", "8")
    assert site["facts"]["rules"]["max_in_flight"] == 8
    site = admin.json("site", "modify", "polaris", "--max-in-flight", "0")
    assert site["facts"]["rules"]["max_in_flight"] is None
    assert admin.run("site", "modify", "polaris", "--max-in-flight", "-1").exit_code == 2
