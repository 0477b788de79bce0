"""The client for code that blocks: answers, streams, futures."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeAlias, Unpack

from fabric.sdk.adapters import Adapter
from fabric.sdk.aio import AsyncFabric
from fabric.sdk.background import BackgroundLoop
from fabric.sdk.batches import Batch
from fabric.sdk.embeddings import Embeddings, EmbedOptions
from fabric.sdk.instances import OwnInstance
from fabric.sdk.options import Options, Prompt
from fabric.sdk.programs import OnEvent, ProgramOptions, ProgramResult, PromptToken, Quote
from fabric.sdk.records import Model, Run, Site, Spend, Statement, Ticket, WhoAmI
from fabric.sdk.results import Completion, Json
from fabric.sdk.stream import Stream
from fabric.sdk.tiers import Attained, Estimate, Queue, Size

if TYPE_CHECKING:
    from fabric.messages import Placement, PointManifest, Program

FabricFuture: TypeAlias = Future[Completion]
"""An answer to come. ``cancel`` works until it is there: a request that waits is never sent, and
one that runs is cancelled on the hub."""


class Fabric:
    """A client of one hub, usable from any number of threads.

    What is not given comes from the settings (``fabric config show``) when the first request is
    made. ``Options`` lists what every request may carry.

    Args:
        base_url: The hub's address.
        api_key: The credential; without one it is the login of ``fabric login``.
        project: For which project to act, where a login has several.
        timeout_s: How long the hub may say nothing before a request fails.
        num_retries: How often to send a request again that the hub could not take; never after
            the first token.
        num_parallel: How many of the requests given to ``submit`` and ``map`` run at once.
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        project: str | None = None,
        timeout_s: float | None = None,
        num_retries: int = 1,
        num_parallel: int = 16,
    ) -> None:
        self._fabric = AsyncFabric(
            base_url, api_key, project=project, timeout_s=timeout_s, num_retries=num_retries
        )
        self._background = BackgroundLoop(on_close=self._fabric.aclose)
        self._num_parallel = num_parallel
        self._slots = asyncio.Semaphore(num_parallel)

    @property
    def base_url(self) -> str:
        """The hub's address."""
        return self._fabric.base_url

    def complete(self, prompt: str, **options: Unpack[Options]) -> Completion:
        """Continue a text.

        Raises:
            FabricError: The request was refused, could not be placed, or failed.
        """
        return self._background.run(self._fabric.complete(prompt, **options))

    def chat(self, messages: Prompt, **options: Unpack[Options]) -> Completion:
        """Answer a conversation, or a single question.

        Raises:
            FabricError: The request was refused, could not be placed, or failed.
        """
        return self._background.run(self._fabric.chat(messages, **options))

    def stream(self, prompt: str, **options: Unpack[Options]) -> Stream:
        """Continue a text, token by token. Closing the stream early cancels the request.

        Raises:
            FabricError: The request was refused or could not be placed.
        """
        inner = self._background.run(self._fabric.stream(prompt, **options))
        return Stream(inner, self._background)

    def stream_chat(self, messages: Prompt, **options: Unpack[Options]) -> Stream:
        """Answer a conversation, token by token. Closing the stream early cancels the request.

        Raises:
            FabricError: The request was refused or could not be placed.
        """
        inner = self._background.run(self._fabric.stream_chat(messages, **options))
        return Stream(inner, self._background)

    def submit(self, prompt: Prompt, **options: Unpack[Options]) -> FabricFuture:
        """Ask without waiting: continue a text, or answer a conversation.

        At most ``num_parallel`` requests are on their way at once; the others wait their turn.
        """
        return self._background.submit(self._ask_in_turn(prompt, options))

    def map(self, prompts: Iterable[Prompt], **options: Unpack[Options]) -> Iterator[Completion]:
        """Yield the answers in the order of the prompts, several being computed at once.

        Prompts are taken as answers are: an endless iterable is fine. Leaving the loop early
        cancels what is under way.

        Raises:
            FabricError: At the place of the prompt that failed.
        """
        window: deque[FabricFuture] = deque()
        try:
            for prompt in prompts:
                window.append(self.submit(prompt, **options))
                if len(window) >= self._num_parallel:
                    yield window.popleft().result()
            while window:
                yield window.popleft().result()
        finally:
            for future in window:
                future.cancel()

    def embed(self, texts: str | Sequence[str], **options: Unpack[EmbedOptions]) -> Embeddings:
        """Turn texts into vectors of length 1, one a text and in their order.

        Args:
            texts: As many as there are; long lists go in several requests.
            **options: See ``EmbedOptions``.

        Raises:
            FabricError: A text was refused (one that is too long is never cut), could not be
                placed, or failed.
        """
        return self._background.run(self._fabric.embed(texts, **options))

    def points(self, model: str | None = None) -> PointManifest:
        """Return where programs may read and write in a model.

        Raises:
            FabricError: The model is not known, or serves no programs.
        """
        return self._background.run(self._fabric.points(model))

    def run_program(
        self,
        program: Program,
        *,
        model: str | None = None,
        on_event: OnEvent | None = None,
        **options: Unpack[ProgramOptions],
    ) -> ProgramResult:
        """Run an intervention program to its end. ``fabric.trace`` makes programs.

        Args:
            program: Its runs, and its constants inline.
            model: ``name`` or ``name@revision``.
            on_event: Called with each token and each streamed save as it arrives, on the thread
                of the client's connections: it must not block.
            **options: See ``ProgramOptions``.

        Raises:
            FabricError: It was refused, could not be placed, or failed.
        """
        return self._background.run(
            self._fabric.run_program(program, model=model, on_event=on_event, **options)
        )

    def quote_program(
        self, program: Program, *, model: str | None = None, **options: Unpack[ProgramOptions]
    ) -> Quote:
        """Return what a program would take at most.

        Raises:
            FabricError: It would be refused.
        """
        return self._background.run(self._fabric.quote_program(program, model=model, **options))

    def artifact(self, id: str) -> bytes:
        """Return what the hub keeps of a program: a safetensors file.

        Raises:
            NotFound: There is none of that id, it is somebody else's, or it has expired.
        """
        return self._background.run(self._fabric.artifact(id))

    def delete_artifact(self, id: str) -> None:
        """Have the hub forget an artifact before it expires.

        Raises:
            NotFound: There is none of that id, it is somebody else's, or it has expired.
        """
        self._background.run(self._fabric.delete_artifact(id))

    def tokens(
        self, prompt: str | Sequence[int], *, model: str | None = None
    ) -> tuple[PromptToken, ...]:
        """Return the tokens of a text, or of token ids, as the model reads them.

        It is a run of its own, which generates nothing.

        Raises:
            FabricError: The prompt was refused, could not be placed, or failed.
        """
        return self._background.run(self._fabric.tokens(prompt, model=model))

    def explain(self, prompt: Prompt, **options: Unpack[Options]) -> Placement:
        """Return where the request would run now, and the cost of every candidate.

        Raises:
            FabricError: The request would be refused, or could not be placed.
        """
        return self._background.run(self._fabric.explain(prompt, **options))

    def models(self) -> tuple[Model, ...]:
        """Return the models the hub can serve."""
        return self._background.run(self._fabric.models())

    def sites(self) -> tuple[Site, ...]:
        """Return the sites with what runs there."""
        return self._background.run(self._fabric.sites())

    def slo(self) -> tuple[Attained, ...]:
        """Return how far the promise of each tier was kept, over several windows."""
        return self._background.run(self._fabric.slo())

    def queue(self) -> tuple[Queue, ...]:
        """Return what waits at the hub for a row."""
        return self._background.run(self._fabric.queue())

    def estimate(
        self, num_requests: int, *, model: str | None = None, **size: Unpack[Size]
    ) -> Estimate:
        """Return what many requests would take and cost, by site. Nothing is run.

        Args:
            num_requests: How many there are.
            model: ``name`` or ``name@revision``.
            **size: ``prompt_tokens`` of each of them, and ``output_tokens`` that each generates;
                the ``tier`` they would be asked as (``batch``), and ``sites`` where they may run.

        Raises:
            FabricError: Such a request would be refused.
        """
        return self._background.run(self._fabric.estimate(num_requests, model=model, **size))

    def usage(self, *, since: str | None = None, limit: int | None = None) -> Statement:
        """Return the allocations of the caller's project and its latest charges.

        Args:
            since: An ISO 8601 time; only what was charged since then.
            limit: The most entries.
        """
        return self._background.run(self._fabric.usage(since=since, limit=limit))

    def spend(self, *, since: str | None = None) -> tuple[Spend, ...]:
        """Return what the runs of the caller's project since then add up to, by model and site."""
        return self._background.run(self._fabric.spend(since=since))

    def runs(self, *, limit: int = 20) -> tuple[Run, ...]:
        """Return the caller's latest runs, newest first."""
        return self._background.run(self._fabric.runs(limit=limit))

    def run(self, run_id: str) -> Run:
        """Return one run's record.

        Raises:
            NotFound: There is no such run, or it is somebody else's.
        """
        return self._background.run(self._fabric.run(run_id))

    def ticket(
        self, site: str, *, ttl_s: float | None = None, max_usu: int | None = None
    ) -> Ticket:
        """Return a new ticket for raw Globus Compute calls at a site.

        Args:
            site: Where it is taken.
            ttl_s: Seconds it is good for: an hour by default, at most a day.
            max_usu: The most that all its calls together may cost, in micro-SU.

        Raises:
            UnknownSite: There is no such site.
        """
        return self._background.run(self._fabric.ticket(site, ttl_s=ttl_s, max_usu=max_usu))

    def tickets(self) -> tuple[Ticket, ...]:
        """Return the project's tickets that can still be used."""
        return self._background.run(self._fabric.tickets())

    def revoke_ticket(self, ticket_id: str) -> Ticket:
        """Void a ticket; calls it has paid for go on.

        Raises:
            NotFound: There is no such ticket, or it is somebody else's.
        """
        return self._background.run(self._fabric.revoke_ticket(ticket_id))

    def add_adapter(
        self, path: str | Path, *, name: str | None = None, model: str | None = None
    ) -> Adapter:
        """Keep an adapter at the hub, for the caller's project alone.

        Args:
            path: The directory that PEFT's ``save_pretrained`` wrote.
            name: What requests call it (``adapter=``); the directory's name by default.
            model: The version it was trained on.

        Raises:
            AdapterInvalid: It is not plain LoRA of linear layers, or its files are damaged.
            Duplicate: The project has another adapter of this name.
        """
        return self._background.run(self._fabric.add_adapter(path, name=name, model=model))

    def adapters(self) -> tuple[Adapter, ...]:
        """Return the project's adapters, in order of name."""
        return self._background.run(self._fabric.adapters())

    def delete_adapter(self, name: str) -> None:
        """Delete an adapter; what runs with it runs to its end.

        Raises:
            NotFound: There is no such adapter, or it is somebody else's.
        """
        return self._background.run(self._fabric.delete_adapter(name))

    def batch(
        self,
        file: str | Path,
        *,
        endpoint: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Batch:
        """Upload a file with one request a line and begin to answer it.

        Args:
            file: JSON lines, each ``{"custom_id": …, "method": "POST", "url": …, "body": …}``.
            endpoint: The lines' ``url``; that of the first line by default.
            metadata: Up to 16 notes that stay with the batch.

        Raises:
            FabricError: The file cannot be read, or the hub refused it.
        """
        return self._background.run(self._fabric.batch(file, endpoint=endpoint, metadata=metadata))

    def batches(self, *, limit: int = 20) -> tuple[Batch, ...]:
        """Return the project's latest batches, newest first."""
        return self._background.run(self._fabric.batches(limit=limit))

    def get_batch(self, batch_id: str) -> Batch:
        """Return a batch as it is now.

        Raises:
            NotFound: There is no such batch, or it is somebody else's.
        """
        return self._background.run(self._fabric.get_batch(batch_id))

    def batch_results(self, batch_id: str) -> tuple[Json, ...]:
        """Return the results of a batch that is over: the answers, then the errors.

        Each has the ``custom_id`` of its request, and a ``response`` or an ``error``.

        Raises:
            NotFound: There is no such batch, or it is somebody else's.
        """
        return self._background.run(self._fabric.batch_results(batch_id))

    def cancel_batch(self, batch_id: str) -> Batch:
        """End a batch early; what was answered stays.

        Raises:
            BatchOver: It has ended.
            NotFound: There is no such batch, or it is somebody else's.
        """
        return self._background.run(self._fabric.cancel_batch(batch_id))

    def add_instance(
        self,
        model: str,
        machine: str,
        *,
        sharing: str = "project",
        overflow: bool | None = None,
        lifetime_s: float = 604_800.0,
    ) -> Json:
        """Ask for the permission to start one instance in a job of one's own.

        Args:
            model: What it runs, as ``name@revision``.
            machine: What the machine is called.
            sharing: Who may use it: ``private``, ``project`` or ``shared``.
            overflow: Whether requests of those whose it is may go elsewhere while it is there; by
                default they may if it is shared with all.
            lifetime_s: Seconds in which it may join.

        Returns:
            A ``Launch`` (``fabric.messages``) as JSON. It has the instance's token.
        """
        return self._background.run(
            self._fabric.add_instance(
                model, machine, sharing=sharing, overflow=overflow, lifetime_s=lifetime_s
            )
        )

    def instances(self) -> tuple[OwnInstance, ...]:
        """Return the instances that the project has brought, newest first."""
        return self._background.run(self._fabric.instances())

    def expect_instance(self, instance: str, ready_in_s: float) -> None:
        """Say when an instance of the project's should have joined: requests may wait for it.

        What is not said again within a minute is forgotten.

        Raises:
            NotFound: There is none of this name, or it is somebody else's.
        """
        self._background.run(self._fabric.expect_instance(instance, ready_in_s))

    def report_job(self, instance: str, job: Mapping[str, object]) -> Json:
        """Note in the project's statement what the machine charges for an instance's job.

        Args:
            instance: What ran in it.
            job: ``launch``, ``job_id``, ``account``, ``num_nodes``, ``elapsed_s``, ``charge`` in
                the machine's ``unit``, ``source`` and ``ended_at``.

        Returns:
            What is noted of the job: the first report counts.

        Raises:
            NotFound: There is no such instance, or it is somebody else's.
        """
        return self._background.run(self._fabric.report_job(instance, job))

    def report_balance(self, instance: str, balance: Mapping[str, object]) -> None:
        """Note what the account has left that pays for an instance of the project's.

        It counts for choices among instances at its site alone.

        Args:
            instance: What it pays for.
            balance: ``account``, its ``unit``, what is ``available``, and ``needed``, what jobs
                that were asked for may still take, or ``None``.

        Raises:
            NotFound: There is no such instance, or it is somebody else's.
        """
        self._background.run(self._fabric.report_balance(instance, balance))

    def drain_instance(self, instance: str) -> None:
        """Ask an instance of the project's to finish what it has and leave.

        Raises:
            NotFound: It is not connected, or is somebody else's.
        """
        self._background.run(self._fabric.drain_instance(instance))

    def end_instance(self, instance: str, reason: str, *, failed: bool = False) -> None:
        """Void the token of an instance of the project's, and end its session.

        Raises:
            NotFound: There is none of this name, or it is somebody else's.
        """
        self._background.run(self._fabric.end_instance(instance, reason, failed=failed))

    def whoami(self) -> WhoAmI:
        """Return who the hub takes the caller for."""
        return self._background.run(self._fabric.whoami())

    def close(self) -> None:
        """Cancel what is under way and close all connections. Twice is harmless."""
        self._background.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    async def _ask_in_turn(self, prompt: Prompt, options: Options) -> Completion:
        async with self._slots:
            return await self._fabric.ask(prompt, options)
