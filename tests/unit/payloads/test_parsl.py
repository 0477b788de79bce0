"""Arrays of real Parsl apps travel by proxy, and only where that was asked for."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).with_name("parsl_script.py")


def test_serializers_are_as_before_afterwards(file_config) -> None:
    from parsl.serialize import facade

    from fabric.payloads import PayloadStore
    from fabric.payloads.parsl import proxied_arguments

    before = dict(facade.methods_for_data)
    with PayloadStore(file_config) as store:
        with proxied_arguments(store, threshold_bytes=1000):
            large, small = facade.serialize(np.ones(10_000)), facade.serialize(np.ones(10))
            assert len(large) < 5_000
            assert (facade.deserialize(large) == np.ones(10_000)).all()
            assert (facade.deserialize(small) == np.ones(10)).all()
            # What a store cannot hold still travels, as ever.
            mixed = facade.serialize([np.array([{1}] * 1000, dtype=object)])
            assert facade.deserialize(mixed)[0][0] == {1}
        assert len(facade.serialize(np.ones(10_000))) > 80_000
    assert facade.methods_for_data == before


@pytest.mark.slow
def test_fifty_megabytes_go_through_workers_by_proxy(configs, tmp_path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), configs["redis"].model_dump_json(), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["in_the_worker"] == "Proxy"
    assert said["came_back"] == "Proxy"
    assert said["largest_message_bytes"] < 10_000
    assert said["right"]
