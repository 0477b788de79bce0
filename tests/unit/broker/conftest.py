"""A broker over a real ledger and catalog; its sites are engines with a fixed pace."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from fabric.auth import Identity
from fabric.broker import Broker, BrokerSettings, Run
from fabric.catalog import Catalog
from fabric.ledger import AllocationBalance, Ledger
from fabric.messages import Limits, Request, RunEvent, Sampling, TextInput
from fabric.sql import Database, migrate
from fabric.sql.offload import Offload
from fabric.testing.channel import FakeChannel
from fabric.testing.engine import FixedDelayEngine

DIGEST = "sha256:" + "0" * 64
CONTEXT_TOKENS = 2048
GRANT_USU = 1_000_000


class Hub:
    """The rooms a broker stands on, a broker, and channels to pretended instances."""

    def __init__(self, path: Path) -> None:
        self.database = Database(f"sqlite:///{path / 'hub.db'}").open()
        migrate(self.database)
        self.ledger = Ledger(self.database)
        self.catalog = Catalog(self.database)
        self.offload = Offload(self.database)
        self.engines: list[FixedDelayEngine] = []
        self.brokers: list[Broker] = []
        for site in ("alpha", "beta"):
            self.catalog.add_site(site)
        self.catalog.add_model(
            "fixed", "1", context_tokens=CONTEXT_TOKENS, source="none", digest=DIGEST
        )
        self.ledger.set_rate("*", "*", prompt_usu=1, cached_prompt_usu=0, output_usu=10)

    def grant(self, site: str = "*", amount_usu: int = GRANT_USU) -> str:
        name = self.ledger.open_allocation("astro", site)
        self.ledger.grant(name, amount_usu)
        return name

    async def broker(self, **settings: Any) -> Broker:
        fields: dict[str, Any] = {"tick_s": 0.02, "patience_s": 1.0, **settings}
        broker = Broker(
            ledger=self.ledger,
            catalog=self.catalog,
            offload=self.offload,
            settings=BrokerSettings(**fields),
        )
        await broker.start()
        self.brokers.append(broker)
        return broker

    def channel(self, site: str, *, instance: str = "", **engine: Any) -> FakeChannel:
        limits = Limits(context_tokens=CONTEXT_TOKENS, max_rows=64, cache_tokens=10**6)
        started = FixedDelayEngine(**{"digest": DIGEST, "limits": limits, **engine})
        started.start()
        self.engines.append(started)
        return FakeChannel(started, site=site, instance=instance or f"{site}-1")

    def allocation(self, name: str = "allocation:astro:*") -> AllocationBalance:
        return self.ledger.allocation(name)

    async def close(self) -> None:
        for broker in self.brokers:
            await broker.close()
        for engine in self.engines:
            engine.close()
        self.offload.close()
        self.ledger.verify()
        self.database.close()


@pytest.fixture
async def hub(tmp_path: Path) -> AsyncIterator[Hub]:
    made = Hub(tmp_path)
    yield made
    await made.close()


@pytest.fixture
def caller() -> Identity:
    return Identity(key_id="key_1", project="astro", scopes=frozenset({"query"}), max_concurrent=64)


@pytest.fixture
def ask() -> Callable[..., Request]:
    """Return a greedy request for 8 tokens; keyword arguments change it."""

    def make(*, max_tokens: int | None = 8, temperature: float = 0.0, **changes: Any) -> Request:
        sampling = changes.pop("sampling", None) or Sampling(
            max_tokens=max_tokens, temperature=temperature
        )
        fields: dict[str, Any] = {"model": "fixed", "input": TextInput(text="one two three")}
        return Request(**{**fields, **changes}, sampling=sampling)

    return make


@pytest.fixture
def read() -> Callable[[Run], Any]:
    """Read a run to its end."""

    async def all_events(run: Run) -> list[RunEvent]:
        async with asyncio.timeout(20):
            return [event async for event in run.events()]

    return all_events


@pytest.fixture
def until() -> Callable[..., Any]:
    """Wait until a condition holds; fail after ``limit_s``."""

    async def wait(condition: Callable[[], object], limit_s: float = 20.0) -> float:
        began = time.monotonic()
        while not condition():
            assert time.monotonic() - began < limit_s, "it did not happen in time"
            await asyncio.sleep(0.005)
        return time.monotonic() - began

    return wait
