"""What an order becomes at a machine: its queue, its memory, its charge, its batch script."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fabric.cli.launches import checked
from fabric.config import SiteSpec, load_site, shipped_sites
from fabric.errors import LaunchImpossible
from fabric.launch.jobs import Order, get_launch_plan
from fabric.launch.jobs.history import History, Passed
from fabric.launch.jobs.plan import get_command
from fabric.launch.jobs.submit import ParslSubmitter, get_warning_s


def order(**changes: object) -> Order:
    fields = {"model": "SmolLM2-135M@1", "machine": "here", "walltime": "00:30:00"}
    return Order.model_validate(fields | changes)


def site(**system: object) -> SiteSpec:
    facts = {"center": "Here", "scheduler": "local", "sources": ["a test"], "checked": "2026-11"}
    return SiteSpec.model_validate({"name": "here", "system": facts | system})


@pytest.mark.parametrize(
    ("changes", "keeps"),
    [
        ({}, True),
        ({"overflow": False}, True),
        ({"sharing": "private"}, True),
        ({"sharing": "private", "overflow": True}, False),
        ({"sharing": "shared"}, False),
        ({"sharing": "shared", "overflow": True}, False),
    ],
    ids=str,
)
def test_instances_keep_requests_unless_they_overflow_or_are_for_everybody(
    changes: dict[str, object], keeps: bool
) -> None:
    assert order(**changes).keeps is keeps


def test_instances_for_everybody_cannot_keep_requests() -> None:
    fields = {"model": "m@1", "machine": "here", "walltime": "00:30:00", "sharing": "shared"}
    with pytest.raises(LaunchImpossible, match="keep nobody's requests; leave it out") as caught:
        checked(Order, fields | {"overflow": False})
    assert caught.value.detail["param"] == "overflow"


@pytest.fixture
def history(tmp_path: Path) -> History:
    return History(tmp_path / "history.jsonl")


def queue(**limits: object) -> dict[str, object]:
    return {"queues": {"q": {"nodes": "n", **limits}}, "nodes": {"n": {"memory_gb": 64}}}


@pytest.mark.parametrize(
    ("limits", "asked", "param", "reason"),
    [
        ({"max_nodes": 2}, {"nodes": 3}, "nodes", "at most 2"),
        ({"min_nodes": 4}, {}, "nodes", "at least 4"),
        ({"max_walltime": "00:10:00"}, {}, "walltime", "00:10:00 at most"),
        ({"min_walltime": "01:00:00"}, {}, "walltime", "at least 01:00:00"),
        ({"max_running_per_user": 1}, {"replicas": 2}, "replicas", "1 jobs"),
        ({"max_submitted_per_user": 1}, {"keep_until": "2030-01-01T00:00"}, "replicas", "1 jobs"),
        ({"max_nodes_per_user": 3}, {"nodes": 2, "replicas": 2}, "replicas", "at most 3 nodes"),
        ({"available": False, "note": "until May"}, {"queue": "q"}, "queue", "until May"),
        ({}, {"queue": "other"}, "queue", "has the queues q"),
    ],
)
def test_what_a_queue_refuses_is_refused_before_it_is_asked(
    history: History,
    limits: dict[str, object],
    asked: dict[str, object],
    param: str,
    reason: str,
) -> None:
    with pytest.raises(LaunchImpossible) as caught:
        get_launch_plan(order(**asked), site(**queue(**limits)), history)
    assert caught.value.detail["param"] == param
    assert reason in caught.value.message


def test_a_queue_must_be_named_where_none_is_the_default(history: History) -> None:
    two = site(queues={"a": {}, "b": {}})
    with pytest.raises(LaunchImpossible, match="without a queue: name one of a, b"):
        get_launch_plan(order(), two, history)
    assert get_launch_plan(order(queue="b"), two, history).queue == "b"


def test_a_machine_without_a_scheduler_takes_no_launch(history: History) -> None:
    with pytest.raises(LaunchImpossible, match="which scheduler"):
        get_launch_plan(order(), SiteSpec(name="here"), history)


def test_a_model_that_does_not_fit_is_refused_with_what_would(history: History) -> None:
    devices = {"devices": 4, "device": "NVIDIA A100", "device_memory_gb": 40}
    machine = site(scheduler="pbspro", queues={"q": {"nodes": "n"}}, nodes={"n": devices})
    with pytest.raises(LaunchImpossible, match="node"):
        get_launch_plan(order(model="Llama-3.1-405B@1"), machine, history)
    plan = get_launch_plan(order(model="Llama-3-70B@1", nodes=2), machine, history)
    assert plan.fit.plan is not None
    assert plan.fit.plan.num_nodes <= 2
    assert plan.fit.weight_bytes == pytest.approx(2 * 70.6e9, rel=0.02)


def test_a_size_of_a_device_is_not_guessed(history: History) -> None:
    devices = {"devices": 4, "device": "NVIDIA A100"}
    machine = site(queues={"q": {"nodes": "n"}}, nodes={"n": devices})
    plan = get_launch_plan(order(model="Llama-3-70B@1"), machine, history)
    assert plan.fit.text.startswith("not checked")


def test_a_small_node_is_refused(history: History) -> None:
    machine = site(queues={"q": {"nodes": "n"}}, nodes={"n": {"memory_gb": 16, "devices": 0}})
    with pytest.raises(LaunchImpossible, match=r"a node has 14\.4 GB"):
        get_launch_plan(order(model="Llama-3-8B@1"), machine, history)


def test_the_charge_is_the_machines_rule(history: History) -> None:
    charged = queue(units_per_node_hour=3.0, charge_factor=0.5)
    machine = site(scheduler="pbspro", charge={"unit": "SU", "min_hours": 1.0}, **charged)
    assert get_launch_plan(order(nodes=2), machine, history).charge == pytest.approx(3.0)
    longer = order(nodes=2, walltime="02:00:00")
    assert get_launch_plan(longer, machine, history).charge == pytest.approx(6.0)


def test_what_earlier_jobs_took_is_expected_again(history: History) -> None:
    machine = site(**queue())
    before = get_launch_plan(order(), machine, history)
    for load_s in (30.0, 50.0, 40.0):
        passed = Passed(
            machine="here",
            queue="q",
            nodes=1,
            walltime_s=1800,
            model="SmolLM2-135M@1",
            wait_s=5.0,
            load_s=load_s,
        )
        history.add(passed)
    after = get_launch_plan(order(), machine, history)
    assert before.load_s == pytest.approx(20.3, abs=0.1)
    assert after.load_s == 40.0


def test_a_broken_line_of_the_history_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    path.write_text('{"machine": "he')
    assert History(path).predict_load_s("here", "m", None) == 20.0


@pytest.mark.parametrize("name", ["ncsa-delta", "alcf-polaris", "olcf-frontier"])
def test_the_script_says_what_was_asked_for(name: str, tmp_path: Path, history: History) -> None:
    spec = load_site(shipped_sites()[name])
    queue = next(iter(spec.system.queues)) if spec.system else None
    asked = order(machine=name, account="m1234", nodes=1, queue=queue, walltime="00:30:00")
    plan = get_launch_plan(asked, spec, history)
    paths = (tmp_path / "spec.json", tmp_path / "log")
    command = get_command(plan.order, plan.division.ranks, *paths, "fabric.instance")
    script = ParslSubmitter(spec, asked, "debug", tmp_path / "scripts").render(command, "fabric-x")
    assert "fabric.launch.jobs.inblock" in script
    assert str(tmp_path / "spec.json") in script
    if name == "ncsa-delta":
        assert "#SBATCH --account=m1234" in script
        assert "#SBATCH --time=30" in script
        assert f"#SBATCH --signal=B:USR1@{get_warning_s(1800)}" in script
        assert "#SBATCH --no-requeue" in script
    if name == "alcf-polaris":
        assert "# Submitted by: qsub -q debug -A m1234" in script
        assert "#PBS -l walltime=00:30:00" in script


def test_a_job_of_several_nodes_says_how_its_model_is_divided(
    tmp_path: Path, history: History
) -> None:
    nodes = {"memory_gb": 24, "devices": 0}
    machine = site(scheduler="slurm", queues={"q": {"nodes": "n"}}, nodes={"n": nodes})
    with pytest.raises(LaunchImpossible, match="take more --nodes"):
        get_launch_plan(order(model="Llama-3-8B@1"), machine, history)
    plan = get_launch_plan(order(model="Llama-3-8B@1", nodes=2), machine, history)
    assert "on each of 2 nodes" in plan.fit.text
    assert str(plan.division) == "1 tensor x 2 pipeline; by node 1 + 1"
    paths = (tmp_path / "spec.json", tmp_path / "log")
    command = get_command(plan.order, plan.division.ranks, *paths, "fabric.instance")
    submitter = ParslSubmitter(machine, plan.order, plan.queue, tmp_path / "scripts")
    script = submitter.render(command, "fabric-x")
    assert "#SBATCH --nodes=2" in script
    assert "#SBATCH --ntasks-per-node=1" in script
    assert "--ranks 1 1" in script


def test_a_machine_of_one_node_takes_no_job_of_two(history: History) -> None:
    with pytest.raises(LaunchImpossible, match="processes of one machine"):
        get_launch_plan(order(nodes=2), site(), history)


def test_a_local_script_is_shown_and_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    script = ParslSubmitter(site(), order(), None, tmp_path / "scripts").render(
        ["touch", str(mark)], "fabric-x"
    )
    assert f"exec touch {mark}" in script
    assert not mark.exists()


def test_nothing_is_run_by_a_rendering(tmp_path: Path) -> None:
    assert shutil.which("qsub") is None
    spec = load_site(shipped_sites()["alcf-polaris"])
    submitter = ParslSubmitter(spec, order(account="a"), "debug", tmp_path / "scripts")
    assert "#PBS" in submitter.render(["true"], "fabric-x")
