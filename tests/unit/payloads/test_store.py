"""References lead to the payload that was put, in another process too, or say why not."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from fabric.config import load_store, save_store
from fabric.errors import (
    PayloadDamaged,
    PayloadInvalid,
    PayloadMissing,
    PayloadTooLarge,
    SettingInvalid,
    StoreUnreachable,
    UnknownStore,
)
from fabric.payloads import (
    Bounds,
    EndpointStore,
    FileStore,
    PayloadStore,
    RedisStore,
    Reference,
    StoreConfig,
)
from fabric.testing.stores import running_endpoint, running_peers, running_redis

DEADLINE_S = 60.0


@pytest.fixture
def store(config: StoreConfig):
    with PayloadStore(config) as store:
        yield store


def elsewhere(program: str, *args: str) -> str:
    """Run a program in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", program, *args], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def wait_until(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.02)


@pytest.mark.parametrize("megabytes", [12, 50])
def test_large_array_comes_back_in_another_process(store, megabytes) -> None:
    array = np.random.default_rng(1).random(megabytes * 125_000)
    reference = store.put({"activations": array})
    assert array.nbytes < reference.size_bytes < array.nbytes + 1000
    read = """
import sys
from pydantic import TypeAdapter
from fabric.payloads import PayloadStore, Reference, StoreConfig
config = TypeAdapter(StoreConfig).validate_json(sys.argv[1])
with PayloadStore(config) as store:
    value = store.resolve(Reference.model_validate_json(sys.argv[2]))
print(repr(float(value["activations"].sum())))
"""
    config_json = store.config.model_dump_json()
    said = elsewhere(read, config_json, reference.model_dump_json())
    assert float(said) == array.sum()


def test_reference_is_plain_json(store) -> None:
    reference = store.put([1])
    again = Reference.model_validate(json.loads(json.dumps(reference.model_dump(mode="json"))))
    assert again == reference
    assert store.resolve(again) == [1]


def test_payload_outlives_the_store_that_put_it(config) -> None:
    with PayloadStore(config) as store:
        reference = store.put("kept")
    with PayloadStore(config) as store:
        assert store.resolve(reference) == "kept"


def test_closed_store_connects_again(store) -> None:
    reference = store.put("kept")
    store.close()
    store.close()
    assert store.resolve(reference) == "kept"


def test_evicted_payload_is_missing(store) -> None:
    reference = store.put("once")
    assert store.resolve(reference, evict=True) == "once"
    with pytest.raises(PayloadMissing, match="evicted"):
        store.resolve(reference)
    store.evict(reference)


def test_other_bytes_are_refused(store) -> None:
    reference, other = store.put("wanted"), store.put("forged")
    forged = reference.model_copy(update={"key": other.key})
    with pytest.raises(PayloadDamaged, match="sha256"):
        store.resolve(forged)
    shorter = reference.model_copy(update={"size_bytes": 1})
    with pytest.raises(PayloadDamaged, match="bytes"):
        store.resolve(shorter)


def test_bytes_that_are_no_payload_are_refused(store) -> None:
    with pytest.raises(PayloadInvalid):
        store.resolve(store.put_encoded(pickle.dumps({"a": 1})))


def test_payload_over_the_store_or_the_bounds_is_refused(config) -> None:
    small = config.model_copy(update={"max_bytes": 200})
    with PayloadStore(small) as store, pytest.raises(PayloadTooLarge, match="raise max_bytes"):
        store.put("x" * 200)
    with PayloadStore(config, bounds=Bounds(max_bytes=200)) as store:
        reference = store.put("x" * 200)
        with pytest.raises(PayloadTooLarge):
            store.resolve(reference)


def test_reference_to_another_store_is_refused(store) -> None:
    reference = store.put(1)
    other = {"file": "redis", "redis": "endpoint", "endpoint": "file"}[reference.kind]
    for update in ({"store": "elsewhere"}, {"kind": other}):
        with pytest.raises(UnknownStore, match="is configured here"):
            store.resolve(reference.model_copy(update=update))


