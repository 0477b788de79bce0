"""What administrators set for the broker at a site."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta

import pytest

from fabric.catalog import Catalog, SiteRules
from fabric.errors import NotFound, RequestInvalid, UnknownSite
from fabric.sql import Database

NOW = datetime(2027, 1, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)


@pytest.fixture
def catalog(database: Database) -> Catalog:
    catalog = Catalog(database, clock=lambda: NOW)
    catalog.add_site("alpha", facts={"title": "a machine"})
    return catalog


def test_maintenance_is_kept_in_order_beside_the_facts(catalog: Catalog) -> None:
    late = catalog.add_maintenance("alpha", starts_at=NOW + 5 * HOUR, ends_at=NOW + 6 * HOUR)
    early = catalog.add_maintenance(
        "alpha", starts_at=NOW + HOUR, ends_at=NOW + 2 * HOUR, reason="disks"
    )
    site = catalog.get_site("alpha")
    assert site.rules.maintenance == (early, late)
    assert early.reason == "disks"
    assert site.facts["title"] == "a machine"
    assert catalog.delete_maintenance("alpha", late.id) == late
    assert catalog.get_site("alpha").rules.maintenance == (early,)


def test_new_facts_of_a_site_leave_its_rules(catalog: Catalog) -> None:
    catalog.set_max_in_flight("alpha", 7)
    site = catalog.modify_site("alpha", facts={"title": "another"})
    assert site.facts["title"] == "another"
    assert site.rules == SiteRules(max_in_flight=7)
    assert catalog.set_max_in_flight("alpha", None).max_in_flight is None


@pytest.mark.parametrize(
    ("starts_at", "ends_at", "words"),
    [
        (NOW + HOUR, NOW + HOUR, "is not after starts_at"),
        (NOW + 2 * HOUR, NOW + HOUR, "is not after starts_at"),
        (NOW - 2 * HOUR, NOW - HOUR, "it is over"),
        (datetime(2027, 1, 1, 5), NOW + 9 * HOUR, "no time zone"),
        (NOW + 3.5 * HOUR, NOW + 9 * HOUR, "is planned then"),
        (NOW + HOUR, NOW + 3.5 * HOUR, "is planned then"),
        (NOW + HOUR, NOW + 99 * HOUR, "is planned then"),
    ],
)
def test_times_that_cannot_be_are_refused(
    catalog: Catalog, starts_at: datetime, ends_at: datetime, words: str
) -> None:
    catalog.add_maintenance("alpha", starts_at=NOW + 3 * HOUR, ends_at=NOW + 4 * HOUR)
    with pytest.raises(RequestInvalid, match=words):
        catalog.add_maintenance("alpha", starts_at=starts_at, ends_at=ends_at)
    assert len(catalog.get_site("alpha").rules.maintenance) == 1


@pytest.mark.parametrize("number", [0, -1, 10**6 + 1])
def test_a_limit_that_means_nothing_is_refused(catalog: Catalog, number: int) -> None:
    with pytest.raises(RequestInvalid, match="max_in_flight"):
        catalog.set_max_in_flight("alpha", number)


def test_what_is_not_there_is_said(catalog: Catalog) -> None:
    with pytest.raises(UnknownSite):
        catalog.add_maintenance("nope", starts_at=NOW, ends_at=NOW + HOUR)
    with pytest.raises(UnknownSite):
        catalog.set_max_in_flight("nope", 1)
    with pytest.raises(NotFound, match="mnt_0"):
        catalog.delete_maintenance("alpha", "mnt_0")


def test_what_is_over_is_forgotten_with_the_next(catalog: Catalog, database: Database) -> None:
    catalog.add_maintenance("alpha", starts_at=NOW + HOUR, ends_at=NOW + 2 * HOUR)
    later = Catalog(database, clock=lambda: NOW + 3 * HOUR)
    added = later.add_maintenance("alpha", starts_at=NOW + HOUR, ends_at=NOW + 4 * HOUR)
    assert later.get_site("alpha").rules.maintenance == (added,)


def test_two_administrators_at_once_lose_nothing(catalog: Catalog) -> None:
    def plan(number: int) -> None:
        begin = NOW + (2 * number + 1) * HOUR
        catalog.add_maintenance("alpha", starts_at=begin, ends_at=begin + HOUR)

    threads = [threading.Thread(target=plan, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(catalog.get_site("alpha").rules.maintenance) == 8
