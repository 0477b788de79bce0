"""Programs as raw calls: what their tickets permit, what they are charged, what they leave."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from fabric.messages import EMBED_SAMPLING, ProgramInput, Request
from fabric.testing.hub import MODEL, PROJECT, RunningHub
from fabric.testing.raw_calls import GRANT_USU, balance, issue, record_of

READ, SAVE = {"op": "read", "at": "layers.1.out"}, {"op": "save", "name": "h", "x": 0}
WRITE = {"op": "write", "at": "layers.1.out", "mode": "scale", "alpha": 0.0}


def program(*nodes: object, **fields: object) -> Request:
    runs = [{"id": "a", "text": "hello", "nodes": nodes or (READ, SAVE), "gen": {"max_tokens": 2}}]
    return Request(
        mode="program",
        model=MODEL,
        input=ProgramInput.model_validate({"program": {"runs": runs}}),
        sampling=EMBED_SAMPLING,
        deadline_s=60.0,
        **fields,
    )


@pytest.fixture
def priced(hub: RunningHub) -> RunningHub:
    hub.ledger.set_rate(
        MODEL, "*", prompt_usu=1, cached_prompt_usu=1, output_usu=2, hook_out_usu=1, device_usu=100
    )
    return hub


@contextmanager
def key_of(hub: RunningHub, *scopes: str) -> Iterator[httpx.Client]:
    _, key = hub.keys.add_key(PROJECT, scopes=("query", *scopes))
    headers = {"authorization": f"Bearer {key}"}
    with httpx.Client(base_url=hub.base_url, headers=headers) as client:
        yield client


def test_a_raw_program_is_held_metered_and_never_charged_for_more(priced, launch) -> None:
    asked = program()
    with key_of(priced, "program:read") as client, launch()() as instance:
        assert instance.redeem(issue(client), asked) is None
        held = balance(priced)[1]
        # Six prompt tokens, two of output, a second of computing, and what it saves.
        assert held > 6 + 4 + 100
        instance.report(
            asked.id, prompt_tokens=3, output_tokens=2, hook_bytes_out=200, hook_bytes_in=10**9
        )
    assert balance(priced) == (GRANT_USU - (3 + 4 + 200), 0)
    run = record_of(priced, asked.id)
    assert run.program is not None
    assert (run.usage.hook_bytes_in, run.usage.hook_bytes_out) == (0, 200)


def test_an_instance_cannot_charge_a_program_more_than_was_held(priced, launch) -> None:
    asked = program()
    with key_of(priced, "program:read") as client, launch()() as instance:
        assert instance.redeem(issue(client), asked) is None
        held = balance(priced)[1]
        much = dict.fromkeys(("prompt_tokens", "output_tokens", "hook_bytes_out"), 10**9)
        instance.report(asked.id, **much, device_s=10**6)
    available_usu, still_held_usu = balance(priced)
    assert still_held_usu == 0
    assert GRANT_USU - held <= available_usu < GRANT_USU


def test_a_ticket_permits_what_its_key_does(priced, launch) -> None:
    with launch()() as instance:
        with key_of(priced) as client:
            assert instance.redeem(issue(client), program()) == "permission_denied"
        with key_of(priced, "program:read") as client:
            assert instance.redeem(issue(client), program(WRITE)) == "permission_denied"
        with key_of(priced, "program:read", "program:write") as client:
            assert instance.redeem(issue(client), program(WRITE)) is None


@pytest.mark.parametrize(
    ("nodes", "code"),
    [
        (({**READ, "at": "layers.9.out"}, SAVE), "point_unknown"),
        (({"op": "zeros", "shape": [2**30]}, SAVE), "program_too_large"),
        (
            ({"op": "artifact", "id": "art_" + "0" * 32, "run": "a", "save": "h"}, SAVE),
            "program_invalid",
        ),
    ],
)
def test_a_raw_program_that_cannot_run_is_refused_before_its_hold(
    priced, launch, nodes, code
) -> None:
    with key_of(priced, "program:read") as client, launch()() as instance:
        assert instance.redeem(issue(client), program(*nodes)) == code
    assert balance(priced) == (GRANT_USU, 0)


def test_an_instance_leaves_results_of_the_calls_it_has(priced, launch, client) -> None:
    asked, name = program(), "art_" + "7" * 32
    with key_of(priced, "program:read") as user, launch()() as instance, launch()() as other:
        assert instance.redeem(issue(user), asked) is None
        where = {"artifact": name, "run": asked.id, "part": "a"}
        path = "/v1/fabric/instance/artifacts"
        assert other.http.put(path, params=where, content=b"x").status_code == 404
        assert instance.http.put(path, params=where, content=b"x" * 10**5).status_code == 413
        assert instance.http.put(path, params=where, content=b"saved").status_code == 200
        assert user.get(f"/v1/fabric/artifacts/{name}").content == b"saved"
        instance.report(asked.id, prompt_tokens=3)
