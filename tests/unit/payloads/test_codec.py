"""Payloads survive as bytes, any safetensors reader opens them, and lies are found out."""

import enum
import json
import math
import subprocess
import sys
import tracemalloc
from contextlib import suppress

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fabric.errors import PayloadInvalid, PayloadTooLarge
from fabric.payloads import Bounds, RawTensor, decode, encode
from fabric.payloads.codec import METADATA

NUMPY_TYPES = ["?", "u1", "i1", "u2", "i2", "f2", "u4", "i4", "f4", "u8", "i8", "f8", "c8", ">f4"]
TORCH_TYPES = [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float32, torch.bool]

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.sampled_from(
    ["$tensor", "$ref", "$$", "as", ""]
)
shapes = arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
numpy_arrays = st.sampled_from(NUMPY_TYPES).flatmap(lambda name: arrays.arrays(name, shapes))
torch_tensors = st.builds(
    lambda shape, dtype: (torch.rand(shape) * 4).to(dtype), shapes, st.sampled_from(TORCH_TYPES)
)
raw_tensors = st.binary(max_size=8).map(
    lambda data: RawTensor("BF16", (len(data) // 2,), data[: len(data) // 2 * 2])
)
leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts
    | st.binary(max_size=16)
    | numpy_arrays
    | torch_tensors
    | raw_tensors
)
payloads = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)


def same(left: object, right: object) -> bool:
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, np.ndarray):
        little = left.dtype.newbyteorder("<")
        return right.dtype == little and right.tobytes() == left.astype(little).tobytes()
    if isinstance(left, torch.Tensor):
        return (left.dtype, left.shape) == (right.dtype, right.shape) and torch.equal(
            left.to(torch.float32), right.to(torch.float32)
        )
    return left == right


@given(payloads)
def test_payload_round_trips(value: object) -> None:
    data = encode(value)
    again = decode(data)
    assert same(value, again)
    assert encode(again) == data


def test_key_order_does_not_change_the_bytes() -> None:
    ones = np.ones(3)
    assert encode({"a": ones, "b": [1]}) == encode({"b": [1], "a": ones})


@pytest.mark.parametrize("name", NUMPY_TYPES)
def test_safetensors_reads_what_we_write(name: str) -> None:
    array = np.arange(6).reshape(2, 3).astype(name)
    assert (safetensors.numpy.load(encode(array))["0"] == array).all()


def test_safetensors_reads_bfloat16_for_torch() -> None:
    tensor = torch.randn(4, 2, dtype=torch.bfloat16)
    # By safetensors' own reader, the independent witness of our bytes; it unpickles nothing.
    told = dict(safetensors.deserialize(encode([tensor])))["0"]
    assert (told["dtype"], told["shape"]) == ("BF16", [4, 2])
    assert bytes(told["data"]) == tensor.view(torch.uint8).numpy().tobytes()


def test_we_read_what_safetensors_writes() -> None:
    tensors = {
        "weights": np.arange(6, dtype="f4").reshape(2, 3),
        "value": np.frombuffer(b'{"w":{"$tensor":"weights","as":"numpy"}}', "u1"),
    }
    value = decode(safetensors.numpy.save(tensors, metadata=METADATA))
    assert (value["w"] == tensors["weights"]).all()


def test_every_tensor_is_aligned_to_its_type() -> None:
    data = encode([np.ones(3, "u1"), np.ones(3, "f8"), np.ones(1, "f2"), np.ones(1, "f4")])
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    widths = {"F64": 8, "F32": 4, "F16": 2, "U8": 1}
    for name, entry in header.items():
        if name != "__metadata__":
            assert (8 + length + entry["data_offsets"][0]) % widths[entry["dtype"]] == 0


def test_arrays_come_back_writable_and_independent() -> None:
    data = bytearray(encode(np.zeros(4)))
    array = decode(data)
    array += 1
    assert (decode(data) == 0).all()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(2, 3, dtype=torch.complex64).conj(),
        torch.randn(4, 3).t(),
        torch.nn.Parameter(torch.randn(3)),
        torch.randn(6)[::2],
        torch.tensor(2.5),
    ],
    ids=["conjugated", "transposed", "parameter", "strided", "scalar"],
)
def test_torch_views_keep_their_values(tensor: torch.Tensor) -> None:
    again = decode(encode(tensor))
    assert again.shape == tensor.shape
    assert torch.equal(again, tensor.detach())


