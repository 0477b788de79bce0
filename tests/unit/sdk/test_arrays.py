"""Arrays are written as safetensors reads them, and files that lie are refused."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
import torch
from safetensors.numpy import load
from safetensors.torch import save

from fabric.errors import PayloadInvalid
from fabric.sdk.arrays import as_array, join, read_tensors, write_tensors


def test_safetensors_reads_what_is_written() -> None:
    arrays = {
        "floats": np.arange(6, dtype=np.float32).reshape(2, 3),
        "halves": np.ones(3, dtype=np.float16),
        "integers": np.array([[1], [2]]),
        "truths": np.array([True, False]),
        "nothing": np.zeros((0, 4), dtype=np.float32),
        "a number": np.array(2.5, dtype=np.float32),
    }
    found = load(write_tensors(arrays, {"about": "this"}))
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert (found[name] == array).all()


def test_what_torch_wrote_is_read_and_bfloat16_is_exact() -> None:
    x = torch.randn(4, 3)
    tensors = {"b": x.bfloat16(), "f": x, "h": x.half(), "i": torch.tensor([-(2**40)])}
    arrays, metadata = read_tensors(save(tensors, {"positions:b": "[1, 2]"}))
    assert metadata == {"positions:b": "[1, 2]"}
    assert arrays["b"].dtype == np.float32
    for name, tensor in tensors.items():
        assert (torch.tensor(arrays[name]) == tensor.to(torch.tensor(arrays[name]).dtype)).all()


def _file(header: object, body: bytes = b"") -> bytes:
    head = json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + body


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 8,
        b"\xff" * 64,
        _file([]),
        _file({"x": 3}),
        _file({"x": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
        _file({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, bytes(4)),
        _file({"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, bytes(4)),
        _file({"x": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 4]}}, bytes(4)),
        _file({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}, bytes(4)),
        _file({"x": {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]}}, bytes(4)),
    ],
)
def test_files_that_lie_are_refused(data: bytes) -> None:
    with pytest.raises(PayloadInvalid):
        read_tensors(data)


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        ([1.0, 2.0], np.float32),
        (np.float64(3), np.float32),
        (np.arange(3, dtype=np.uint8), np.int64),
        (torch.ones(2, dtype=torch.bfloat16, requires_grad=True), np.float32),
        (np.ones(2, dtype=">f4"), np.float32),
        (np.ones((4, 4))[:, ::2].T, np.float32),
        (True, np.bool_),
    ],
)
def test_anything_numeric_becomes_an_array_of_the_wire(value: object, dtype: type) -> None:
    array = as_array(value)
    assert array.dtype == dtype
    assert array.flags.c_contiguous


@pytest.mark.parametrize("value", [["a"], [1j], object(), None, np.array(["2020"], "M8")])
def test_what_is_no_number_is_refused(value: object) -> None:
    with pytest.raises(TypeError):
        as_array(value)


def test_steps_are_joined_along_positions_and_else_side_by_side() -> None:
    steps = [
        ({"h": np.ones((2, 3)), "n": np.array(1.0)}, {"positions:h": "[0, 1]"}),
        ({"h": np.zeros((1, 3)), "n": np.array(2.0)}, {"positions:h": "[2]"}),
    ]
    arrays, metadata = join(steps)
    assert arrays["h"].shape == (3, 3)
    assert arrays["n"].tolist() == [1.0, 2.0]
    assert json.loads(metadata["positions:h"]) == [0, 1, 2]
