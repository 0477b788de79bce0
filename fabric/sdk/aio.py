"""The client for code that runs in an event loop; ``Fabric`` is this one on a loop of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, Unpack

from fabric.errors import RequestInvalid
from fabric.sdk import adapters, batches, instances, programs, tiers
from fabric.sdk.adapters import Adapter
from fabric.sdk.batches import Batch
from fabric.sdk.embeddings import Embeddings, EmbedOptions, build_bodies
from fabric.sdk.instances import OwnInstance
from fabric.sdk.options import Options, Prompt, as_conversation, build_body
from fabric.sdk.programs import OnEvent, ProgramOptions, ProgramResult, PromptToken, Quote
from fabric.sdk.records import Model, Run, Site, Spend, Statement, Ticket, WhoAmI
from fabric.sdk.results import Completion, Json
from fabric.sdk.stream import AsyncStream
from fabric.sdk.tiers import Attained, Estimate, Queue

if TYPE_CHECKING:
    import httpx

    from fabric.config import Settings
    from fabric.messages import Placement, PointManifest, Program
    from fabric.sdk.login import Login
    from fabric.sdk.transport import Transport


class AsyncFabric:
    """A client of one hub.

    What is not given comes from the settings (``fabric config show``) when the first request is
    made. ``Options`` lists what every request may carry.

    Args:
        base_url: The hub's address.
        api_key: The credential; without one it is the login of ``fabric login``.
        project: For which project to act, where a login has several.
        timeout_s: How long the hub may say nothing before a request fails.
        num_retries: How often to send a request again that the hub could not take; never after
            the first token.
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        project: str | None = None,
        timeout_s: float | None = None,
        num_retries: int = 1,
    ) -> None:
        self._flags = {
            "client.base_url": base_url,
            "client.api_key": api_key,
            "client.project": project,
            "client.timeout_s": timeout_s,
        }
        self._num_retries = num_retries
        self._only_model: str | None = None
        self._points: dict[str, PointManifest] = {}
        self._login: Login | None = None

    @property
    def base_url(self) -> str:
        """The hub's address."""
        return self._settings.client.base_url

    async def complete(self, prompt: str, **options: Unpack[Options]) -> Completion:
        """Continue a text.

        Raises:
            FabricError: The request was refused, could not be placed, or failed.
        """
        return await self.ask(prompt, options)

    async def chat(self, messages: Prompt, **options: Unpack[Options]) -> Completion:
        """Answer a conversation, or a single question.

        Raises:
            FabricError: The request was refused, could not be placed, or failed.
        """
        return await self.ask(as_conversation(messages), options)

    async def stream(self, prompt: str, **options: Unpack[Options]) -> AsyncStream:
        """Continue a text, token by token; returns once the hub has accepted the request.

        Raises:
            FabricError: The request was refused or could not be placed.
        """
        return await self.ask_stream(prompt, options)

    async def stream_chat(self, messages: Prompt, **options: Unpack[Options]) -> AsyncStream:
        """Answer a conversation, token by token; returns once the hub has accepted the request.

        Raises:
            FabricError: The request was refused or could not be placed.
        """
        return await self.ask_stream(as_conversation(messages), options)

    async def ask(self, prompt: Prompt, options: Options) -> Completion:
        """Continue ``prompt`` if it is a text, answer it if it is a conversation."""
        path, body = await self._build(prompt, options)
        reply = await self._transport.post(path, body, deadline_s=options.get("deadline_s"))
        return Completion.from_reply(reply)

    async def ask_stream(self, prompt: Prompt, options: Options) -> AsyncStream:
        """``ask``, token by token."""
        path, body = await self._build(prompt, options)
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        return AsyncStream(
            await self._transport.open_stream(path, body, deadline_s=options.get("deadline_s"))
        )

    async def embed(
        self, texts: str | Sequence[str], **options: Unpack[EmbedOptions]
    ) -> Embeddings:
        """Turn texts into vectors of length 1; see ``Fabric.embed``."""
        replies: list[Json] = []
        for body in build_bodies([texts] if isinstance(texts, str) else texts, options):
            if "model" not in body:
                body["model"] = await self._find_model()
            reply = await self._transport.post(
                "/v1/embeddings", body, deadline_s=options.get("deadline_s")
            )
            replies.append(reply)
        return Embeddings.from_replies(replies)

    async def points(self, model: str | None = None) -> PointManifest:
        """Return where programs may read and write in a model; see ``Fabric.points``."""
        from fabric.messages import PointManifest

        name = model or await self._find_model()
        if name not in self._points:
            reply = await self._transport.get("/v1/fabric/points", {"model": name})
            self._points[name] = PointManifest.model_validate(reply)
        return self._points[name]

    async def run_program(
        self,
        program: Program,
        *,
        model: str | None = None,
        on_event: OnEvent | None = None,
        **options: Unpack[ProgramOptions],
    ) -> ProgramResult:
        """Run an intervention program to its end; see ``Fabric.run_program``."""
        return await programs.run(
            self._transport, program, model or await self._find_model(), on_event, options
        )

    async def quote_program(
        self, program: Program, *, model: str | None = None, **options: Unpack[ProgramOptions]
    ) -> Quote:
        """Return what a program would take at most.

        Raises:
            FabricError: It would be refused.
        """
        name = model or await self._find_model()
        return await programs.quote(self._transport, program, name, options)

    async def artifact(self, id: str) -> bytes:
        """Return what the hub keeps of a program: a safetensors file.

        Raises:
            NotFound: There is none of that id, it is somebody else's, or it has expired.
        """
        return await self._transport.get_bytes(f"/v1/fabric/artifacts/{id}")

    async def delete_artifact(self, id: str) -> None:
        """Have the hub forget an artifact before it expires.

        Raises:
            NotFound: There is none of that id, it is somebody else's, or it has expired.
        """
        await self._transport.delete(f"/v1/fabric/artifacts/{id}")

    async def tokens(
        self, prompt: str | Sequence[int], *, model: str | None = None
    ) -> tuple[PromptToken, ...]:
        """Return a prompt's tokens as the model reads them; see ``Fabric.tokens``."""
        return await programs.tokens(self._transport, prompt, model or await self._find_model())

    async def explain(self, prompt: Prompt, **options: Unpack[Options]) -> Placement:
        """Return where the request would run now, and the cost of every candidate.

        Raises:
            FabricError: The request would be refused, or could not be placed.
        """
        from fabric.messages import Placement

        _, body = await self._build(prompt, options)
        return Placement.model_validate(await self._transport.post("/v1/fabric/explain", body))

    async def models(self) -> tuple[Model, ...]:
        """Return the models the hub can serve."""
        reply = await self._transport.get("/v1/fabric/models")
        return tuple(Model.from_reply(item) for item in reply["data"])

    async def sites(self) -> tuple[Site, ...]:
        """Return the sites with what runs there."""
        reply = await self._transport.get("/v1/fabric/sites")
        return tuple(Site.from_reply(item) for item in reply["data"])

    async def slo(self) -> tuple[Attained, ...]:
        """Return how far the promise of each tier was kept, over several windows."""
        return await tiers.get_attained(self._transport)

    async def queue(self) -> tuple[Queue, ...]:
        """Return what waits at the hub for a row."""
        return await tiers.get_queues(self._transport)

    async def estimate(
        self, num_requests: int, *, model: str | None = None, **size: Unpack[tiers.Size]
    ) -> Estimate:
        """Return what many requests would take and cost; see ``Fabric.estimate``."""
        model = model or await self._find_model()
        return await tiers.get_estimate(self._transport, model, num_requests, **size)

    async def usage(self, *, since: str | None = None, limit: int | None = None) -> Statement:
        """Return the allocations of the caller's project and its latest charges.

        Args:
            since: An ISO 8601 time; only what was charged since then.
            limit: The most entries.
        """
        given: dict[str, Any] = {"since": since, "limit": limit}
        params = {name: value for name, value in given.items() if value is not None}
        return Statement.from_reply(await self._transport.get("/v1/fabric/usage", params))

    async def spend(self, *, since: str | None = None) -> tuple[Spend, ...]:
        """Return what the runs of the caller's project add up to, by model and site.

        Args:
            since: An ISO 8601 time; only runs since then.
        """
        params = {} if since is None else {"since": since}
        reply = await self._transport.get("/v1/fabric/spend", params)
        return tuple(Spend.from_reply(item) for item in reply["data"])

    async def runs(self, *, limit: int = 20) -> tuple[Run, ...]:
        """Return the caller's latest runs, newest first."""
        reply = await self._transport.get("/v1/fabric/runs", {"limit": limit})
        return tuple(Run.from_reply(item) for item in reply["data"])

    async def run(self, run_id: str) -> Run:
        """Return one run's record.

        Raises:
            NotFound: There is no such run, or it is somebody else's.
        """
        return Run.from_reply(await self._transport.get(f"/v1/fabric/runs/{run_id}"))

    async def ticket(
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
        given = {"site": site, "ttl_s": ttl_s, "max_usu": max_usu}
        body = {name: value for name, value in given.items() if value is not None}
        return Ticket.from_reply(await self._transport.post("/v1/fabric/tickets", body))

    async def tickets(self) -> tuple[Ticket, ...]:
        """Return the project's tickets that can still be used."""
        reply = await self._transport.get("/v1/fabric/tickets")
        return tuple(Ticket.from_reply(item) for item in reply["data"])

    async def revoke_ticket(self, ticket_id: str) -> Ticket:
        """Void a ticket; calls it has paid for go on.

        Raises:
            NotFound: There is no such ticket, or it is somebody else's.
        """
        return Ticket.from_reply(await self._transport.delete(f"/v1/fabric/tickets/{ticket_id}"))

    async def batch(
        self,
        file: str | Path,
        *,
        endpoint: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Batch:
        """Upload a file with one request a line and begin to answer it; see ``Fabric.batch``."""
        return await batches.submit(self._transport, Path(file), endpoint, metadata)

    async def batches(self, *, limit: int = 20) -> tuple[Batch, ...]:
        """Return the project's latest batches, newest first."""
        reply = await self._transport.get("/v1/batches", {"limit": limit})
        return tuple(Batch.from_reply(item) for item in reply["data"])

    async def get_batch(self, batch_id: str) -> Batch:
        """Return a batch as it is now.

        Raises:
            NotFound: There is no such batch, or it is somebody else's.
        """
        return Batch.from_reply(await self._transport.get(f"/v1/batches/{batch_id}"))

    async def batch_results(self, batch_id: str) -> tuple[Json, ...]:
        """Return the results of a batch that is over; see ``Fabric.batch_results``."""
        return await batches.results(self._transport, await self.get_batch(batch_id))

    async def cancel_batch(self, batch_id: str) -> Batch:
        """End a batch early; what was answered stays.

        Raises:
            BatchOver: It has ended.
            NotFound: There is no such batch, or it is somebody else's.
        """
        return Batch.from_reply(await self._transport.post(f"/v1/batches/{batch_id}/cancel", {}))

    async def add_instance(
        self,
        model: str,
        machine: str,
        *,
        sharing: str,
        overflow: bool | None = None,
        lifetime_s: float,
    ) -> Json:
        """Ask for the permission to start an instance; see ``Fabric.add_instance``."""
        return await instances.add(
            self._transport,
            model=model,
            machine=machine,
            sharing=sharing,
            overflow=overflow,
            lifetime_s=lifetime_s,
        )

    async def instances(self) -> tuple[OwnInstance, ...]:
        """Return the instances that the project has brought, newest first."""
        return await instances.listed(self._transport)

    async def expect_instance(self, instance: str, ready_in_s: float) -> None:
        """Say when an instance should have joined; see ``Fabric.expect_instance``."""
        await instances.expect(self._transport, instance, ready_in_s)

    async def report_job(self, instance: str, job: Mapping[str, object]) -> Json:
        """Note what an instance's job took; see ``Fabric.report_job``."""
        return await instances.report_job(self._transport, instance, job)

    async def report_balance(self, instance: str, balance: Mapping[str, object]) -> None:
        """Note what is left of the account that pays; see ``Fabric.report_balance``."""
        await instances.report_balance(self._transport, instance, balance)

    async def drain_instance(self, instance: str) -> None:
        """Ask an instance of the project's to finish what it has and leave."""
        await instances.drain(self._transport, instance)

    async def end_instance(self, instance: str, reason: str, *, failed: bool = False) -> None:
        """Void the token of an instance of the project's."""
        await instances.end(self._transport, instance, reason, failed=failed)

    async def add_adapter(
        self, path: str | Path, *, name: str | None = None, model: str | None = None
    ) -> Adapter:
        """Upload what PEFT saved; see ``Fabric.add_adapter``."""
        model = model or await self._find_model()
        name = name or adapters.name_of(Path(path))
        return await adapters.add(self._transport, Path(path), name=name, model=model)

    async def adapters(self) -> tuple[Adapter, ...]:
        """Return the project's adapters, in order of name."""
        reply = await self._transport.get(adapters.ADAPTERS_PATH)
        return tuple(Adapter.from_reply(item) for item in reply["data"])

    async def delete_adapter(self, name: str) -> None:
        """Delete an adapter; what runs with it runs to its end.

        Raises:
            NotFound: There is no such adapter, or it is somebody else's.
        """
        await self._transport.delete(f"{adapters.ADAPTERS_PATH}/{name}")

    async def whoami(self) -> WhoAmI:
        """Return who the hub takes the caller for."""
        return WhoAmI.from_reply(await self._transport.get("/v1/fabric/whoami"))

    async def aclose(self) -> None:
        """Close all connections."""
        if "_transport" in self.__dict__:
            await self._transport.aclose()
        if self._login is not None:
            await asyncio.to_thread(self._login.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.aclose()

    @cached_property
    def _settings(self) -> Settings:
        from fabric.config import load_settings

        return load_settings(self._flags)

    @cached_property
    def _transport(self) -> Transport:
        # httpx takes a quarter of a second to import: that is for the first request to wait for.
        from fabric.sdk.transport import Transport

        client = self._settings.client
        return Transport(
            base_url=client.base_url,
            auth=self._get_auth(),
            timeout_s=client.timeout_s,
            num_retries=self._num_retries,
            project=client.project,
        )

    def _get_auth(self) -> httpx.Auth | None:
        """Return the key if there is one, else the login if the client knows where to log in."""
        client = self._settings.client
        if client.api_key:
            from fabric.sdk.transport import KeyAuth

            return KeyAuth(client.api_key)
        if not client.globus_hub_client_id:
            return None
        from fabric.sdk.login import Login, LoginAuth

        self._login = Login(client, self._settings.state_dir)
        return LoginAuth(self._login)

    async def _build(self, prompt: Prompt, options: Options) -> tuple[str, dict[str, object]]:
        path, body = build_body(prompt, options)
        if "model" not in body:
            body["model"] = await self._find_model()
        return path, body

    async def _find_model(self) -> str:
        return self._settings.client.model or await self._find_only_model()

    async def _find_only_model(self) -> str:
        if self._only_model is None:
            reply = await self._transport.get("/v1/models")
            names = [item["id"] for item in reply["data"]]
            if len(names) != 1:
                known = ", ".join(names) or "none"
                raise RequestInvalid(
                    param="model", value=None, reason=f"say which one; the hub has {known}"
                )
            self._only_model = names[0]
        return self._only_model