def test_without_the_libraries_tensors_stay_raw() -> None:
    program = """
import sys
sys.modules["numpy"] = None
from fabric.payloads import decode, encode
data = sys.stdin.buffer.read()
value = decode(data)
assert encode(value["only"]) and value["only"].dtype == "BF16", value
assert "torch" not in sys.modules
print(value["f"].dtype, value["text"])
"""
    value = {"only": torch.ones(2, dtype=torch.bfloat16), "f": np.ones(2, "f4"), "text": "é"}
    done = subprocess.run(
        [sys.executable, "-c", program], input=encode(value), capture_output=True, check=False
    )
    assert done.stdout.decode() == "F32 é\n", done.stderr.decode()


def test_bfloat16_without_torch_keeps_type_and_bytes() -> None:
    program = (
        "import sys; from fabric.payloads import decode; print(decode(sys.stdin.buffer.read()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=encode(torch.ones(1, dtype=torch.bfloat16)),
        capture_output=True,
        check=False,
    )
    assert b"RawTensor(dtype='BF16', shape=(1,)" in done.stdout, done.stderr.decode()


class Colour(enum.Enum):
    RED = 1


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (math.nan, "not finite"),
        ([math.inf], "not finite"),
        ({1: 2}, "keys are not all strings"),
        ({"a": {1}}, "type set"),
        (object(), "type object"),
        (Colour.RED, "type Colour"),
        ("\ud800", "no JSON"),
        (10**5000, "no JSON"),
        (np.array([object()]), "object"),
        (np.array(["text"]), "<U4"),
        (np.zeros(2, "c16"), "complex128"),
        (np.zeros(2, "M8[s]"), "datetime64"),
        (np.ma.masked_array([1, 2], [0, 1]), "MaskedArray"),
        (np.zeros((1,) * 20), "16 sizes"),
        (torch.eye(2).to_sparse(), "dense"),
        (torch.zeros(1, dtype=torch.complex128), "complex128"),
    ],
    ids=lambda value: str(type(value).__name__),
)
def test_what_is_no_payload_is_refused_by_name(value: object, reason: str) -> None:
    with pytest.raises(PayloadInvalid) as refused:
        encode({"here": [value]})
    assert reason in refused.value.message


def test_nesting_is_bounded_even_when_it_has_no_end() -> None:
    endless: list[object] = []
    endless.append(endless)
    with pytest.raises(PayloadInvalid, match="nested in more than 64 levels"):
        encode(endless)


def container(
    header: object, body: bytes = b"", *, value: bytes = b"[]", length: int | None = None
) -> bytes:
    """Return a container whose header is the given text, or entries beside the value's."""
    if isinstance(header, dict):
        end = len(body)
        entry = {"dtype": "U8", "shape": [len(value)], "data_offsets": [end, end + len(value)]}
        header = json.dumps({"__metadata__": METADATA, "value": entry, **header})
    head = header.encode() if isinstance(header, str) else header
    return (len(head) if length is None else length).to_bytes(8, "little") + head + body + value


