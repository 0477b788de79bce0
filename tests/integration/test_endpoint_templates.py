"""Endpoint files work with Globus Compute's own programs, and with a real endpoint that runs."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import globus_sdk
import pytest
import responses
import yaml
from globus_compute_sdk import Client, Executor
from globus_compute_sdk.errors import TaskExecutionFailed
from globus_compute_sdk.serialize import ComputeSerializer, JSONData, PureSourceTextInspect
from globus_sdk.testing import get_last_request, load_response

from fabric.compute.endpoint import get_endpoint_files
from fabric.compute.endpoint_check import check_endpoint
from fabric.compute.endpoint_install import install
from fabric.config import SiteSpec
from fabric.testing.globus import Endpoint, Globus
from fabric.testing.processes import wait_ended

FUNCTION = "9a947ba5-f537-4681-acf3-cc66485aadec"
PROJECT = "da84e531-1afb-43cb-8c87-135ab580516a"
RESULT_S = 120.0

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

# Facts of real systems, but for the interface, which must exist where the check runs.
SITES: dict[str, dict[str, Any]] = {
    "polaris": {
        "scheduler": "pbspro",
        "queue": "debug",
        "account": "datascience",
        "walltime": "01:00:00",
        "cpus_per_node": 64,
        "select_options": "ngpus=4",
        "scheduler_options": "#PBS -l filesystems=home:eagle\n",
        "worker_init": "module use /soft/modulefiles\nmodule load conda\nexport TMPDIR=/tmp\n",
        "launcher": {"kind": "mpiexec", "overrides": "--depth=64 --ppn 1"},
        "choices": {"queue": ["debug-scaling", "prod"], "nodes_per_block": [1, 2]},
    },
    "perlmutter": {
        "scheduler": "slurm",
        "account": "m1234_g",
        "walltime": "00:30:00",
        "scheduler_options": "#SBATCH --qos=debug\n#SBATCH --constraint=gpu\n"
        "#SBATCH --gpus-per-node=4\n",
        "launcher": {"kind": "srun", "overrides": "-c 128"},
        "cmd_timeout_s": 120,
        "choices": {"account": "any", "walltime": ["00:10:00"]},
        "contact_email": "admin@nersc.gov",
        "multi_user": {"domains": ["nersc.gov", "lbl.gov"], "auth_project": PROJECT},
    },
    "delta": {
        "scheduler": "slurm",
        "partition": "gpuA100x4",
        "account": "abcd-delta-gpu",
        "walltime": "48:00:00",
        "exclusive": False,
        "scheduler_options": "#SBATCH --gpus-per-node=1 --gpu-bind=closest\n#SBATCH --mem=220g\n"
        "#SBATCH --constraint=scratch\n",
        "choices": {"partition": ["gpuA100x4-preempt", "gpuH200x8"]},
    },
    "here": {"scheduler": "local"},
}


def get_site(name: str, **more: Any) -> SiteSpec:
    endpoint = {"interface": "lo", "allowed_functions": [FUNCTION], **SITES[name], **more}
    return SiteSpec.model_validate({"name": name, "endpoint": endpoint})


# Parsl leaves the socket open with which it reads an interface's address.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", SITES)
def test_every_value_a_caller_may_choose_is_accepted(name: str) -> None:
    findings = list(check_endpoint(get_site(name)))
    assert [each for each in findings if not each.ok] == []
    told = " ".join(each.check for each in findings)
    for value in yaml.safe_load(json.dumps(SITES[name].get("choices", {}))).values():
        assert all(str(each) in told for each in value if value != "any")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_interface_that_is_not_there_is_found() -> None:
    site = get_site("here", interface="hsn0")
    found = next(each for each in check_endpoint(site) if each.check == "options left out")
    assert not found.ok
    assert "No such device" in found.detail


def test_check_exits_with_3_and_names_what_is_missing(tmp_path: Path) -> None:
    file = tmp_path / "site.yaml"
    file.write_text("name: here\nendpoint: {scheduler: local}\n")
    command = [Path(sys.executable).with_name("fabric-admin"), "endpoint", "check", file]
    done = subprocess.run(
        [*command, "--format", "json"], capture_output=True, text=True, timeout=360, check=False
    )
    assert done.returncode == 3
    findings = {each["check"]: each for each in json.loads(done.stdout)}
    assert [check for check, each in findings.items() if not each["ok"]] == ["functions"]
    error = json.loads(done.stderr.splitlines()[-1])["error"]
    assert error["code"] == "endpoint_invalid"
    assert "function register" in error["message"]


@responses.activate
def test_authentication_policy_is_one_globus_auth_takes(tmp_path: Path) -> None:
    text = get_endpoint_files(get_site("perlmutter"), tmp_path)["authentication_policy.json"]
    load_response("auth.create_policy")
    client = globus_sdk.AuthClient(authorizer=globus_sdk.NullAuthorizer())
    client.create_policy(**json.loads(text)["policy"])
    assert json.loads(get_last_request().body) == json.loads(text)


def double(number: int) -> int:
    return 2 * number


def report_host(number: int) -> str:
    import os

    return f"{os.getpid()} {number}"


@pytest.fixture(scope="module")
def client(globus: Globus) -> Client:
    return globus.client(
        "site-a",
        code_serialization_strategy=PureSourceTextInspect(),
        data_serialization_strategy=JSONData(),
    )


@pytest.fixture(scope="module")
def allowed(client: Client) -> UUID:
    return UUID(client.register_function(double))


@pytest.fixture(scope="module")
def endpoint(
    globus: Globus, allowed: UUID, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Endpoint]:
    folder = tmp_path_factory.mktemp("endpoint")
    install(folder, get_endpoint_files(get_site("here"), folder, (allowed,)))
    with globus.endpoint("here", template=folder) as running:
        yield running


def submit(endpoint: Endpoint, client: Client, function: UUID, config: dict[str, Any]) -> object:
    with Executor(
        endpoint.id, client=client, user_endpoint_config=config, task_group_id=uuid4()
    ) as executor:
        executor.serializer = ComputeSerializer(strategy_data=JSONData())
        return executor.submit_to_registered_function(str(function), (21,)).result(RESULT_S)


@pytest.mark.parametrize("config", [{}, {"place": "login"}])
def test_allowed_function_runs(
    endpoint: Endpoint, client: Client, allowed: UUID, config: dict[str, Any]
) -> None:
    assert submit(endpoint, client, allowed, config) == 42


@pytest.mark.parametrize(
    ("config", "named"), [({"worker_init": "id"}, "worker_init"), ({"place": "moon"}, "moon")]
)
def test_option_outside_the_schema_is_refused_by_name(
    endpoint: Endpoint, client: Client, allowed: UUID, config: dict[str, Any], named: str
) -> None:
    with pytest.raises(TaskExecutionFailed, match=named):
        submit(endpoint, client, allowed, config)


def test_function_that_is_not_allowed_is_refused(endpoint: Endpoint, client: Client) -> None:
    other = UUID(client.register_function(report_host))
    with pytest.raises(Exception, match=rf"(?i){other}.*not permitted"):
        submit(endpoint, client, other, {})


def test_pickled_arguments_are_not_opened(
    endpoint: Endpoint, globus: Globus, allowed: UUID
) -> None:
    with (
        Executor(endpoint.id, client=globus.client("site-a"), task_group_id=uuid4()) as executor,
        pytest.raises(TaskExecutionFailed, match="DillDataBase64"),
    ):
        executor.submit_to_registered_function(str(allowed), (21,)).result(RESULT_S)


def test_killed_user_endpoint_leaves_nothing_behind(
    endpoint: Endpoint, client: Client, allowed: UUID
) -> None:
    submit(endpoint, client, allowed, {})
    names = [" ".join(each.cmdline()) for each in endpoint.processes()]
    assert any("interchange" in name for name in names)
    assert wait_ended(endpoint.kill_user_endpoints(), timeout_s=60) == []
