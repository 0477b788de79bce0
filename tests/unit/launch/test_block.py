"""A real block on this machine, with instances that know no model."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from fabric.dispatch.direct import open_direct
from fabric.errors import BlockFailed, SettingInvalid
from fabric.launch.block import Block, LaunchedInstance
from fabric.messages import InstanceState
from fabric.testing.instance import MODULE
from fabric.testing.processes import guarded_by
from fabric.testing.rig import get_spec

READY_S = 60.0


@pytest.fixture(scope="module")
def block(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Block]:
    block = Block(site="alpha", run_dir=tmp_path_factory.mktemp("alpha"), instance_module=MODULE)
    block.start()
    yield block
    block.stop()


def stop(launched: LaunchedInstance) -> object:
    assert launched.stop()
    return launched.ended.result(30)


async def test_instance_in_a_block_answers_and_drains(block, tmp_path) -> None:
    launched = block.launch(get_spec(tmp_path))
    states = []
    status = block.wait_ready(
        launched, timeout_s=READY_S, on_status=lambda status: states.append(status.state)
    )
    assert states[-1] == InstanceState.READY
    channel = await open_direct(status.direct_url, launched.spec.direct_token)
    assert channel.hello.instance == launched.spec.launch.instance
    await channel.close()
    assert stop(launched) == 0
    assert not launched.stop(), "there is nobody left to ask"


def test_instance_that_does_not_load_says_why(block, tmp_path) -> None:
    launched = block.launch(get_spec(tmp_path, engine="broken=1"))
    with pytest.raises(BlockFailed, match="cannot be loaded: it was told so") as failed:
        block.wait_ready(launched, timeout_s=READY_S)
    assert Path(failed.value.detail["log_path"]).exists()


def test_instance_that_is_late_is_named(block, tmp_path) -> None:
    launched = block.launch(get_spec(tmp_path))
    with pytest.raises(BlockFailed, match=r"not ready in 0\.01 s"):
        block.wait_ready(launched, timeout_s=0.01)
    block.wait_ready(launched, timeout_s=READY_S)
    stop(launched)


def test_lost_worker_takes_its_instance_along_and_the_next_one_runs(block, tmp_path) -> None:
    launched = block.launch(get_spec(tmp_path))
    status = block.wait_ready(launched, timeout_s=READY_S)
    instance = psutil.Process(status.pid)
    instance.parent().kill()
    assert psutil.wait_procs([instance], timeout=20)[1] == []
    assert "worker" in str(launched.ended.exception(30)).lower()
    again = block.launch(get_spec(tmp_path))
    block.wait_ready(again, timeout_s=READY_S)
    stop(again)


@pytest.mark.slow
def test_lost_worker_pool_is_replaced(tmp_path) -> None:
    block = Block(site="beta", run_dir=tmp_path / "beta", instance_module=MODULE)
    block.start()
    try:
        launched = block.launch(get_spec(tmp_path))
        status = block.wait_ready(launched, timeout_s=READY_S)
        instance = psutil.Process(status.pid)
        pool = instance.parent().parent()
        pool.kill()
        assert psutil.wait_procs([instance], timeout=20)[1] == []
        assert launched.ended.exception(30) is not None
        block.revive()
        again = block.launch(get_spec(tmp_path))
        block.wait_ready(again, timeout_s=READY_S)
        stop(again)
    finally:
        block.stop()
        block.stop()


def test_path_that_parsl_cannot_quote_is_refused(tmp_path) -> None:
    with pytest.raises(SettingInvalid, match="state_dir"):
        Block(site="alpha", run_dir=tmp_path / "with space")


def test_block_that_was_not_started_is_refused(tmp_path) -> None:
    with pytest.raises(BlockFailed, match="not been started"):
        Block(site="alpha", run_dir=tmp_path).launch(get_spec(tmp_path))


OWNER = """
import sys, time
from pathlib import Path
from fabric.launch.block import Block
from fabric.testing.instance import MODULE
from fabric.testing.rig import get_spec
directory = Path(sys.argv[1])
block = Block(site="alpha", run_dir=directory, instance_module=MODULE)
block.start()
launched = block.launch(get_spec(directory))
print(block.wait_ready(launched, timeout_s=60).pid, flush=True)
if sys.argv[2] == "stop":
    block.stop()
    print("stopped", flush=True)
time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "stop"])
def test_nothing_is_left_when_the_owner_ends(tmp_path, how) -> None:
    argv = [sys.executable, "-c", OWNER, str(tmp_path), how]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, env=os.environ) as owner:
        instance = psutil.Process(int(owner.stdout.readline()))
        left = [instance, *guarded_by(owner.pid)]
        if how == "killed":
            owner.send_signal(signal.SIGKILL)
        else:
            assert owner.stdout.readline() == b"stopped\n"
        assert psutil.wait_procs(left, timeout=20)[1] == []
        owner.kill()
