"""The functions as they ship: small, whole by themselves, and the same after the SDK had them."""

import ast
import importlib
from uuid import uuid4

import pytest
from globus_compute_sdk.serialize import (
    ComputeSerializer,
    DillCode,
    JSONData,
    PureSourceDill,
    PureSourceTextInspect,
)

from fabric.compute.functions import (
    FunctionSource,
    check_source,
    shipped_function,
    shipped_functions,
    unpack_source,
)
from fabric.errors import FabricError, FunctionDrifted, RequestInvalid

NAMES = (
    "cancel_job",
    "describe_site",
    "estimate_wait",
    "infer",
    "poll_jobs",
    "read_balance",
    "read_job_logs",
    "replicate_version",
    "run_program",
    "start_instance",
    "stop_instance",
    "submit_job",
)

ANSWERED = {
    "estimate_wait": ("local", {}),
    "describe_site": ("/no/such/site",),
    "stop_instance": ("inst_none", "/no/such/site"),
    "cancel_job": ({}, "inst_none", None, "no safe path"),
    "poll_jobs": ({}, {}, "no safe path"),
    "read_balance": ({}, "astro", None, "no safe path"),
    "read_job_logs": ({}, "inst_none", "no safe path"),
    "submit_job": ({}, None, "no safe path"),
}
"""Calls that need no instance, and those that answer with what is wrong; the others raise it."""


@pytest.fixture(params=NAMES)
def shipped(request: pytest.FixtureRequest) -> FunctionSource:
    return shipped_function(request.param)


def imported(name: str):
    return getattr(importlib.import_module(f"fabric.endpoints.functions.{name}"), name)


def test_every_function_of_the_seams_ships() -> None:
    assert tuple(shipped_functions()) == NAMES


def test_a_file_is_one_function_of_twenty_lines_at_most(shipped: FunctionSource) -> None:
    assert len(shipped.source.splitlines()) <= 20
    (function,) = ast.parse(shipped.source).body
    assert isinstance(function, ast.FunctionDef)
    assert function.name == shipped.name
    assert function.decorator_list == []
    assert shipped.description.endswith(".")


def test_source_runs_in_an_empty_namespace(shipped: FunctionSource) -> None:
    """What a worker does: the source, and nothing of the module it came from."""
    namespace: dict[str, object] = {}
    exec(shipped.source, namespace)
    assert set(namespace) == {"__builtins__", shipped.name}
    function = namespace[shipped.name]
    assert callable(function)
    if shipped.name in ANSWERED:
        assert isinstance(function(*ANSWERED[shipped.name]), dict)
    else:
        with pytest.raises(FabricError):
            function({}, "no safe path")


def test_the_sdks_serializer_brings_it_back(shipped: FunctionSource) -> None:
    serializer = ComputeSerializer(
        strategy_code=PureSourceTextInspect,
        strategy_data=JSONData,
        allowed_deserializer_types=[JSONData, PureSourceTextInspect],
    )
    function = imported(shipped.name)
    packed = serializer.serialize(function)
    back = serializer.deserialize(packed)
    assert back.__name__ == shipped.name
    assert back.__code__.co_varnames == function.__code__.co_varnames
    assert back.__code__.co_code == function.__code__.co_code
    assert unpack_source(serializer.pack_buffers([packed])).strip() == shipped.source.strip()
    again = serializer.deserialize(f"st\n{shipped.name}:{shipped.source}")
    assert again.__code__.co_code == back.__code__.co_code


def test_the_digest_is_of_the_source_whatever_surrounds_it(shipped: FunctionSource) -> None:
    around = FunctionSource(name=shipped.name, source=f"\n{shipped.source}\n\n")
    assert around.sha256 == shipped.sha256
    changed = FunctionSource(name=shipped.name, source=shipped.source + "# more\n")
    assert changed.sha256 != shipped.sha256


@pytest.mark.parametrize("strategy", [PureSourceTextInspect, PureSourceDill])
def test_source_is_found_in_what_the_sdk_packs(strategy) -> None:
    serializer = ComputeSerializer(strategy_code=strategy)
    code = serializer.pack_buffers([serializer.serialize(imported("infer"))])
    assert unpack_source(code).strip() == shipped_function("infer").source.strip()


def test_a_pickle_is_not_loaded_and_differs() -> None:
    serializer = ComputeSerializer(strategy_code=DillCode)
    code = serializer.pack_buffers([serializer.serialize(imported("infer"))])
    pickled = FunctionSource(name="infer", source=unpack_source(code))
    shipped = shipped_function("infer")
    with pytest.raises(FunctionDrifted):
        check_source(shipped, uuid4(), pickled.sha256)


def test_drift_names_both_digests_and_the_command_that_mends_it() -> None:
    shipped, function_id = shipped_function("infer"), uuid4()
    check_source(shipped, function_id, shipped.sha256)
    with pytest.raises(FunctionDrifted) as drifted:
        check_source(shipped, function_id, "0" * 64)
    message = drifted.value.message
    for part in (
        shipped.sha256,
        "0" * 64,
        str(function_id),
        "fabric-admin function register infer",
    ):
        assert part in message


def test_a_function_that_does_not_ship_is_named() -> None:
    with pytest.raises(RequestInvalid, match="describe_site, estimate_wait"):
        shipped_function("infre")
