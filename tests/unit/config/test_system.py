"""What ships of a machine has its sources, and what is submitted there keeps its limits."""

from pathlib import Path

import pytest
import yaml

from fabric.config import (
    find_site,
    get_site_files,
    inspect_site,
    load_site,
    shipped_sites,
    user_sites_path,
)
from fabric.errors import SettingInvalid

MACHINE = """
name: here
system:
  center: Here
  scheduler: slurm
  nodes: {gpu: {devices: 4, device: NVIDIA A100}}
  queues:
    batch:
      nodes: gpu
      bins:
        - {min_nodes: 1, max_nodes: 4, max_walltime: "02:00:00"}
        - {min_nodes: 5, max_nodes: 64, max_walltime: "12:00:00"}
    large: {min_nodes: 8, max_nodes: 64, min_walltime: "00:10:00", max_walltime: "24:00:00"}
  sources: [the manual]
  checked: 2026-11
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    folder = user_sites_path()
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize("name", shipped_sites())
def test_every_shipped_file_follows_the_schema_and_says_its_sources(name: str) -> None:
    spec, problems = inspect_site(shipped_sites()[name])
    assert problems == ()
    assert spec is not None
    assert spec.name == name
    if not name.startswith("local"):
        assert spec.system is not None
        assert spec.system.sources
        assert spec.system.checked


def test_a_short_job_on_frontier_is_bounded_by_its_number_of_nodes() -> None:
    system = load_site(find_site("olcf-frontier")).system
    assert system is not None
    batch = system.queues["batch"]
    limits = [batch.get_max_walltime(nodes) for nodes in (1, 91, 92, 184, 9472)]
    assert limits == ["02:00:00", "02:00:00", "06:00:00", "12:00:00", "12:00:00"]


@pytest.mark.parametrize(
    ("endpoint", "field", "said"),
    [
        ("{scheduler: pbspro, walltime: '01:00:00', cpus_per_node: 4}", "scheduler", "is slurm"),
        ("{scheduler: slurm, partition: fast, walltime: '01:00:00'}", "partition", "batch, large"),
        ("{scheduler: slurm, partition: batch, walltime: '02:00:01'}", "walltime", '"02:00:00"'),
        ("{scheduler: slurm, partition: large, walltime: '01:00:00'}", "nodes_per_block", "8"),
        (
            "{scheduler: slurm, partition: large, walltime: '01:00:00', nodes_per_block: 65}",
            "nodes_per_block",
            "at most 64",
        ),
        (
            "{scheduler: slurm, partition: large, walltime: '00:05:00', nodes_per_block: 8}",
            "walltime",
            'at least "00:10:00"',
        ),
        (
            "{scheduler: slurm, walltime: '01:00:00', choices: {partition: [batch, fast]}}",
            "choices.partition.1",
            "batch, large",
        ),
    ],
)
def test_endpoint_outside_the_limits_is_refused(
    tmp_path: Path, endpoint: str, field: str, said: str
) -> None:
    path = tmp_path / "here.yaml"
    path.write_text(f"{MACHINE}endpoint: {endpoint}\n")
    _, (problem, *others) = inspect_site(path)
    assert not others
    assert problem.field == f"endpoint.{field}"
    assert said in problem.reason


def test_endpoint_inside_the_limits_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "here.yaml"
    endpoint = "{scheduler: slurm, partition: batch, walltime: '12:00:00', nodes_per_block: 5}"
    path.write_text(f"{MACHINE}endpoint: {endpoint}\n")
    assert load_site(path).system is not None


@pytest.mark.parametrize(
    ("change", "field", "said"),
    [
        ({"sources": []}, "system.sources", "at least 1"),
        ({"checked": "yesterday"}, "system.checked", "pattern"),
        ({"queues": {"q": {"nodes": "cpu"}}}, "system.queues.q.nodes", "(gpu)"),
        ({"queues": {"q": {"min_nodes": 3, "max_nodes": 2}}}, "system.queues.q.max_nodes", "3"),
        ({"queues": {"q": {"max_walltime": 86400}}}, "system.queues.q.max_walltime", '"24:00:00"'),
        ({"queues": {"q": {"max_wall": "1:00:00"}}}, "system.queues.q.max_wall", "not permitted"),
        ({"network": {"outbound": "proxy"}}, "system.network.proxy", "say it"),
        (
            {"charge": {"unit": "SU", "balance": {"kind": "iri"}}},
            "system.charge.balance.url",
            "the kind iri needs it",
        ),
        (
            {"charge": {"unit": "SU", "balance": {"kind": "sbank"}}},
            "system.charge.balance.resource",
            "polaris",
        ),
    ],
)
def test_error_in_a_fact_names_the_field(
    tmp_path: Path, change: dict[str, object], field: str, said: str
) -> None:
    content = yaml.safe_load(MACHINE)
    content["system"].update(change)
    path = tmp_path / "here.yaml"
    path.write_text(yaml.safe_dump(content))
    _, (problem, *_) = inspect_site(path)
    assert problem.field == field
    assert said in problem.reason


def test_bins_do_not_overlap(tmp_path: Path) -> None:
    path = tmp_path / "here.yaml"
    path.write_text(MACHINE.replace("min_nodes: 5", "min_nodes: 4"))
    _, (problem,) = inspect_site(path)
    assert problem.field == "system.queues.batch.bins.1.min_nodes"
    assert "ends at 4" in problem.reason


def test_everything_that_is_wrong_is_found_at_once(tmp_path: Path) -> None:
    path = tmp_path / "here.yaml"
    path.write_text("name: Not A Name\nsystem: {center: X, scheduler: lsf}\n")
    _, problems = inspect_site(path)
    fields = {each.field for each in problems}
    assert fields == {"name", "system.scheduler", "system.sources", "system.checked"}


def test_own_file_stands_before_the_shipped_one(own: Path) -> None:
    (own / "alcf-polaris.yaml").write_text("name: alcf-polaris\ntitle: Mine\n")
    (own / "lab.yaml").write_text("name: lab\n")
    assert load_site(find_site("alcf-polaris")).title == "Mine"
    files = get_site_files()
    assert list(files) == sorted(files)
    assert {name for name, file in files.items() if file.is_own} == {"alcf-polaris", "lab"}
    assert find_site("alcf-aurora") == shipped_sites()["alcf-aurora"]


@pytest.mark.parametrize("name", ["nowhere", "../config", "/etc/passwd", ""])
def test_unknown_site_is_refused_with_those_there_are(own: Path, name: str) -> None:
    with pytest.raises(SettingInvalid, match=r"alcf-aurora.*sites"):
        find_site(name)
