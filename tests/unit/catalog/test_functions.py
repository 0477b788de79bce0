from datetime import UTC, datetime, timedelta

import pytest

from fabric.catalog import Catalog, FunctionRecord
from fabric.errors import Duplicate, NotFound
from fabric.sql import Database

NOW = datetime(2026, 1, 1, tzinfo=UTC)


class Clock:
    """Every look is a second later."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> datetime:
        self.now += timedelta(seconds=1)
        return self.now


@pytest.fixture
def catalog(database: Database) -> Catalog:
    return Catalog(database, clock=Clock())


def add(catalog: Catalog, id: str, name: str = "infer", **more: str) -> FunctionRecord:
    return catalog.add_function(id, name, sha256=f"sha-{id}", fabric_version="1", **more)


def test_function_comes_back_as_it_was_added(catalog: Catalog) -> None:
    added = add(catalog, "f1", visibility="group", group_id="g1")
    assert catalog.function("f1") == added
    assert (added.visibility, added.group_id, added.created_at) == (
        "group",
        "g1",
        NOW + timedelta(seconds=1),
    )


def test_an_id_is_stored_once(catalog: Catalog) -> None:
    add(catalog, "f1")
    with pytest.raises(Duplicate, match="f1"):
        add(catalog, "f1", name="other")
    assert catalog.function("f1").name == "infer"


def test_what_is_retired_is_only_listed_when_asked_for(catalog: Catalog) -> None:
    for id in ("f1", "f2"):
        add(catalog, id)
    add(catalog, "f3", name="describe_site")
    first = catalog.retire_function("f2")
    assert first.retired_at is not None
    assert catalog.retire_function("f2") == first, "the first time counts"
    assert [function.id for function in catalog.functions()] == ["f3", "f1"]
    assert [function.id for function in catalog.functions("infer")] == ["f1"]
    assert [function.id for function in catalog.functions(retired=True)] == ["f3", "f2", "f1"]


def test_the_newest_is_called_and_an_endpoints_own_before_it(catalog: Catalog) -> None:
    add(catalog, "old")
    add(catalog, "own", endpoint_id="e1")
    add(catalog, "new")
    assert catalog.function_for("infer").id == "new"
    assert catalog.function_for("infer", endpoint_id="e1").id == "own"
    assert catalog.function_for("infer", endpoint_id="e2").id == "new"
    catalog.retire_function("own")
    assert catalog.function_for("infer", endpoint_id="e1").id == "new"


def test_what_is_not_registered_is_named(catalog: Catalog) -> None:
    add(catalog, "own", endpoint_id="e1")
    for act in (catalog.function, catalog.retire_function, catalog.function_for):
        with pytest.raises(NotFound, match="infer"):
            act("infer")
