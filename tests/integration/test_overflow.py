"""A hub with an instance of the fabric's, beside those that its users bring."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from fabric.broker import BrokerSettings
from fabric.errors import FabricError
from fabric.messages import Limits
from fabric.sdk import Fabric, Stream
from fabric.testing.engine import FixedDelayEngine
from fabric.testing.hub import MODEL, PROJECT, RunningHub, running_hub, wait_until

TIMEOUT_S = 120.0
ONE_ROW = Limits(context_tokens=2048, max_rows=1, cache_tokens=2048, modes=("query",))


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHub]:
    settings = BrokerSettings(patience_s=2.0, lost_memory_s=2.0, explore=0.0)
    directory = tmp_path_factory.mktemp("overflow")
    with running_hub(directory, sites=("shared",), broker=settings) as hub:
        yield hub


@contextmanager
def member(hub: RunningHub) -> Iterator[Fabric]:
    """Somebody of the project with a key of their own."""
    _, key = hub.keys.add_key(PROJECT, scopes=("query", "launch"))
    with Fabric(hub.base_url, key, num_retries=0) as fabric:
        yield fabric


@pytest.fixture
def owner(hub: RunningHub) -> Iterator[Fabric]:
    with member(hub) as fabric:
        yield fabric


def permit(owner: Fabric, machine: str, *, sharing: str, overflow: bool | None) -> str:
    """Return the name of a machine as the owner's place to run."""
    launch = owner.add_instance(f"{MODEL}@1", machine, sharing=sharing, overflow=overflow)
    return str(launch["site"])


@contextmanager
def brought(
    hub: RunningHub,
    owner: Fabric,
    machine: str,
    *,
    sharing: str = "private",
    overflow: bool | None = None,
) -> Iterator[str]:
    """Yield the site of an instance of the owner's that has one row, and is slower than others."""
    site = permit(owner, machine, sharing=sharing, overflow=overflow)
    engine = FixedDelayEngine(limits=ONE_ROW, first_token_s=0.2, token_s=0.05)
    hub.call(hub.start_site(site, engine))
    try:
        yield site
    finally:
        hub.kill_site(site)
        wait_until(lambda: site not in {view.site for view in hub.broker.replicas()})


def answered_at(fabric: Fabric, *, overflow: bool | None = None) -> str:
    return str(fabric.complete("hi", model=MODEL, max_tokens=2, overflow=overflow).site)


def explained(fabric: Fabric, *, overflow: bool | None = None) -> dict[str, str | None]:
    """Return what keeps a request from each site."""
    candidates = fabric.explain("hi", model=MODEL, overflow=overflow).candidates
    return {one.site: one.excluded for one in candidates}


@contextmanager
def occupied(fabric: Fabric, site: str) -> Iterator[Stream]:
    """Have the only row of an instance taken, for a minute and a half."""
    with fabric.stream("hi", model=MODEL, max_tokens=2000, sites=[site]) as stream:
        next(iter(stream))
        yield stream


def test_a_private_instance_keeps_its_owners_requests_and_no_others(
    hub: RunningHub, owner: Fabric
) -> None:
    with brought(hub, owner, "private") as site, member(hub) as colleague:
        assert answered_at(owner) == site
        assert answered_at(colleague) == "shared"
        answer = owner.complete("hi", model=MODEL, max_tokens=2, sites=["shared"])
        assert answer.site == "shared"


def test_an_instance_of_the_project_keeps_its_members_requests(
    hub: RunningHub, owner: Fabric
) -> None:
    with (
        brought(hub, owner, "ours", sharing="project") as site,
        member(hub) as colleague,
        occupied(owner, site),
        ThreadPoolExecutor(1) as threads,
    ):
        waiting = threads.submit(answered_at, colleague)
        wait_until(lambda: any(one.num_mine for one in colleague.queue()))
        assert answered_at(colleague, overflow=True) == "shared"
        assert not waiting.done()
        hub.kill_site(site)
        assert waiting.result(TIMEOUT_S) == "shared"


def test_requests_wait_for_a_full_instance_of_their_own_unless_they_may_leave_it(
    hub: RunningHub, owner: Fabric
) -> None:
    with brought(hub, owner, "full") as site, ThreadPoolExecutor(1) as threads:
        with occupied(owner, site):
            waiting = threads.submit(answered_at, owner)
            wait_until(lambda: any(one.num_mine for one in owner.queue()))
            assert answered_at(owner, overflow=True) == "shared"
            assert not waiting.done()
        assert waiting.result(TIMEOUT_S) == site


def test_one_that_was_launched_so_lets_them_out(hub: RunningHub, owner: Fabric) -> None:
    with brought(hub, owner, "open", overflow=True) as site:
        with occupied(owner, site):
            assert answered_at(owner) == "shared"
        [told] = [one for one in owner.instances() if one.site == site and one.connected is False]
        assert told.overflow


def test_without_it_the_ordinary_choice_applies_again(hub: RunningHub, owner: Fabric) -> None:
    with brought(hub, owner, "gone") as site:
        assert answered_at(owner) == site
    assert answered_at(owner) == "shared"


def test_what_keeps_a_request_is_explained(hub: RunningHub, owner: Fabric) -> None:
    with brought(hub, owner, "told") as site:
        kept = f"your own instances keep it ({site}); `overflow` lets it leave them"
        reasons = explained(owner)
        assert (reasons[site], reasons["shared"]) == (None, kept)
        reasons = explained(owner, overflow=True)
        assert (reasons[site], reasons["shared"]) == (None, None)


def test_one_on_its_way_keeps_what_it_may_still_answer(hub: RunningHub, owner: Fabric) -> None:
    launch = owner.add_instance(f"{MODEL}@1", "coming", sharing="private")
    instance, site = str(launch["instance"]), str(launch["site"])
    owner.expect_instance(instance, 100.0)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(answered_at, owner)
        late = owner.complete("hi", model=MODEL, max_tokens=2, deadline_s=20.0)
        assert late.site == "shared"
        assert not waiting.done()
        started = hub.call(hub.start_site(site, FixedDelayEngine(limits=ONE_ROW)))
        assert waiting.result(TIMEOUT_S) == site
        assert started.instance != instance
    owner.end_instance(instance, "over")
    hub.kill_site(site)


def test_one_for_everybody_keeps_nobodys(hub: RunningHub, owner: Fabric) -> None:
    with pytest.raises(FabricError, match="keeps nobody's requests"):
        permit(owner, "all", sharing="shared", overflow=False)
    with brought(hub, owner, "all", sharing="shared") as site:
        reasons = explained(owner)
        assert (reasons[site], reasons["shared"]) == (None, None)
        with occupied(owner, site):
            assert answered_at(owner) == "shared"
