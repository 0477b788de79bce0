"""Every error of the taxonomy has a status, a type and a code that clients can act on."""

from __future__ import annotations

import json

import pytest

from fabric import errors
from fabric.errors import FabricError, NoReplica, RowFailed, TooManyRequests
from fabric.gateway.refusals import error_reply

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "insufficient_quota",
    403: "permission_error",
    404: "invalid_request_error",
    409: "invalid_request_error",
    410: "invalid_request_error",
    413: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    499: "invalid_request_error",
    500: "server_error",
    502: "server_error",
    503: "server_error",
    504: "server_error",
    507: "server_error",
}
CLASSES = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, FabricError)
]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_error_has_openais_shape(kind: type[FabricError]) -> None:
    error = FabricError.rebuild(kind.code, "It failed.", {"param": "p", "x": 1})
    reply = error_reply(error)
    assert reply.status_code == kind.http_status
    assert json.loads(bytes(reply.body)) == {
        "error": {
            "message": "It failed.",
            "type": TYPES[kind.http_status],
            "param": "p",
            "code": kind.code,
            "detail": {"param": "p", "x": 1},
        }
    }


def test_codes_are_distinct() -> None:
    codes = [kind.code for kind in CLASSES]
    assert sorted(codes) == sorted(set(codes))


def test_a_time_to_retry_is_rounded_up_to_whole_seconds() -> None:
    assert error_reply(NoReplica(model="m", reasons={}, retry_after_s=1.2)).headers[
        "retry-after"
    ] == ("2")
    assert error_reply(TooManyRequests(limit=1, retry_after_s=0.1)).headers["retry-after"] == "1"


def test_clients_are_told_not_to_repeat_what_will_fail_again() -> None:
    assert error_reply(RowFailed(reason="x")).headers["x-should-retry"] == "false"
    assert error_reply(NoReplica(model="m", reasons={})).headers["x-should-retry"] == "true"
