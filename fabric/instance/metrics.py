"""What Prometheus reads at an instance: the names that dashboards for vLLM know, and ours.

They are fed by the events of all tasks, wherever these came from: the hub, the site, raw calls.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from fabric.engine.interface import Engine, EngineInfo, EventSink
from fabric.errors import FabricError
from fabric.messages import Event, Failed, Finished, Load, Task, Token, Usage
from fabric.messages.figures import ALL, by_name

_BUCKETS_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0),
)


class InstanceMetrics:
    """The metrics of one instance.

    Args:
        model: What the label ``model_name`` says.
    """

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        self._model = model

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, ("model_name", *labels), registry=self.registry)

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(
                name, text, ("model_name",), registry=self.registry, buckets=_BUCKETS_S
            )

        self._prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens of ended tasks.")
        self._generation_tokens = counter("vllm:generation_tokens", "Tokens generated.")
        self._success = counter(
            "vllm:request_success", "Choices that ended, by reason.", "finished_reason"
        )
        self._prefix_queries = counter(
            "vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache."
        )
        self._prefix_hits = counter("vllm:prefix_cache_hits", "Prompt tokens found there.")
        self._first_token_s = histogram(
            "vllm:time_to_first_token_seconds", "Seconds from a task's arrival to its first token."
        )
        self._token_gap_s = histogram(
            "vllm:inter_token_latency_seconds", "Seconds between the tokens of a choice."
        )
        self._e2e_s = histogram(
            "vllm:e2e_request_latency_seconds", "Seconds from a task's arrival to its end."
        )
        self._queue_s = histogram(
            "vllm:request_queue_time_seconds", "Seconds a task waited to run."
        )
        self._prefill_s = histogram(
            "vllm:request_prefill_time_seconds", "Seconds from that wait to the first token."
        )
        self._decode_s = histogram(
            "vllm:request_decode_time_seconds", "Seconds from the first token to the last."
        )
        self._tasks = counter("fabric_tasks", "Tasks that ended, by failure code.", "code")
        self._device_s = counter("fabric_device_seconds", "Device-seconds of ended tasks.")

    def render(self) -> bytes:
        """Return all of it in Prometheus' text format."""
        return generate_latest(self.registry)

    def watch(self, sink: EventSink) -> EventSink:
        """Return a sink for a task that comes now, which measures its events and passes them on."""
        return _Watch(self, sink)

    def watch_load(self, engine: Engine) -> None:
        """Report the engine's load whenever the metrics are read."""
        self.registry.register(_Load(self._model, engine))

    def first_token(self, seconds: float) -> None:
        """Record the time to a task's first token."""
        self._first_token_s.labels(self._model).observe(seconds)

    def token(self, gap_s: float | None) -> None:
        """Count a token, and the time since its choice's last."""
        self._generation_tokens.labels(self._model).inc()
        if gap_s is not None:
            self._token_gap_s.labels(self._model).observe(gap_s)

    def ended(
        self, event: Finished | Failed, *, first_s: float | None, decode_s: float, e2e_s: float
    ) -> None:
        """Record where a task's time went; a failed one counts what it consumed."""
        usage: Usage = event.usage
        self._prompt_tokens.labels(self._model).inc(usage.prompt_tokens)
        self._prefix_queries.labels(self._model).inc(usage.prompt_tokens)
        self._prefix_hits.labels(self._model).inc(usage.cached_prompt_tokens)
        self._device_s.labels(self._model).inc(usage.device_s)
        code = event.failure.code if isinstance(event, Failed) else ""
        self._tasks.labels(self._model, code).inc()
        if isinstance(event, Failed):
            return
        for reason in event.finish_reasons:
            self._success.labels(self._model, reason).inc()
        self._e2e_s.labels(self._model).observe(e2e_s)
        self._queue_s.labels(self._model).observe(usage.queue_s)
        if first_s is not None:
            self._prefill_s.labels(self._model).observe(max(0.0, first_s - usage.queue_s))
            self._decode_s.labels(self._model).observe(decode_s)


class MeasuredEngine:
    """An ``Engine`` whose tasks are measured. It is called like the one inside.

    Args:
        engine: Computes.
        metrics: Hears of it.
    """

    def __init__(self, engine: Engine, metrics: InstanceMetrics) -> None:
        self._engine = engine
        self._metrics = metrics

    @property
    def info(self) -> EngineInfo:
        """Facts of the loaded model. Known after ``start``."""
        return self._engine.info

    @property
    def failure(self) -> Future[FabricError]:
        """Done when the engine inside has ended by itself."""
        return self._engine.failure

    def start(self) -> None:
        """Start the engine inside."""
        self._engine.start()

    def submit(self, task: Task, sink: EventSink) -> None:
        """Queue a task and return at once; see ``Engine.submit``."""
        self._engine.submit(task, self._metrics.watch(sink))

    def cancel(self, task_id: str, attempt: int) -> None:
        """Free the task's rows within one step; unknown tasks are ignored."""
        self._engine.cancel(task_id, attempt)

    def load(self) -> Load:
        """Return how busy the engine is."""
        return self._engine.load()

    def close(self) -> None:
        """Close the engine inside. Calling it twice is harmless."""
        self._engine.close()


class _Watch:
    """A sink between the engine and a task's own."""

    def __init__(self, metrics: InstanceMetrics, sink: EventSink) -> None:
        self._metrics = metrics
        self._sink = sink
        self._began_at = time.perf_counter()
        self._first_at: float | None = None
        self._last_at: dict[int, float] = {}

    def __call__(self, event: Event) -> None:
        now = time.perf_counter()
        if isinstance(event, Token):
            if self._first_at is None:
                self._first_at = now
                self._metrics.first_token(now - self._began_at)
            last_at = self._last_at.get(event.choice)
            self._metrics.token(None if last_at is None else now - last_at)
            self._last_at[event.choice] = now
        elif isinstance(event, Finished | Failed):
            first_at = self._first_at
            self._metrics.ended(
                event,
                first_s=None if first_at is None else first_at - self._began_at,
                decode_s=max(self._last_at.values(), default=now) - (first_at or now),
                e2e_s=now - self._began_at,
            )
        self._sink(event)


class _Load(Collector):
    def __init__(self, model: str, engine: Engine) -> None:
        self._model = model
        self._engine = engine

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        load = self._engine.load()
        for figure, same in by_name(ALL):
            family = CounterMetricFamily if figure.kind == "counter" else GaugeMetricFamily
            labels = ["model_name"] if figure.phase is None else ["model_name", "phase"]
            metric = family(figure.name, figure.text, labels=labels)
            for one in same:
                phase = [] if one.phase is None else [one.phase]
                metric.add_metric([self._model, *phase], one.read(load))
            yield metric
