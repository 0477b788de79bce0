"""The metrics of an instance move as its tasks run, under the names that dashboards read."""

from __future__ import annotations

import asyncio
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from websockets.asyncio.server import ServerConnection

from fabric.engine.interface import Engine
from fabric.instance.direct import direct_route
from fabric.instance.metrics import InstanceMetrics, MeasuredEngine
from fabric.instance.serve import Peer
from fabric.messages import (
    Event,
    Failed,
    Finished,
    Limits,
    Load,
    Request,
    Sampling,
    StepTimes,
    Task,
    TokensInput,
)
from fabric.testing.engine import FixedDelayEngine

VLLM_NAMES = {
    *("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"),
    *("vllm:prompt_tokens", "vllm:generation_tokens", "vllm:request_success"),
    *("vllm:prefix_cache_queries", "vllm:prefix_cache_hits", "vllm:num_preemptions"),
    *("vllm:time_to_first_token_seconds", "vllm:inter_token_latency_seconds"),
    *("vllm:e2e_request_latency_seconds", "vllm:request_queue_time_seconds"),
    *("vllm:request_prefill_time_seconds", "vllm:request_decode_time_seconds"),
}


class SteppingEngine(FixedDelayEngine):
    """Says of its steps what a real one would."""

    def load(self) -> Load:
        steps = {
            "prefill_steps": StepTimes(num=2, seconds=0.5),
            "mixed_steps": StepTimes(num=1, seconds=0.25),
        }
        return super().load().model_copy(update=steps)


def values(metrics: InstanceMetrics) -> dict[str, float]:
    """Return the samples that a Prometheus would store, the buckets left out."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k not in ("model_name", "le")}
            if "le" not in sample.labels and not sample.name.endswith("_created"):
                assert sample.labels["model_name"] == "tiny"
                found[" ".join([sample.name, *labels.values()])] = sample.value
    return found


@pytest.fixture
def metrics() -> InstanceMetrics:
    return InstanceMetrics("tiny")


@pytest.fixture
def engine(metrics: InstanceMetrics) -> Iterator[Engine]:
    limits = Limits(context_tokens=64, max_rows=4, cache_tokens=256)
    inside = SteppingEngine(first_token_s=0.01, token_s=0.005, limits=limits)
    measured = MeasuredEngine(inside, metrics)
    measured.start()
    metrics.watch_load(measured)
    yield measured
    measured.close()


def run(engine: Engine, num_prompt: int = 3, **sampling: Any) -> None:
    request = Request(
        model="tiny", input=TokensInput(ids=(1,) * num_prompt), sampling=Sampling(**sampling)
    )
    task = Task(
        id=request.id,
        attempt=1,
        request=request,
        digest=engine.info.digest,
        deadline_s=20,
    )
    ended = threading.Event()

    def sink(event: Event) -> None:
        if isinstance(event, Finished | Failed):
            ended.set()

    engine.submit(task, sink)
    assert ended.wait(20)


def test_every_name_that_dashboards_read_is_there(engine: Engine, metrics: InstanceMetrics) -> None:
    run(engine, max_tokens=2)
    names = {f.name for f in text_string_to_metric_families(metrics.render().decode())}
    assert names >= VLLM_NAMES


def test_counters_and_histograms_follow_the_events(
    engine: Engine, metrics: InstanceMetrics
) -> None:
    run(engine, max_tokens=5, n=2)
    seen = values(metrics)
    assert seen["vllm:prompt_tokens_total"] == 3
    assert seen["vllm:generation_tokens_total"] == 10
    assert seen["vllm:request_success_total length"] == 2
    assert seen["vllm:time_to_first_token_seconds_count"] == 1
    assert seen["vllm:time_to_first_token_seconds_sum"] >= 0.01
    assert seen["vllm:inter_token_latency_seconds_count"] == 8
    assert seen["vllm:inter_token_latency_seconds_sum"] >= 2 * 4 * 0.004
    assert seen["vllm:request_decode_time_seconds_sum"] >= 4 * 0.004
    assert (
        seen["vllm:e2e_request_latency_seconds_sum"]
        >= seen["vllm:time_to_first_token_seconds_sum"]
        + seen["vllm:request_decode_time_seconds_sum"]
        - 1e-6
    )
    assert seen["fabric_device_seconds_total"] > 0.0
    run(engine, max_tokens=1)
    assert values(metrics)["vllm:e2e_request_latency_seconds_count"] == 2


def test_failed_tasks_count_by_their_code_and_as_no_success(
    engine: Engine, metrics: InstanceMetrics
) -> None:
    run(engine, num_prompt=65)
    seen = values(metrics)
    assert seen["fabric_tasks_total context_length_exceeded"] == 1
    assert not [name for name in seen if name.startswith("vllm:request_success_total ")]
    assert seen.get("vllm:e2e_request_latency_seconds_count", 0) == 0


def test_steps_are_told_by_phase(engine: Engine, metrics: InstanceMetrics) -> None:
    seen = values(metrics)
    assert seen["fabric_engine_steps_total prefill"] == 2
    assert seen["fabric_engine_step_seconds_total mixed"] == 0.25
    assert seen["fabric_engine_step_seconds_total decode"] == 0.0
    assert seen["vllm:num_requests_running"] == 0


@pytest.mark.parametrize(
    ("token", "path", "status"),
    [("d", "/metrics", 200), ("g", "/metrics?x=1", 200), ("x", "/metrics", 401), ("d", "/", 426)],
)
async def test_the_direct_route_shows_them_to_whoever_has_a_token(
    metrics: InstanceMetrics, token: str, path: str, status: int
) -> None:
    async def handle(connection: ServerConnection, peer: Peer) -> None:
        await connection.wait_closed()

    def get(url: str) -> tuple[int, str, str]:
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
        try:
            with urllib.request.urlopen(request, timeout=20) as reply:
                return reply.status, reply.headers["content-type"], reply.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, "", ""

    metrics.token(0.5)
    route = direct_route(handle, token="d", guest_token="g", render_metrics=metrics.render)
    async with route as url:
        address = "http" + url.removeprefix("ws").rstrip("/") + path
        got, kind, text = await asyncio.to_thread(get, address)
    assert got == status
    if status == 200:
        assert kind.startswith("text/plain; version=0.0.4")
        assert 'vllm:generation_tokens_total{model_name="tiny"} 1.0' in text
