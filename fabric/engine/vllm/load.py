"""How busy a vLLM server is: what it tells of itself, and what its answers show."""

from __future__ import annotations

import re
import time
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Self

import httpx

from fabric.messages import Load

_SAMPLE = re.compile(r"^(vllm:\w+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')
_TIMEOUT_S = 5.0
_MEMORY = 0.8
"""How much of the past a rate keeps at each answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gauges:
    """The server's own figures; counters since its start. ``cache_tokens`` 0: not told."""

    cache_usage: float = 0.0
    cache_tokens: int = 0
    num_preempted: int = 0
    queried_tokens: int = 0
    found_tokens: int = 0

    @classmethod
    async def read(cls, http: httpx.AsyncClient) -> Self:
        """Ask the server; what it does not tell stays 0.

        Raises:
            HTTPError: It does not answer.
        """
        response = await http.get("/metrics", timeout=_TIMEOUT_S)
        values: dict[str, float] = {}
        labels: dict[str, dict[str, str]] = {}
        for name, labelled, value in _SAMPLE.findall(response.raise_for_status().text):
            values[name] = values.get(name, 0.0) + float(value)
            labels[name] = dict(_LABEL.findall(labelled))
        cache = labels.get("vllm:cache_config_info", {})
        numbers = [cache.get(key, "") for key in ("num_gpu_blocks", "block_size")]
        told = all(number.isdigit() for number in numbers)
        return cls(
            cache_usage=min(1.0, max(0.0, values.get("vllm:kv_cache_usage_perc", 0.0))),
            cache_tokens=int(numbers[0]) * int(numbers[1]) if told else 0,
            num_preempted=int(values.get("vllm:num_preemptions_total", 0)),
            queried_tokens=int(values.get("vllm:prefix_cache_queries_total", 0)),
            found_tokens=int(values.get("vllm:prefix_cache_hits_total", 0)),
        )


@dataclass(slots=True)
class _Asked:
    num_rows: int
    num_prompt: int
    began_at: float
    share_at_begin: float


class Busy:
    """The tasks that are with the server, and the time it spent on them.

    The server tells no device-seconds: each moment is divided among the tasks that are with it, so
    that their sum is the time in which there was any. Written on one thread, read on any.
    """

    def __init__(self) -> None:
        self._asked: dict[Hashable, _Asked] = {}
        self._share_s = 0.0
        """What a task would have had that was always there."""
        self._busy_s = 0.0
        self._looked_at = time.monotonic()
        self._decode_tokens_per_s = self._prefill_tokens_per_s = 0.0

    def begin(self, key: Hashable, num_rows: int, num_prompt: int) -> None:
        """Count a task in."""
        now = self._look()
        self._asked[key] = _Asked(num_rows, num_prompt, now, self._share_s)

    def end(self, key: Hashable, num_tokens: int, *, embedded: bool = False) -> float:
        """Count a task out that got so many tokens, or a vector; return its device-seconds."""
        now = self._look()
        asked = self._asked.pop(key)
        together = (1 + len(self._asked)) / max(now - asked.began_at, 1e-6)
        if embedded:
            rate = asked.num_prompt * together
            self._prefill_tokens_per_s = _mix(self._prefill_tokens_per_s, rate)
        else:
            rate = num_tokens * together
            self._decode_tokens_per_s = _mix(self._decode_tokens_per_s, rate)
        return self._share_s - asked.share_at_begin

    def load(self, gauges: Gauges, *, max_rows: int) -> Load:
        """Return what the instance tells the hub."""
        num_rows = sum(asked.num_rows for asked in list(self._asked.values()))
        num_running = min(num_rows, max_rows)
        rate = self._decode_tokens_per_s
        return Load(
            num_running=num_running,
            num_waiting=num_rows - num_running,
            cache_usage=gauges.cache_usage,
            num_preempted=gauges.num_preempted,
            prefix_queried_tokens=gauges.queried_tokens,
            prefix_found_tokens=gauges.found_tokens,
            busy_s=self._busy_s,
            step_s=max(1, num_running) / rate if rate else 0.0,
            prefill_tokens_per_s=self._prefill_tokens_per_s,
            decode_tokens_per_s=rate,
        )

    def _look(self) -> float:
        now = time.monotonic()
        if self._asked:
            passed = now - self._looked_at
            self._busy_s += passed
            self._share_s += passed / len(self._asked)
        self._looked_at = now
        return now


def _mix(before: float, rate: float) -> float:
    return _MEMORY * (before or rate) + (1.0 - _MEMORY) * rate
