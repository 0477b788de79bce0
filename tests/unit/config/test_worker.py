import pytest

from fabric.config import WorkerEnvironment, load_worker
from fabric.errors import SettingInvalid


def test_a_worker_without_a_scheduler_has_no_job() -> None:
    assert load_worker({}) == WorkerEnvironment(
        job_id=None, task_id=None, instance_module="fabric.instance"
    )


@pytest.mark.parametrize("name", ["SLURM_JOB_ID", "PBS_JOBID"])
def test_the_schedulers_job_is_found(name: str) -> None:
    assert load_worker({name: "4711", "GC_TASK_UUID": "t"}) == WorkerEnvironment(
        job_id="4711", task_id="t"
    )


@pytest.mark.parametrize("module", ["a b", "-c", "a..b", ".a", "1a", "a;b", "a.b\n"])
def test_what_is_no_module_is_not_run(module: str) -> None:
    with pytest.raises(SettingInvalid, match="FABRIC_INSTANCE_MODULE"):
        load_worker({"FABRIC_INSTANCE_MODULE": module})
