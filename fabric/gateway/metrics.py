"""What Prometheus reads: the names that dashboards for vLLM know, and ours under ``fabric_``."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterator, Sequence
from functools import cache

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from fabric.broker import ReplicaView
from fabric.messages import Placement, Request, RunCompleted, RunState, Usage
from fabric.messages.figures import COUNTS, by_name

_LATENCY_BUCKETS_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0),
)


class Metrics:
    """The counters of one hub; implements the broker's ``Observer``.

    ``model`` is always the catalogued name, so that nothing a user sends becomes a label.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        # The library looks every label up under a lock, at every token: remembered here.
        def counter(name: str, text: str, *labels: str) -> Callable[..., Counter]:
            made = Counter(name, text, ("model_name", *labels), registry=self.registry)
            return cache(made.labels)

        def histogram(name: str, text: str) -> Callable[[str], Histogram]:
            made = Histogram(
                name, text, ("model_name",), registry=self.registry, buckets=_LATENCY_BUCKETS_S
            )
            return cache(made.labels)

        self._prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens processed.")
        self._generation_tokens = counter("vllm:generation_tokens", "Tokens generated.")
        self._success = counter(
            "vllm:request_success", "Choices that ended, by reason.", "finished_reason"
        )
        self._prefix_queries = counter(
            "vllm:prefix_cache_queries", "Prompt tokens looked up in prefix caches."
        )
        self._prefix_hits = counter("vllm:prefix_cache_hits", "Prompt tokens found there.")
        self._first_token_s = histogram(
            "vllm:time_to_first_token_seconds", "Seconds from admission to the first token."
        )
        self._token_gap_s = histogram(
            "vllm:inter_token_latency_seconds", "Seconds between tokens of a request."
        )
        self._e2e_s = histogram(
            "vllm:e2e_request_latency_seconds", "Seconds from admission to the end."
        )
        self._queue_s = histogram(
            "vllm:request_queue_time_seconds", "Seconds a request waited in an instance."
        )
        self._prefill_s = histogram(
            "vllm:request_prefill_time_seconds", "Seconds from that wait to the first token."
        )
        self._decode_s = histogram(
            "vllm:request_decode_time_seconds", "Seconds from the first token to the last."
        )
        self._admitted = counter("fabric_requests_admitted", "Requests admitted.", "tier")
        self._ended = counter("fabric_requests", "Requests that ended.", "state", "code")
        self._attempts = counter("fabric_attempts", "Attempts sent to replicas.", "site", "retry")
        self._charge = counter("fabric_charge_usu", "Micro-SU charged.")
        self._device_s = counter("fabric_device_seconds", "Device-seconds of ended requests.")
        self._placement_s = histogram(
            "fabric_placement_seconds", "Seconds from a read request to its first placement."
        )

    def render(self) -> bytes:
        """Return all of it in Prometheus' text format."""
        return generate_latest(self.registry)

    # ---- fabric.broker.Observer --------------------------------------------------------------

    def run_admitted(self, model: str, request: Request) -> None:
        """Count it."""
        self._admitted(model, request.tier).inc()

    def run_placed(self, model: str, placement: Placement, attempt: int) -> None:
        """Count it by site."""
        self._attempts(model, placement.site, "yes" if attempt > 1 else "no").inc()

    def first_token(self, model: str, seconds: float) -> None:
        """Record the time to first token."""
        self._first_token_s(model).observe(seconds)

    def token(self, model: str) -> None:
        """Count it."""
        self._generation_tokens(model).inc()

    def run_ended(
        self,
        model: str,
        state: RunState,
        usage: Usage,
        *,
        e2e_s: float,
        charge_usu: int,
        failure_code: str | None,
    ) -> None:
        """Count what it consumed and how it ended."""
        self._ended(model, state, failure_code or "").inc()
        self._charge(model).inc(charge_usu)
        self._device_s(model).inc(usage.device_s)
        self._prompt_tokens(model).inc(usage.prompt_tokens)
        self._prefix_queries(model).inc(usage.prompt_tokens)
        self._prefix_hits(model).inc(usage.cached_prompt_tokens)
        if state is RunState.COMPLETED:
            self._e2e_s(model).observe(e2e_s)

    # ---- from the gateway --------------------------------------------------------------------

    def placed(self, model: str, seconds: float) -> None:
        """Record the time from a read request to its first placement."""
        self._placement_s(model).observe(seconds)

    def token_gap(self, model: str, seconds: float) -> None:
        """Record the time between two tokens."""
        self._token_gap_s(model).observe(seconds)

    def run_completed(self, model: str, run: RunCompleted) -> None:
        """Record where a completed run's time went."""
        for reason in run.finish_reasons:
            self._success(model, reason).inc()
        self._queue_s(model).observe(run.usage.queue_s)
        if run.first_token_s is not None:
            self._prefill_s(model).observe(max(0.0, run.first_token_s - run.usage.queue_s))
            self._decode_s(model).observe(max(0.0, run.total_s - run.first_token_s))

    def watch_replicas(self, replicas: Callable[[], Sequence[ReplicaView]]) -> None:
        """Report the load of the replicas whenever the metrics are read."""
        self.registry.register(_Replicas(replicas))


class _Replicas(Collector):
    def __init__(self, replicas: Callable[[], Sequence[ReplicaView]]) -> None:
        self._replicas = replicas

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        def gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
            return GaugeMetricFamily(name, text, labels=("model_name", "site", *labels))

        gauges = {
            "num_running": gauge("vllm:num_requests_running", "Requests in the batch."),
            "num_waiting": gauge("vllm:num_requests_waiting", "Requests that wait."),
            "cache_usage": gauge("vllm:kv_cache_usage_perc", "Share of the KV cache in use."),
        }
        loads: dict[tuple[str, str], list[ReplicaView]] = {}
        states: Tally[tuple[str, str, str]] = Tally()
        for view in self._replicas():
            name = view.model.partition("@")[0]
            loads.setdefault((name, view.site), []).append(view)
            states[name, view.site, view.state] += 1
        for labels, views in loads.items():
            for field, family in gauges.items():
                total = sum(getattr(view.load, field) for view in views)
                mean = total / len(views)
                family.add_metric(labels, mean if field == "cache_usage" else total)
        yield from gauges.values()
        count = gauge("fabric_replicas", "Replicas by state.", "state")
        for key, number in states.items():
            count.add_metric(key, number)
        yield count
        yield from self._count_steps()

    def _count_steps(self) -> Iterator[CounterMetricFamily]:
        """Yield the counters of each instance, as its last heartbeat told them."""
        for figure, same in by_name(COUNTS):
            labels = ["model_name", "site", "instance"]
            labels += [] if figure.phase is None else ["phase"]
            family = CounterMetricFamily(figure.name, figure.text, labels=labels)
            for view in self._replicas():
                name = view.model.partition("@")[0]
                for one in same:
                    phase = [] if one.phase is None else [one.phase]
                    value = one.read(view.load)
                    family.add_metric([name, view.site, view.instance, *phase], value)
            yield family
