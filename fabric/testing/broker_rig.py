"""The broker's state with a clock of its own: events in, instructions kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, TypeVar

from fabric.broker.select import Context, Offer
from fabric.broker.settings import BrokerSettings
from fabric.broker.signals import (
    Admitted,
    AttemptEvent,
    AttemptLost,
    Emit,
    Instruction,
    ReplicaJoined,
    ReplicaLeft,
    SendTask,
    StateEvent,
    Tick,
    Ticket,
)
from fabric.broker.state import BrokerState
from fabric.errors import (
    FabricError,
    SessionLost,
)
from fabric.ledger import Rate
from fabric.messages import (
    Accepted,
    Event,
    Failed,
    Failure,
    Finished,
    Hello,
    Limits,
    Placement,
    Request,
    RunFailed,
    Sampling,
    TextInput,
    Token,
    Usage,
)
from fabric.messages.events import FinishReason

DIGEST = "sha256:aa"
LATE = 1_000.0
"""When the tests begin: long after the hub came up, so that no replica is expected any more."""
GENERAL = "allocation:astro:*"
SEEDLESS = Sampling(max_tokens=4, temperature=0.7)
T = TypeVar("T")


def offer(site: str, **changes: Any) -> Offer:
    """Return what a request would cost at a site."""
    fields: dict[str, Any] = {
        "site": site,
        "allocation": GENERAL,
        "available_usu": 10_000,
        "max_charge_usu": 500,
        "expected_charge_usu": 10,
    }
    return Offer(**{**fields, **changes})


def rate(site: str, output_usu: int) -> Rate:
    """Return a site's price: 1 micro-SU a prompt token."""
    return Rate(
        model="*",
        site=site,
        effective_from=datetime(2026, 1, 1, tzinfo=UTC),
        prompt_usu=Decimal(1),
        cached_prompt_usu=Decimal(0),
        output_usu=Decimal(output_usu),
    )


def make_ticket(
    run_id: str = "run_1",
    *,
    sampling: Sampling | None = None,
    offers: Sequence[Offer] = (),
    project: str = "astro",
    own: Mapping[str, bool] | None = None,
    **changes: Any,
) -> Ticket:
    """Return an admitted request; ``changes`` are fields of the request."""
    offers = offers or (offer("alpha"), offer("beta"))
    sampling = sampling or Sampling(max_tokens=4, temperature=0.0)
    request = Request(
        id=run_id, model="smol", input=TextInput(text="Why?"), sampling=sampling, **changes
    )
    return Ticket(
        request=request,
        project=project,
        key_id="key_1",
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        model="smol@1",
        digest=DIGEST,
        offers={one.site: one for one in offers},
        rates={one.site: rate(one.site, 20 if one.site == "beta" else 10) for one in offers},
        held_allocation=GENERAL,
        held_usu=500,
        prompt_tokens_bound=5,
        max_output_tokens=4,
        own=own or {},
    )


