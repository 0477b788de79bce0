"""Promises and queues for Prometheus, read from the broker whenever the metrics are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from fabric.broker import Attained, Waiting


class Tiers(Collector):
    """``fabric_slo_*`` and ``fabric_requests_waiting``.

    Args:
        attained: Returns how far promises were kept.
        waiting: Returns what waits at the hub.
    """

    def __init__(
        self,
        attained: Callable[[], Sequence[Attained]],
        waiting: Callable[[], Sequence[Waiting]],
    ) -> None:
        self._attained = attained
        self._waiting = waiting

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield them; of a window without requests only the objective and the budget."""
        names = ["tier", "measure", "window"]
        share = GaugeMetricFamily(
            "fabric_slo_attained_ratio", "Requests for which a promise was kept.", labels=names
        )
        wanted = GaugeMetricFamily(
            "fabric_slo_objective_ratio", "Requests for which it is to be kept.", labels=names[:2]
        )
        left = GaugeMetricFamily(
            "fabric_slo_budget_left_ratio", "What is left of what may be missed.", labels=names
        )
        told = set()
        for one in self._attained():
            labels = [one.tier, one.measure, one.window]
            left.add_metric(labels, one.budget_left)
            if one.attained is not None:
                share.add_metric(labels, one.attained)
            if (one.tier, one.measure) not in told:
                told.add((one.tier, one.measure))
                wanted.add_metric(labels[:2], one.objective)
        yield from (share, wanted, left)
        queue = GaugeMetricFamily(
            "fabric_requests_waiting",
            "Requests that wait at the hub for a row.",
            labels=["model_name", "tier"],
        )
        numbers: Counter[tuple[str, str]] = Counter()
        for line in self._waiting():
            numbers[line.model.partition("@")[0], line.tier] += line.num_waiting
        for (model, tier), number in numbers.items():
            queue.add_metric([model, tier], number)
        yield queue
