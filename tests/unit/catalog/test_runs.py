from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from fabric.catalog import Catalog, RunRecord, UsageSum
from fabric.errors import NotFound
from fabric.messages import Candidate, Placement, RunState, Usage
from fabric.sql import Database

START = datetime(2026, 1, 1, tzinfo=UTC)
PLACEMENT = Placement(
    site="alpha",
    instance="inst_1",
    digest="blake3:aa",
    reason="warm and near the data",
    candidates=(
        Candidate(site="alpha", instance="inst_1", digest="blake3:aa", cost_s={"queue": 0.1}),
        Candidate(site="beta", instance="inst_2", digest="blake3:aa", excluded="draining"),
    ),
)


@pytest.fixture
def catalog(database: Database) -> Catalog:
    return Catalog(database)


def run(number: int, project: str = "astro", **more: object) -> RunRecord:
    fields = {
        "id": f"run_{number}",
        "project": project,
        "key_id": "0123456789ab",
        "model": "smol@1",
        "state": RunState.COMPLETED,
        "created_at": START + timedelta(seconds=number),
    }
    return RunRecord(**fields | more)


def test_run_comes_back_as_it_was_recorded(catalog: Catalog) -> None:
    full = run(
        1,
        digest="blake3:aa",
        site="alpha",
        instance="inst_1",
        attempts=2,
        usage=Usage(
            prompt_tokens=7, cached_prompt_tokens=3, output_tokens=5, queue_s=0.5, device_s=0.25
        ),
        charge_usu=270,
        first_token_s=0.125,
        total_s=1.5,
        placement=PLACEMENT,
        finished_at=START + timedelta(seconds=9),
    )
    empty = run(2, state=RunState.FAILED, error_code="no_replica")
    catalog.record_runs([full, empty])
    catalog.record_runs([])
    assert catalog.run("run_1") == full
    assert catalog.run("run_2", project="astro") == empty


def test_run_is_recorded_again_as_it_goes_on(catalog: Catalog) -> None:
    first = run(1, state=RunState.RUNNING)
    done = replace(first, state=RunState.COMPLETED, charge_usu=5)
    for record in (first, done, done):
        catalog.record_runs([record])
    assert catalog.runs("astro") == [done]


def test_run_of_another_project_is_as_good_as_absent(catalog: Catalog) -> None:
    theirs = run(1, "bio")
    catalog.record_runs([theirs])
    answers = []
    for name in ("run_1", "run_9"):
        with pytest.raises(NotFound) as caught:
            catalog.run(name, project="astro")
        answers.append(caught.value.message.replace(name, "X"))
    assert answers[0] == answers[1]
    catalog.record_runs([run(1, "astro", charge_usu=99)])
    assert catalog.run("run_1") == theirs
    assert catalog.runs("astro") == []


def test_runs_are_listed_newest_first_within_their_period(catalog: Catalog) -> None:
    catalog.record_runs([run(number) for number in range(5)] + [run(9, "bio")])

    def numbers(**period: object) -> list[int]:
        return [int(record.id[4:]) for record in catalog.runs("astro", **period)]

    assert numbers() == [4, 3, 2, 1, 0]
    assert numbers(limit=2) == [4, 3]
    since, until = START + timedelta(seconds=1), START + timedelta(seconds=3)
    assert numbers(since=since, until=until) == [2, 1]
    assert len(catalog.runs()) == 6


def test_usage_is_summed_by_model_and_site(catalog: Catalog) -> None:
    used = Usage(prompt_tokens=10, cached_prompt_tokens=4, output_tokens=20, device_s=0.5)
    catalog.record_runs(
        [
            run(1, site="alpha", usage=used, charge_usu=100),
            run(2, site="alpha", usage=used, charge_usu=10**12),
            run(3, site="beta", usage=used, charge_usu=7),
            run(4, "bio", site="alpha", usage=used, charge_usu=1),
        ]
    )
    alpha, beta = catalog.usage("astro")
    assert alpha == UsageSum(
        model="smol@1",
        site="alpha",
        num_runs=2,
        prompt_tokens=20,
        cached_prompt_tokens=8,
        output_tokens=40,
        device_s=1.0,
        charge_usu=10**12 + 100,
    )
    assert (beta.site, beta.num_runs) == ("beta", 1)
    assert catalog.usage("astro", since=START + timedelta(seconds=3)) == [beta]
    assert catalog.usage("nobody") == []
