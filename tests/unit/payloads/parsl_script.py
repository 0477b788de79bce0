"""A 50 MB array to a Parsl worker and back; a program, since Parsl ships a script's functions."""

import json
import sys
from pathlib import Path

import numpy as np
import parsl
from parsl.executors import HighThroughputExecutor
from parsl.providers import LocalProvider
from parsl.serialize import facade
from pydantic import TypeAdapter

from fabric.payloads import PayloadStore, StoreConfig
from fabric.payloads.parsl import proxied_arguments


@parsl.python_app
def double(array, config_json):
    from pydantic import TypeAdapter

    from fabric.payloads import PayloadStore, StoreConfig

    with PayloadStore(TypeAdapter(StoreConfig).validate_json(config_json)) as store:
        return type(array).__name__, store.proxy(array * 2)


def main(config_json: str, run_dir: str) -> None:
    programs = Path(sys.executable).parent
    executor = HighThroughputExecutor(
        address="127.0.0.1",
        loopback_address="127.0.0.1",
        max_workers_per_node=1,
        interchange_launch_cmd=[str(programs / "interchange.py")],
        provider=LocalProvider(worker_init=f"export PATH={programs}:$PATH"),
    )
    sizes = []
    pack = facade.pack_buffers
    facade.pack_buffers = lambda buffers: sizes.append(len(packed := pack(buffers))) or packed
    array = np.random.default_rng(1).random(50 * 125_000)
    config = TypeAdapter(StoreConfig).validate_json(config_json)
    with (
        parsl.load(parsl.Config(executors=[executor], run_dir=run_dir, initialize_logging=False)),
        PayloadStore(config) as store,
        proxied_arguments(store),
    ):
        in_the_worker, result = double(array, config_json).result()
        report = {
            "in_the_worker": in_the_worker,
            "came_back": type(result).__name__,
            "largest_message_bytes": max(sizes),
            "right": bool((result == 2 * array).all()),
        }
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