@pytest.mark.parametrize(
    "key", [[], ["../../etc/passwd"], [f"{'0' * 8}-..{'0' * 2}-0000-0000-{'0' * 12}"], ["x"] * 3]
)
def test_key_leads_nowhere_but_into_the_store(store, key) -> None:
    fields = store.put(1).model_dump(mode="json")
    with pytest.raises(ValidationError):
        Reference.model_validate(fields | {"key": key})


def test_key_of_another_kind_is_refused(store) -> None:
    reference = store.put(1)
    object_id, stranger = reference.key[0], "00000000-0000-4000-8000-000000000000"
    wrong = (object_id, stranger)
    with pytest.raises(PayloadInvalid, match="its key"):
        store.resolve(reference.model_copy(update={"key": wrong}))


def test_threads_share_a_store(store) -> None:
    def there_and_back(number: int) -> bool:
        array = np.full(100_000, number)
        return bool((store.resolve(store.put(array), evict=True) == array).all())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(there_and_back, range(32)))


def test_proxy_resolves_in_another_process(store) -> None:
    # A worker of a pool is given it as one of Parsl's is: the proxy travels, the payload does not.
    proxy = store.proxy(np.arange(100_000))
    assert len(pickle.dumps(proxy)) < 5_000
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        assert pool.submit(np.sum, proxy).result(timeout=60) == sum(range(100_000))


@pytest.mark.parametrize("kind", ["file", "redis", "endpoint"])
def test_expired_payload_is_missing_and_its_bytes_go(configs, kind) -> None:
    config = configs[kind].model_copy(update={"ttl_s": 0.2, "name": "short"})
    if kind == "file":
        config = config.model_copy(update={"directory": config.directory / "short"})
    with PayloadStore(config) as store, PayloadStore(configs[kind]) as lasting:
        reference = store.put("gone soon")
        kept = lasting.put("kept")

        def expired(reference: Reference) -> bool:
            try:
                store.resolve(reference)
            except PayloadMissing:
                return True
            return False

        wait_until(lambda: expired(reference))
        store.sweep()
        # A reader whose clock is slow finds nothing either, once the store's own clock is as far.
        late = reference.model_copy(update={"expires_at": kept.expires_at})
        wait_until(lambda: expired(late))
        with pytest.raises(PayloadMissing, match="evicted"):
            store.resolve(late)
        assert lasting.resolve(kept) == "kept"
        assert store.sweep() == 0


def test_sweep_takes_what_a_killed_writer_left_and_nothing_else(file_config) -> None:
    with PayloadStore(file_config) as store:
        lasting = store.put("kept")
        half = file_config.directory / "00000000-0000-4000-8000-000000000000"
        stranger = file_config.directory / "notes.txt"
        for path in (half, stranger):
            path.write_text("old")
            os.utime(path, (1.0, 1.0))
        assert store.sweep() == 1
        assert not half.exists()
        assert stranger.exists()
        assert store.resolve(lasting) == "kept"


def test_directory_is_private_and_stays(file_config) -> None:
    with PayloadStore(file_config) as store:
        store.put(1)
    assert file_config.directory.stat().st_mode & 0o777 == 0o700


def test_flipped_byte_on_disk_is_found(file_config) -> None:
    with PayloadStore(file_config) as store:
        reference = store.put(np.zeros(1000))
        path = file_config.directory / reference.key[0]
        data = bytearray(path.read_bytes())
        data[-100] ^= 1
        path.write_bytes(data)
        with pytest.raises(PayloadDamaged):
            store.resolve(reference)


def test_directory_that_cannot_be_is_named(tmp_path) -> None:
    (tmp_path / "file").write_text("in the way")
    config = FileStore(kind="file", name="nowhere", directory=tmp_path / "file" / "payloads")
    with PayloadStore(config) as store, pytest.raises(StoreUnreachable, match="file store"):
        store.put(1)


