"""Tensors of stored files that nobody has looked at: what a site left may be anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fabric.errors import ProgramTooLarge
from fabric.gateway.constants import pick
from fabric.testing.fixed_programs import zeros

GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def safetensors(header: object, body: bytes = bytes(16)) -> bytes:
    head = json.dumps(header).encode()
    return len(head).to_bytes(8, "little") + head + body


def test_one_tensor_is_read_without_the_others(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(zeros({"a": ("F32", (4,)), "b": ("I64", (3,))}))
    found = pick(path, "b", 100)
    assert (found.entry, found.data) == ({"dtype": "I64", "shape": [3]}, bytes(24))
    with pytest.raises(ProgramTooLarge):
        pick(path, "b", 23)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 100,
        b"\x02" + bytes(7) + b"{]",
        safetensors([]),
        safetensors({}),
        safetensors({"h": None}),
        safetensors({"h": {}}),
        safetensors({"h": {**GOOD, "data_offsets": [-8, 0]}}),
        safetensors({"h": {**GOOD, "data_offsets": [8, 0]}}),
        safetensors({"h": {**GOOD, "data_offsets": [0, 10**30]}}),
        safetensors({"h": {**GOOD, "data_offsets": ["0", 8]}}),
        safetensors({"h": {**GOOD, "data_offsets": 8}}),
        (10**5).to_bytes(8, "little") + b"[" * 10**5,
    ],
)
def test_a_file_that_lies_is_no_tensor(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises((ValueError, KeyError, TypeError, AttributeError, RecursionError)):
        pick(path, "h", 2**20)