class Rig:
    """A state with a clock, and all the instructions it has given."""

    def __init__(self, *sites: str, started_at: float = 0.0, **settings: Any) -> None:
        self.settings = BrokerSettings(**settings)
        self.state = BrokerState(self.settings, started_at=started_at)
        self.now = LATE
        self.done: list[Instruction] = []
        for site in sites:
            self.join(site)

    def feed(self, event: StateEvent) -> list[Instruction]:
        """Feed one event and keep what comes of it."""
        out = self.state.handle(event)
        self.done += out
        return out

    def join(self, site: str, instance: str | None = None, **changes: Any) -> list[Instruction]:
        """An instance joins."""
        hello = Hello(
            instance=instance or f"{site}-1",
            site=site,
            model="smol@1",
            digest=changes.pop("digest", DIGEST),
            limits=Limits(context_tokens=64, max_rows=4, cache_tokens=256),
            dtype="float32",
            engine="test",
            deadline_s=changes.pop("deadline_s", None),
        )
        return self.feed(
            ReplicaJoined(
                now=self.now, hello=hello, streams=changes.pop("streams", True), joined_at=0.0
            )
        )

    def leave(self, instance: str, *, lost: bool = True) -> list[Instruction]:
        """An instance leaves."""
        return self.feed(ReplicaLeft(now=self.now, instance=instance, lost=lost))

    def admit(self, run_id: str = "run_1", **changes: Any) -> SendTask | None:
        """A request is admitted; return its task if one is sent at once."""
        ticket = make_ticket(run_id, **changes)
        out = self.feed(Admitted(now=self.now, started_at=self.now, ticket=ticket))
        return next((one for one in out if isinstance(one, SendTask)), None)

    def tick(self, seconds: float = 0.0) -> list[Instruction]:
        """Time goes by."""
        self.now += seconds
        return self.feed(Tick(now=self.now))

    def say(self, sent: SendTask, event: Event) -> list[Instruction]:
        """The instance says something of a task."""
        return self.feed(
            AttemptEvent(now=self.now, run_id=sent.run_id, attempt=sent.task.attempt, event=event)
        )

    def accept(self, sent: SendTask, prompt_tokens: int = 3) -> None:
        """The instance accepts a task."""
        self.say(sent, Accepted(**key(sent), prompt_tokens=prompt_tokens))

    def token(
        self, sent: SendTask, position: int, finish: FinishReason | None = None, choice: int = 0
    ) -> list[Instruction]:
        """The instance generates a token."""
        token = Token(
            **key(sent),
            choice=choice,
            position=position,
            token_id=100 + position,
            text=f"t{position}",
            finish_reason=finish,
        )
        return self.say(sent, token)

    def finish(self, sent: SendTask, num_tokens: int, **usage: Any) -> list[Instruction]:
        """The instance finishes a task."""
        fields: dict[str, Any] = {"prompt_tokens": 3, "output_tokens": num_tokens, **usage}
        return self.say(
            sent, Finished(**key(sent), finish_reasons=("length",), usage=Usage(**fields))
        )

    def fail(self, sent: SendTask, error: FabricError, **usage: Any) -> list[Instruction]:
        """The instance fails a task."""
        failed = Failed(**key(sent), failure=Failure.of(error), usage=Usage(**usage))
        return self.say(sent, failed)

    def lose(self, sent: SendTask) -> list[Instruction]:
        """The connection with a task on it is lost."""
        error = SessionLost(instance=sent.instance, reason="the cable was pulled")
        return self.feed(
            AttemptLost(now=self.now, run_id=sent.run_id, attempt=sent.task.attempt, error=error)
        )

    def all(self, kind: type[T]) -> list[T]:
        """Return all instructions of a kind."""
        return [one for one in self.done if isinstance(one, kind)]

    def emitted(self, kind: type[T]) -> list[T]:
        """Return all events of a kind that went to clients."""
        return [one.event for one in self.all(Emit) if isinstance(one.event, kind)]

    def failure(self) -> Failure:
        """Return why the only failed run failed."""
        [failed] = self.emitted(RunFailed)
        return failed.failure


def key(sent: SendTask) -> dict[str, Any]:
    """Return the fields that name an attempt."""
    return {"task_id": sent.run_id, "attempt": sent.task.attempt}


def only(out: Sequence[Instruction], kind: type[T]) -> T:
    """Return the one instruction of a kind."""
    [found] = [one for one in out if isinstance(one, kind)]
    return found


def admit(rig: Rig, **changes: Any) -> SendTask:
    """Admit a request and have its task accepted."""
    sent = rig.admit(**changes)
    assert sent is not None
    rig.accept(sent)
    return sent


def foresee(rig: Rig, **changes: Any) -> Placement | None:
    """Return where a request would go if it was admitted now; raises as ``BrokerState.foresee``."""
    request, context = informed(rig, **changes)
    return rig.state.foresee(rig.now, request, context, project="astro")


def informed(rig: Rig, **changes: Any) -> tuple[Request, Context]:
    """Return a request and what a choice for it rests on; ``changes`` as for ``make_ticket``."""
    ticket = make_ticket(**changes)
    context = Context(
        model=ticket.model,
        digest=ticket.digest,
        offers=ticket.offers,
        remaining_s=ticket.request.deadline_s,
        settings=rig.settings,
    )
    request = ticket.request
    return request, rig.state.experience.informed(rig.now, request, context)
