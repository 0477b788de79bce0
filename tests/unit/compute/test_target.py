import json
from uuid import uuid4

import pytest
from globus_compute_sdk.sdk.batch import Batch
from globus_compute_sdk.serialize import ComputeSerializer, JSONData

from fabric.compute import ComputeTarget
from fabric.compute.target import measure_payload

ENDPOINT = uuid4()


def test_configurations_that_are_equal_as_json_are_one_target() -> None:
    one = ComputeTarget(endpoint_id=ENDPOINT, config={"a": 1, "b": {"c": [1, 2], "d": None}})
    two = ComputeTarget(endpoint_id=ENDPOINT, config={"b": {"d": None, "c": (1, 2)}, "a": 1})
    assert one == two
    assert hash(one) == hash(two)
    assert {one: "known"}[two] == "known"


def test_other_configurations_and_endpoints_are_other_targets() -> None:
    target = ComputeTarget(endpoint_id=ENDPOINT, config={"a": 1})
    assert target != ComputeTarget(endpoint_id=ENDPOINT, config={"a": "1"})
    assert target != ComputeTarget(endpoint_id=ENDPOINT, config={"a": True})
    assert target != ComputeTarget(endpoint_id=ENDPOINT)
    assert target != ComputeTarget(endpoint_id=uuid4(), config={"a": 1})


def test_target_does_not_change_with_what_it_was_made_of() -> None:
    config = {"a": [1]}
    target = ComputeTarget(endpoint_id=ENDPOINT, config=config)
    config["a"].append(2)
    assert target == ComputeTarget(endpoint_id=ENDPOINT, config={"a": [1]})
    assert target.config == {"a": [1]}


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", float("nan"), float("inf")])
def test_what_is_not_json_is_refused(value: object) -> None:
    with pytest.raises(TypeError):
        ComputeTarget(endpoint_id=ENDPOINT, config={"a": value})
    with pytest.raises(TypeError):
        measure_payload((value,))


@pytest.mark.parametrize(
    "args",
    [
        (),
        ("x" * 1000,),
        ({"quotes": '"' * 300, "slashes": "\\" * 300},),
        (["é" * 200, "\N{GRINNING FACE}" * 50, "\n\t" * 100],),
        tuple({"number": number, "text": "word"} for number in range(100)),
    ],
)
def test_measure_covers_what_the_sdk_puts_into_a_request(args) -> None:
    batch = Batch(None, serializer=ComputeSerializer(strategy_data=JSONData))
    batch.add(uuid4(), args, {})
    ((payload,),) = batch.prepare()["tasks"].values()
    travels = len(json.dumps(payload).encode())
    assert travels <= measure_payload(args) <= travels + 100