def floats(begin: int, end: int, *, dtype: str = "F32", shape: object = (2,)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


PLACE = b'{"$tensor":"0","as":"numpy"}'
HUGE = 2**62
LIES = {
    "empty": b"",
    "short": b"\0\0\0",
    "header beyond the end": container({}, length=500),
    "header of exabytes": container({}, length=2**63),
    "header is no JSON": container("{"),
    "header is a list": container("[]"),
    "header is not unicode": container(b"\xff\xff"),
    "header nested too deep": container("[" * 100_000),
    "no metadata": container("{}"),
    "metadata of another format": container('{"__metadata__":{"format":"pt"}}'),
    "name twice": container(
        '{"__metadata__":{"fabric":"payload/1"},'
        + ",".join(['"value":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}'] * 2)
        + "}"
    ),
    "no value": container(json.dumps({"__metadata__": METADATA}), value=b""),
    "value is of floats": container({"value": floats(0, 8)}, value=b"12345678"),
    "unknown type": container({"0": floats(0, 8, dtype="F1024")}, bytes(8), value=PLACE),
    "type is a number": container({"0": {**floats(0, 8), "dtype": 3}}, bytes(8), value=PLACE),
    "field missing": container({"0": {"dtype": "F32", "shape": [2]}}, bytes(8), value=PLACE),
    "field unknown": container({"0": {**floats(0, 8), "x": 1}}, bytes(8), value=PLACE),
    "entry is a list": container({"0": [1]}, bytes(8), value=PLACE),
    "shape too large": container({"0": floats(0, 8, shape=[HUGE])}, bytes(8), value=PLACE),
    "shape overflows": container({"0": floats(0, 8, shape=[HUGE, 4])}, bytes(8), value=PLACE),
    "shape overflows beside zero": container({"0": floats(0, 0, shape=[0, HUGE])}, value=PLACE),
    "shape negative": container({"0": floats(0, 8, shape=[-2, -1])}, bytes(8), value=PLACE),
    "shape of floats": container({"0": floats(0, 8, shape=[2.0])}, bytes(8), value=PLACE),
    "shape of truths": container({"0": floats(0, 4, shape=[True])}, bytes(4), value=PLACE),
    "shape too long": container({"0": floats(0, 8, shape=[1] * 99)}, bytes(8), value=PLACE),
    "shape smaller than data": container({"0": floats(0, 8, shape=[1])}, bytes(8), value=PLACE),
    "offsets beyond the end": container({"0": floats(0, HUGE)}, bytes(8), value=PLACE),
    "offsets backwards": container({"0": floats(8, 0)}, bytes(8), value=PLACE),
    "offsets negative": container({"0": floats(-8, 0)}, bytes(8), value=PLACE),
    "offsets overlap": container({"0": floats(0, 8), "1": floats(4, 12)}, bytes(12), value=PLACE),
    "offsets leave a hole": container({"0": floats(4, 12)}, bytes(12), value=PLACE),
    "bytes at the end": container({}) + b"x",
    "truths that are neither": container({"0": floats(0, 2, dtype="BOOL")}, b"\1\2", value=PLACE),
    "tensor unused": container({"0": floats(0, 8)}, bytes(8)),
    "tensor used twice": container(
        {"0": floats(0, 8)}, bytes(8), value=b"[" + PLACE + b"," + PLACE + b"]"
    ),
    "tensor missing": container({}, value=PLACE),
    "place malformed": container({"0": floats(0, 8)}, bytes(8), value=b'{"$tensor":"0"}'),
    "place for another kind": container(
        {"0": floats(0, 8)}, bytes(8), value=b'{"$tensor":"0","as":"pickle"}'
    ),
    "place names a list": container({}, value=b'{"$tensor":["0"],"as":["numpy"]}'),
    "bytes that are floats": container(
        {"0": floats(0, 8)}, bytes(8), value=b'{"$tensor":"0","as":"bytes"}'
    ),
    "key unknown": container({}, value=b'{"$pickle":1}'),
    "value is no JSON": container({}, value=b"{"),
    "value has NaN": container({}, value=b"[NaN]"),
    "value has -Infinity": container({}, value=b"-Infinity"),
    "value overflows": container({}, value=b"1e999"),
    "value has a key twice": container({}, value=b'{"a":1,"a":2}'),
    "value has an endless number": container({}, value=b"1" * 5000),
    "value nested too deep": container({}, value=b"[" * 100 + b"]" * 100),
    "value nested far too deep": container({}, value=b"[" * 100_000),
}


@pytest.mark.parametrize("data", LIES.values(), ids=LIES)
def test_lie_is_refused_before_it_is_believed(data: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises((PayloadInvalid, PayloadTooLarge)):
            decode(data)
        assert tracemalloc.get_traced_memory()[1] < 2**20 + 64 * len(data)
    finally:
        tracemalloc.stop()


@settings(max_examples=400)
@given(payloads, st.data())
def test_mutation_is_refused_or_another_payload(value: object, data: st.DataObject) -> None:
    mutated = bytearray(encode(value))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(mutated) - 1))
        match data.draw(st.sampled_from(["flip", "cut", "insert", "end"])):
            case "flip":
                mutated[at] = data.draw(st.integers(0, 255))
            case "cut":
                del mutated[at]
            case "insert":
                mutated[at:at] = data.draw(st.binary(min_size=1, max_size=4))
            case "end":
                del mutated[at + 1 :]
        if not mutated:
            break
    tracemalloc.start()
    try:
        with suppress(PayloadInvalid, PayloadTooLarge):
            decode(mutated)
    finally:
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak_bytes < 2**20 + 64 * len(mutated)


@pytest.mark.parametrize(
    ("bounds", "value"),
    [
        (Bounds(max_bytes=100), np.zeros(100)),
        (Bounds(max_json_bytes=100), "x" * 100),
        (Bounds(max_header_bytes=100), [np.zeros(1)]),
        (Bounds(max_tensors=1), [b"", b""]),
        (Bounds(max_depth=2), [[[]]]),
    ],
    ids=["bytes", "json", "header", "tensors", "depth"],
)
def test_bounds_hold_at_both_ends(bounds: Bounds, value: object) -> None:
    with pytest.raises((PayloadTooLarge, PayloadInvalid)):
        encode(value, bounds)
    with pytest.raises((PayloadTooLarge, PayloadInvalid)):
        decode(encode(value), bounds)


def test_nothing_unpickles() -> None:
    program = """
import sys
sys.modules["pickle"] = sys.modules["dill"] = sys.modules["_pickle"] = None
from fabric.payloads.codec import decode, encode
print(decode(encode({"a": [1, b"x"]})))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.stdout == "{'a': [1, b'x']}\n", done.stderr