def test_redis_that_is_not_there_is_named(tmp_path, free_port) -> None:
    config = RedisStore(kind="redis", name="nowhere", host="127.0.0.1", port=free_port)
    with PayloadStore(config) as store, pytest.raises(StoreUnreachable, match="redis store"):
        store.put(1)


def test_store_that_dies_is_unreachable_and_not_waited_for(tmp_path) -> None:
    with running_redis(tmp_path / "redis") as config, PayloadStore(config) as store:
        reference = store.put(1)
        store.resolve(reference)
        running = config
    with PayloadStore(running) as store, pytest.raises(StoreUnreachable):
        store.resolve(reference)


def test_endpoint_that_dies_and_returns(tmp_path) -> None:
    with running_endpoint(tmp_path / "endpoint") as config:
        store = PayloadStore(config)
        reference = store.put(1)
    with pytest.raises(StoreUnreachable, match="endpoint store"):
        store.resolve(reference)
    with pytest.raises(StoreUnreachable):
        store.put(2)
    store.close()
    with pytest.raises(StoreUnreachable):
        store.put(2)


@pytest.mark.slow
def test_payload_comes_from_the_endpoint_of_another_site(tmp_path) -> None:
    array = np.random.default_rng(1).random(12 * 125_000)
    with (
        running_peers(tmp_path) as (hub, site),
        PayloadStore(hub) as reader,
        PayloadStore(site) as writer,
    ):
        reference = writer.put(array)
        assert reference.key[1] == str(site.endpoints[1])
        assert (reader.resolve(reference, evict=True) == array).all()
        with pytest.raises(PayloadMissing):
            writer.resolve(reference)


def test_unknown_endpoint_is_unreachable(tmp_path) -> None:
    config = EndpointStore(
        kind="endpoint",
        name="nowhere",
        endpoints=("00000000-0000-4000-8000-000000000000",),
        proxystore_dir=tmp_path,
    )
    with PayloadStore(config) as store, pytest.raises(StoreUnreachable, match="Failed to find"):
        store.put(1)


def test_writer_killed_in_the_middle_leaves_nothing_to_read(file_config) -> None:
    write = """
import os, signal, sys, threading
from pathlib import Path
import numpy as np
from fabric.payloads import FileStore, PayloadStore
directory = Path(sys.argv[1])
def watch():
    while not any(path.stat().st_size for path in directory.glob("*") if not path.suffix):
        pass
    os.kill(os.getpid(), signal.SIGKILL)
threading.Thread(target=watch).start()
with PayloadStore(FileStore(kind="file", name="scratch", directory=directory)) as store:
    while True:
        store.put(np.zeros(4_000_000))
"""
    file_config.directory.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", write, str(file_config.directory)],
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    written = [path for path in file_config.directory.iterdir() if not path.suffix]
    assert written
    with PayloadStore(file_config) as store:
        lasting = store.put("kept")
        fields = lasting.model_dump() | {"size_bytes": 32_000_000}
        for path in written:
            reference = Reference.model_validate(fields | {"key": (path.name,)})
            with pytest.raises((PayloadMissing, PayloadDamaged)):
                store.resolve(reference)


def test_configuration_is_data(tmp_path) -> None:
    adapter = TypeAdapter(StoreConfig)
    redis = adapter.validate_python({"kind": "redis", "name": "r", "host": "h", "port": 1})
    save_store(redis, tmp_path / "run")
    assert load_store(tmp_path / "run") == redis
    assert load_store(tmp_path) is None
    assert (tmp_path / "run" / "store.json").stat().st_mode & 0o777 == 0o600
    for wrong in (
        {"kind": "s3"},
        {"kind": "file"},
        {"kind": "file", "directory": "relative"},
        {"kind": "redis", "host": "h", "port": 0},
    ):
        with pytest.raises(ValidationError):
            adapter.validate_python({"name": "wrong"} | wrong)
    (tmp_path / "store.json").write_text('{"kind": "pickle"}')
    with pytest.raises(SettingInvalid, match="store"):
        load_store(tmp_path)
