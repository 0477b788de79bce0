"""The stand-in of Globus Compute answers as the SDK's own fixtures say the hosted service does."""

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from uuid import UUID, uuid4

import globus_sdk.testing.data.compute
import pytest
from globus_compute_sdk import Client, Executor
from globus_compute_sdk.serialize import ComputeSerializer, PureSourceTextInspect

from fabric.testing.globus import Endpoint, Globus

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

FIXTURES = [
    f"{version}.{module.name}"
    for version in ("v2", "v3")
    for module in pkgutil.iter_modules([f"{globus_sdk.testing.data.compute.__path__[0]}/{version}"])
]


def double(number: int) -> int:
    return 2 * number


@dataclass
class Calls:
    """A call of the SDK for every fixture, by the owner of an endpoint that has run a task."""

    client: Client
    endpoint: Endpoint

    @cached_property
    def function(self) -> str:
        return self.client.register_function(double)

    @cached_property
    def ran(self) -> tuple[str, UUID, UUID]:
        """A task, its group and the user endpoint it ran on."""
        with Executor(self.endpoint.id, client=self.client, task_group_id=uuid4()) as executor:
            future = executor.submit_to_registered_function(self.function, (21,))
            assert future.result(120) == 42
            assert future.task_id is not None
            assert executor.task_group_id is not None
            (user_endpoint,) = self.endpoint.user_endpoint_ids()
            return future.task_id, executor.task_group_id, user_endpoint

    @property
    def registration(self) -> dict[str, str]:
        return {"endpoint_name": f"other-{uuid4()}"}

    @property
    def source(self) -> dict[str, Any]:
        return {"function_name": "one", "function_code": "def one():\n    return 1\n"}

    @property
    def payload(self) -> str:
        serializer = ComputeSerializer()
        return serializer.pack_buffers([serializer.serialize(one) for one in ((1,), {})])

    def answer(self, fixture: str, case: str) -> object:
        web = self.client._compute_web_client
        v2, v3, here, (task, group, user_endpoint) = web.v2, web.v3, self.endpoint.id, self.ran
        chosen = {} if case == "default" else {"role": case, "service": case}

        def another() -> str:
            return str(v3.register_endpoint(self.registration)["endpoint_id"])

        def another_function() -> str:
            return str(v3.register_function(self.source)["function_uuid"])

        batch = {"tasks": {self.function: [self.payload]}}
        calls: dict[str, Callable[[], Any]] = {
            "v2.delete_endpoint": lambda: v2.delete_endpoint(another()),
            "v2.delete_function": lambda: v2.delete_function(another_function()),
            "v2.get_endpoint": lambda: v2.get_endpoint(here),
            "v2.get_endpoint_status": lambda: v2.get_endpoint_status(user_endpoint),
            "v2.get_endpoints": lambda: v2.get("/v2/endpoints", query_params=chosen),
            "v2.get_function": lambda: v2.get_function(self.function),
            "v2.get_result_amqp_url": v2.get_result_amqp_url,
            "v2.get_task": lambda: v2.get_task(task),
            "v2.get_task_batch": lambda: v2.get_task_batch([task]),
            "v2.get_task_group": lambda: v2.get_task_group(group),
            "v2.get_version": lambda: v2.get("/v2/version", query_params=chosen),
            "v2.lock_endpoint": lambda: v2.lock_endpoint(another()),
            "v2.register_endpoint": lambda: v2.register_endpoint(self.registration),
            "v2.register_function": lambda: v2.register_function(self.source),
            "v2.submit": lambda: v2.submit({"tasks": [[self.function, another(), self.payload]]}),
            "v3.get_endpoint_allowlist": lambda: v3.get_endpoint_allowlist(here),
            "v3.lock_endpoint": lambda: v3.lock_endpoint(another()),
            "v3.register_endpoint": lambda: v3.register_endpoint(self.registration),
            "v3.register_function": lambda: v3.register_function(self.source),
            "v3.submit": lambda: v3.submit(another(), batch),
            "v3.update_endpoint": lambda: v3.update_endpoint(another(), self.registration),
        }
        answer = calls[fixture]()
        # The SDK gives no data for JSON that is a bare string.
        return answer.data if answer.data is not None else answer.text.strip('"\n')


@pytest.fixture(scope="module")
def calls(globus: Globus) -> Iterator[Calls]:
    with globus.endpoint("contract", owner="bob") as endpoint:
        client = globus.client("bob", code_serialization_strategy=PureSourceTextInspect())
        yield Calls(client, endpoint)


@pytest.mark.parametrize("fixture", FIXTURES)
def test_an_answer_has_the_shape_of_the_sdks_fixture(calls: Calls, fixture: str) -> None:
    responses = importlib.import_module(f"globus_sdk.testing.data.compute.{fixture}").RESPONSES
    for case in responses.cases():
        _assert_shape(calls.answer(fixture, case), responses.lookup(case).json, fixture)


def _assert_shape(actual: object, expected: object, where: str) -> None:
    """Everything that is expected is there, and is of its kind; ids stand for any id."""
    if isinstance(expected, dict):
        assert isinstance(actual, dict), where
        for key, value in expected.items():
            if _is_id(key):
                assert actual, where
                assert all(_is_id(one) for one in actual), where
                for one in actual.values():
                    _assert_shape(one, value, where)
            else:
                assert key in actual, f"{where}: no {key} in {actual}"
                _assert_shape(actual[key], value, f"{where}.{key}")
    elif isinstance(expected, list):
        assert isinstance(actual, list), where
        for one in actual:
            _assert_shape(one, expected[0], f"{where}[]")
    elif expected is not None and actual is not None:
        number = int | float
        kind = number if isinstance(expected, number) else type(expected)
        assert isinstance(actual, kind), f"{where}: {actual!r}"
        assert _is_id(actual) or not _is_id(expected), f"{where}: {actual!r}"


def _is_id(value: object) -> bool:
    try:
        return bool(UUID(str(value)))
    except ValueError:
        return False
