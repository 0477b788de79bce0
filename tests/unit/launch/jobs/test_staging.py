"""When weights are copied to a node's own disk."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fabric.config import Storage
from fabric.launch.jobs.staging import SPARE_BYTES, choose_staging, count_reads
from fabric.messages import EngineOptions

GB = 10**9
FAST = Storage(
    shared_read_gb_s=1.0,
    local_read_gb_s=5.0,
    local_write_gb_s=2.0,
    local_dir="/local",
    local_gb=500,
)


@pytest.mark.parametrize(
    ("changes", "pays", "words"),
    [
        # One read of 100 s is not bettered by a copy that takes as long.
        ({"reads": 1.0}, False, "1 x 100 GB take 100 s .* 120 s"),
        ({"reads": 2.0}, True, "2 x 100 GB take 200 s .* 140 s"),
        # Digests that nobody has taken are one more read of the shared file system.
        ({"reads": 2.0, "is_known": False}, False, "take 200 s .* 240 s"),
        ({"reads": 1.0, "is_there": True}, True, "an earlier job has left them"),
        ({"reads": math.inf, "is_known": False}, True, "every step reads 100 GB"),
        ({"reads": 2.0, "free_bytes": 100 * GB}, False, "too few for 100 GB"),
        (
            {"reads": 2.0, "num_bytes": 600 * GB, "free_bytes": None},
            False,
            "500 GB in /local are too few",
        ),
        # A replica tells the digests, too; it is asked where it is faster.
        ({"reads": 1.0, "replica_gb_s": 4.0}, True, "take 100 s .* 70 s .* from a replica"),
        ({"reads": 2.0, "replica_gb_s": 0.5}, True, "140 s with a copy in /local$"),
        (
            {"reads": 2.0, "replica_gb_s": 0.6, "is_known": False},
            False,
            "200 s .* 207 s .* from a replica",
        ),
        ({"reads": 1.0, "wish": "always", "replica_gb_s": 9.0}, True, "a replica, as asked"),
        ({"reads": 1.0, "replica_gb_s": 9.0, "wish": "never"}, False, "as asked"),
        ({"reads": 1.0, "replica_gb_s": 0.1, "is_missing": True}, True, "nowhere else"),
        ({"replica_gb_s": 9.0, "is_missing": True, "free_bytes": GB, "reads": 1.0}, False, "few"),
        ({"reads": 2.0, "num_bytes": None}, False, "not known"),
        ({"reads": 2.0, "wish": "never"}, False, "as asked"),
        ({"reads": 1.0, "wish": "always"}, True, "as asked"),
        ({"reads": 1.0, "wish": "always", "free_bytes": GB}, False, "too few"),
        ({"reads": 9.0, "storage": Storage()}, False, "no disk of the nodes is known"),
    ],
)
def test_the_choice_is_the_cheaper_way_and_says_so(
    changes: dict[str, object], pays: bool, words: str
) -> None:
    known = {"num_bytes": 100 * GB, "storage": FAST, "free_bytes": 400 * GB, "is_known": True}
    chosen = choose_staging(**(known | changes))  # type: ignore[arg-type]
    assert chosen.pays is pays
    assert chosen.from_replica is (pays and "replica" in chosen.reason)
    assert re.search(words, chosen.reason), chosen.reason


def test_a_slower_disk_is_not_read_at_every_step() -> None:
    slow = FAST.model_copy(update={"local_read_gb_s": 0.5})
    assert not choose_staging(num_bytes=GB, reads=math.inf, storage=slow).pays


@given(
    num_bytes=st.integers(1, 10**15),
    reads=st.floats(1, 1e6),
    rates=st.tuples(*[st.floats(0.001, 1000)] * 3),
    free_bytes=st.integers(0, 10**15),
)
def test_a_copy_never_overfills_a_disk(
    num_bytes: int, reads: float, rates: tuple[float, float, float], free_bytes: int
) -> None:
    shared, read, write = rates
    storage = Storage(
        shared_read_gb_s=shared, local_read_gb_s=read, local_write_gb_s=write, local_dir="/local"
    )
    chosen = choose_staging(
        num_bytes=num_bytes, reads=reads, storage=storage, free_bytes=free_bytes, is_known=True
    )
    assert not chosen.pays or num_bytes + SPARE_BYTES <= free_bytes
    assert not chosen.pays or reads > 1


@pytest.mark.parametrize(
    ("options", "ranks", "reads"),
    [
        ({}, (1,), 1.0),
        ({"pipeline_parallel": 2}, (1, 1), 1.5),
        ({"tensor_parallel": 4}, (4,), 2.0),
        ({"offload": "disk"}, (1,), math.inf),
        ({"backend": "vllm"}, (1,), 2.0),
    ],
)
def test_reads_of_the_first_node(
    options: dict[str, object], ranks: tuple[int, ...], reads: float
) -> None:
    assert count_reads(EngineOptions.model_validate(options), ranks) == reads


def test_a_site_file_that_names_a_disk_says_how_fast_it_is() -> None:
    with pytest.raises(ValidationError, match="say how fast both are"):
        Storage(local_dir="/local")
    with pytest.raises(ValidationError):
        Storage(shared_read_gb_s=float("nan"))
