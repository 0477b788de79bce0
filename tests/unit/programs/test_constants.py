"""Constants: a safetensors header is believed only when all of it is consistent."""

from __future__ import annotations

import base64
import hashlib
import json
import struct
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from fabric.errors import ProgramInvalid, ProgramTooLarge
from fabric.messages.program import Constants, Program, ProgramRun
from fabric.programs import TensorSpec, read_constants, read_header

TENSORS = {
    "a": torch.ones(2, 3),
    "b": torch.ones(4, dtype=torch.bfloat16),
    "empty": torch.ones(0, 5, dtype=torch.float16),
    "ids": torch.ones(2, dtype=torch.int64),
    "mask": torch.ones(3, dtype=torch.bool),
    "one": torch.tensor(1.0),
}


def file_of(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(**changes: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes


def test_what_safetensors_writes_is_read_as_it_is() -> None:
    assert read_header(save(TENSORS, metadata={"by": "me"})) == {
        name: TensorSpec(tuple(x.shape), str(x.dtype).removeprefix("torch."))
        for name, x in TENSORS.items()
    }


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x01" * 7,
        file_of({}, length=5),
        file_of(b"not json"),
        file_of(b"[1]"),
        file_of(b'{"a":' * 2000),
        file_of(b'{"a": 1, "a": 2}'),
        file_of({"a": entry()}, b"\0" * 7),
        file_of({"a": entry()}, b"\0" * 9),
        file_of({"a": entry(dtype="F64")}, b"\0" * 8),
        file_of({"a": entry(dtype=["F32"])}, b"\0" * 8),
        file_of({"a": entry(shape=[3])}, b"\0" * 8),
        file_of({"a": entry(shape=[-2])}, b"\0" * 8),
        file_of({"a": entry(shape=[True, 2])}, b"\0" * 8),
        file_of({"a": entry(shape=[2.0])}, b"\0" * 8),
        file_of({"a": entry(shape=[2**62, 2])}, b"\0" * 8),
        file_of({"a": entry(shape=[1] * 9)}, b"\0" * 4),
        file_of({"a": entry(shape="2")}, b"\0" * 8),
        file_of({"a": entry(data_offsets=[8, 0])}, b"\0" * 8),
        file_of({"a": entry(data_offsets=[0, 8, 8])}, b"\0" * 8),
        file_of({"a": entry(data_offsets=[4, 12])}, b"\0" * 12),
        file_of({"a": entry(more=1)}, b"\0" * 8),
        file_of({"a": 1}, b"\0" * 8),
        file_of({"a": entry(), "b": entry()}, b"\0" * 8),
        file_of({"a": entry(), "b": entry(data_offsets=[4, 12])}, b"\0" * 12),
        file_of({"../a": entry()}, b"\0" * 8),
        file_of({"": entry()}, b"\0" * 8),
    ],
)
def test_a_header_that_lies_is_refused(data: bytes) -> None:
    with pytest.raises(ProgramInvalid, match="safetensors"):
        read_header(data)


def test_a_header_without_bounds_is_too_large() -> None:
    with pytest.raises(ProgramTooLarge, match="header"):
        read_header(file_of({}, length=2**63))
    many = {f"t{i}": entry(shape=[0], data_offsets=[0, 0]) for i in range(17_000)}
    with pytest.raises(ProgramTooLarge, match="number of constants"):
        read_header(file_of(many))


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.binary(max_size=64), st.integers(0, 400), st.integers(1, 255))
def test_damaged_files_are_refused_or_read_with_a_type(
    junk: bytes, place: int, change: int
) -> None:
    good = bytearray(save(TENSORS))
    good[place % len(good)] ^= change
    for data in (junk, bytes(good), bytes(good[: place % len(good)])):
        with suppress(ProgramInvalid, ProgramTooLarge):
            read_header(data)


def program_with(content: bytes, **changes: object) -> Program:
    fields = {
        "sha256": hashlib.sha256(content).hexdigest(),
        "size": len(content),
        "data": base64.b64encode(content).decode(),
    }
    return Program(
        runs=(ProgramRun(id="r", ids=(1,)),), consts=Constants.model_validate(fields | changes)
    )


def test_inline_constants_are_what_they_declare() -> None:
    data = save(TENSORS)
    assert read_constants(program_with(data)) == data
    assert read_constants(Program(runs=(ProgramRun(id="r", ids=(1,)),))) is None
    assert read_constants(program_with(data, data=None, handle={"store": "x"})) is None
    for changes, reason in (
        ({"data": "no base64!"}, "base64"),
        ({"data": "é"}, "base64"),
        ({"size": len(data) + 1}, "bytes"),
        ({"sha256": "0" * 64}, "sha256"),
    ):
        with pytest.raises(ProgramInvalid, match=reason):
            read_constants(program_with(data, **changes))
