"""Whatever is sent that the hub's own schema allows, or nearly allows: never a 500."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

from fabric.auth import SCOPES
from fabric.testing.hub import MODEL, PROJECT, RunningHub, running_hub

NUM_EXAMPLES = 5
"""Of each kind (allowed and not allowed), for each operation."""
NEEDED = ("model", "prompt", "messages", "input", "program", "max_tokens")
NUM_FIELDS = 2
TIMEOUT_S = 60


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHub]:
    with running_hub(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


def soften(case: Any) -> None:
    """Let a body that names a model reach it: with a few fields at a time, of which any may be
    refused, and no more asked than a test has time for."""
    body = case.body
    if isinstance(body, dict) and isinstance(body.get("model"), str):
        for name in [name for name in body if name not in NEEDED][NUM_FIELDS:]:
            del body[name]
        body["model"] = MODEL
        for field, most in (("max_tokens", 4), ("max_completion_tokens", 4), ("n", 2)):
            if isinstance(body.get(field), int):
                body[field] = min(body[field], most)


@pytest.mark.slow
@pytest.mark.timeout(400)
# schemathesis draws with the random module, which hypothesis has begun to mind.
@pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisDeprecationWarning")
def test_nothing_the_schema_describes_makes_the_hub_fail(hub: RunningHub, tmp_path: Path) -> None:
    _, key = hub.keys.add_key(PROJECT, scopes=SCOPES, site="alpha")
    schema = schemathesis.openapi.from_url(f"{hub.base_url}/openapi.json")
    headers = {"authorization": f"Bearer {key}"}
    statuses: Counter[int] = Counter()
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) > 30

    def call(case: Any) -> None:
        soften(case)
        reply = case.call(base_url=hub.base_url, headers=headers, timeout=TIMEOUT_S)
        statuses[reply.status_code] += 1
        assert reply.status_code != 500, f"{case.as_curl_command()}\n{reply.text}"
        if reply.status_code >= 400:
            error = reply.json()["error"]
            assert error["code"] != "fabric_error", case.as_curl_command()
            assert error["message"].endswith(".")

    for operation in operations:
        modes = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]
        strategy = st.one_of(*(operation.as_strategy(generation_mode=mode) for mode in modes))
        run = settings(
            max_examples=NUM_EXAMPLES * len(modes),
            phases=[Phase.generate],
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )(seed(7)(given(strategy)(call)))
        run()
    assert statuses[200] > 0
    assert statuses[400] > 0
    assert hub.broker.replicas(), "the hub lives"
