"""A value travels in the message while it is small, and by reference when it is not."""

import base64
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabric.errors import PayloadInvalid, PayloadTooLarge, UnknownStore
from fabric.payloads import Bounds, FileStore, PayloadStore, pack, unpack

CAP_BYTES = 10_000

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
keys = texts | st.sampled_from(["$ref", "$data", "$tensor", "$"])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(-1e9, 1e9) | texts | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
)


def over_the_wire(envelope: object) -> object:
    return json.loads(json.dumps(envelope, allow_nan=False))


@pytest.fixture
def store(file_config: FileStore):
    with PayloadStore(file_config) as store:
        yield store


@given(values)
def test_value_comes_back_whatever_it_looks_like(value: object) -> None:
    assert unpack(over_the_wire(pack(value, cap_bytes=CAP_BYTES))) == value


def test_plain_json_stands_for_itself() -> None:
    value = {"events": [{"$ref": {"in": "here"}}], "$data": "beside", "$ref": 1}
    assert pack(value, cap_bytes=CAP_BYTES) is value
    assert unpack(value) is value


def test_small_array_is_in_the_message(store) -> None:
    envelope = over_the_wire(pack({"a": np.arange(10)}, cap_bytes=CAP_BYTES, store=store))
    assert list(envelope) == ["$data"]
    assert (unpack(envelope)["a"] == np.arange(10)).all()


@pytest.mark.parametrize(
    "value", ["x" * 6000, {"a": [list(range(2000))]}, {"$ref": "x" * 6000}], ids=type
)
def test_large_value_is_a_reference_where_there_is_a_store(store, value) -> None:
    envelope = over_the_wire(pack(value, threshold_bytes=5000, cap_bytes=CAP_BYTES, store=store))
    assert list(envelope) == ["$ref"]
    assert len(json.dumps(envelope)) < 500
    assert unpack(envelope, [store], evict=True) == value
    assert not list(store.config.directory.iterdir())


def test_value_over_the_cap_is_a_reference_whatever_the_threshold(store) -> None:
    assert "$ref" in pack("x" * CAP_BYTES, cap_bytes=CAP_BYTES, store=store)


def test_without_a_store_the_cap_holds_and_the_remedy_is_named() -> None:
    inside = "x" * (CAP_BYTES - 2)
    assert pack(inside, threshold_bytes=5000, cap_bytes=CAP_BYTES) is inside
    with pytest.raises(PayloadTooLarge) as refused:
        pack(inside + "x", cap_bytes=CAP_BYTES)
    assert "10001 bytes and at most 10000" in refused.value.message
    assert "configure a store in the site's file" in refused.value.message


@pytest.mark.parametrize("num_bytes", range(7000, 7600, 50))
def test_what_is_within_the_cap_is_within_it_as_text(num_bytes: int) -> None:
    try:
        envelope = pack(np.zeros(num_bytes, "u1"), cap_bytes=CAP_BYTES)
    except PayloadTooLarge:
        assert num_bytes > 7000
    else:
        assert len(envelope["$data"]) <= CAP_BYTES


def test_reference_to_a_store_that_is_not_here_names_it(store) -> None:
    envelope = pack("x" * 6000, threshold_bytes=5000, cap_bytes=CAP_BYTES, store=store)
    with pytest.raises(UnknownStore, match="'scratch' is configured here \\(there is none\\)"):
        unpack(envelope)


@pytest.mark.parametrize(
    "envelope",
    [
        {"$ref": None},
        {"$ref": {}},
        {"$ref": {"store": "s", "kind": "pickle"}},
        {"$data": 3},
        {"$data": "not base64!"},
        {"$data": "Ä"},
        {"$data": base64.b64encode(b"no container").decode()},
    ],
)
def test_malformed_envelope_is_refused(envelope) -> None:
    with pytest.raises(PayloadInvalid):
        unpack(envelope)


def test_message_over_the_bounds_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(PayloadTooLarge):
        unpack({"$data": "!" * 2000}, bounds=Bounds(max_bytes=1000))
