"""Raw calls as an instance tells of them: tickets and usage, spoken to a hub frame by frame."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import httpx
from websockets.sync.client import ClientConnection, connect

from fabric.broker import BrokerSettings
from fabric.catalog import RunRecord
from fabric.messages import (
    Hello,
    Limits,
    Metered,
    Redeem,
    Redeemed,
    Request,
    Sampling,
    Settled,
    TextInput,
    Usage,
    parse_from_hub,
)
from fabric.testing.fixed_programs import get_manifest
from fabric.testing.hub import MODEL, PROJECT, RunningHub, running_hub

DIGEST = "sha256:" + "0" * 64
LIMITS = Limits(context_tokens=2048, max_rows=4, cache_tokens=8192, modes=("query", "program"))
GRANT_USU = 10_000
MAX_CHARGE_USU = 6 + 2 * 10
"""Of ``get_request()``: five bytes and one token more, and ten tokens of output."""
TIMEOUT_S = 20.0


@contextmanager
def running_two_site_hub(
    folder: Path, settings: BrokerSettings, *, grant_usu: int = GRANT_USU
) -> Iterator[RunningHub]:
    """Run a hub that knows the sites alpha and beta, and whose instances are those launched."""
    with running_hub(folder, sites=(), grant_usu=grant_usu, broker=settings) as hub:
        hub.catalog.add_site("alpha")
        hub.catalog.add_site("beta")
        yield hub


class RawInstance:
    """An instance that says exactly what it is told."""

    def __init__(self, socket: ClientConnection, http: httpx.Client) -> None:
        self.socket = socket
        self.http = http

    def redeem(self, ticket: str, asked: Request, **changes: object) -> str | None:
        """Return the code a ticket is refused with."""
        frame = Redeem(task_id=asked.id, attempt=1, ticket=ticket, request=asked)
        self.socket.send(frame.model_copy(update=changes).model_dump_json())
        answer = self._answer()
        assert isinstance(answer, Redeemed)
        return answer.failure.code if answer.failure else None

    def report(
        self,
        run: str,
        failure_code: str | None = None,
        *,
        device_s: float = 0.0,
        **usage: int,
    ) -> None:
        """Say what a run consumed, and wait until that is settled."""
        frame = Metered(
            task_id=run,
            attempt=1,
            usage=Usage(device_s=device_s, **usage),
            failure_code=failure_code,
            total_s=1.5,
        )
        self.socket.send(frame.model_dump_json())
        assert self._answer() == Settled(task_id=run, attempt=1)

    def _answer(self) -> object:
        return parse_from_hub(str(self.socket.recv(timeout=TIMEOUT_S)))


def launch(
    hub: RunningHub, site: str = "alpha"
) -> Callable[[], AbstractContextManager[RawInstance]]:
    """Launch an instance at a site and return what dials the hub as it, as often as called."""
    record, token = hub.catalog.add_launch(site, MODEL)
    hello = Hello(
        instance=record.instance,
        site=site,
        model=record.model,
        digest=DIGEST,
        limits=LIMITS,
        dtype="float32",
        engine="test",
        points=get_manifest(MODEL, DIGEST, LIMITS.context_tokens),
    )

    @contextmanager
    def dialled() -> Iterator[RawInstance]:
        headers = {"Authorization": f"Bearer {token}"}
        with (
            connect(hub.session_url, additional_headers=headers) as socket,
            httpx.Client(base_url=hub.base_url, headers=headers, timeout=TIMEOUT_S) as http,
        ):
            socket.send(hello.model_dump_json())
            assert '"welcome"' in str(socket.recv(timeout=TIMEOUT_S))
            yield RawInstance(socket, http)

    return dialled


def issue(client: httpx.Client, site: str = "alpha", **body: object) -> str:
    """Return a ticket that the caller was given for a site."""
    reply = client.post("/v1/fabric/tickets", json={"site": site, **body})
    assert reply.status_code == 200, reply.text
    return str(reply.json()["ticket"])


def get_request(**changes: object) -> Request:
    """Return what is asked of an instance."""
    asked = Request(
        model=MODEL,
        input=TextInput(text="hello"),
        sampling=Sampling(max_tokens=10),
        deadline_s=60.0,
    )
    return asked.model_copy(update=changes)


def balance(hub: RunningHub) -> tuple[int, int]:
    """Return what is available and what is held, in micro-SU, of books that add up."""
    (one,) = hub.ledger.allocations(PROJECT)
    hub.ledger.verify()
    return one.available_usu, one.held_usu


def record_of(hub: RunningHub, run: str) -> RunRecord:
    """Return what is on record of a run."""
    return hub.catalog.run(run, project=PROJECT)
