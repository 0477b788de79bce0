"""A whole Globus Compute on this machine: service, broker, users, endpoints."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import httpx

from fabric.testing.globus.auth import AuthDirectory
from fabric.testing.globus.endpoint import HOME_VARIABLE, Endpoint
from fabric.testing.globus.rabbit import Rabbit, running_rabbit
from fabric.testing.globus.service.records import Json, Report, RequestLog, Task
from fabric.testing.globus.service.settings import PublishedLimits, ServiceSettings
from fabric.testing.globus.service.store import Store
from fabric.testing.globus.users import User, add_users
from fabric.testing.guarded import Guarded
from fabric.testing.ports import reserved_port

if TYPE_CHECKING:
    from globus_compute_sdk import Client

START_TIMEOUT_S = 60.0
COMPUTE_SCOPE = "https://auth.globus.org/scopes/facd7ccc-c5f4-42aa-916b-a0e270e2c2a9/all"


@dataclass(slots=True, kw_only=True)
class Globus:
    """A running rig.

    Attributes:
        users: Who there is, by name: ``site-a``, ``site-b``, ``alice``, ``bob``, ``hub``.
        group_id: A Globus group whose members are alice and the hub.
    """

    users: Mapping[str, User]
    group_id: str
    _settings: ServiceSettings = field(repr=False)
    _rabbit: Rabbit = field(repr=False)
    _home: Path
    _store: Store = field(repr=False)
    _service: Guarded | None = field(default=None, init=False, repr=False)

    @property
    def url(self) -> str:
        """Where the service is."""
        return self._settings.url

    def environ(self, user: str) -> dict[str, str]:
        """Return the environment in which the unmodified SDK and agent act as a user of this rig.

        The SDK knows one address of a service on the own machine, ``http://localhost:5000``; it
        gets there by way of a proxy, which is the service itself.
        """
        home = self._home / "users" / user
        home.mkdir(parents=True, exist_ok=True)
        return {
            "GLOBUS_SDK_ENVIRONMENT": "local",
            "GLOBUS_SDK_SERVICE_URL_AUTH": f"{self.url}/",
            "GLOBUS_SDK_SERVICE_URL_GROUPS": f"{self.url}/",
            "GLOBUS_COMPUTE_CLIENT_ID": self.users[user].client_id,
            "GLOBUS_COMPUTE_CLIENT_SECRET": self.users[user].client_secret,
            HOME_VARIABLE: str(home),
            "http_proxy": self.url,
            "no_proxy": "127.0.0.1",
        }

    def client(self, user: str, **options: Any) -> Client:
        """Return the SDK's client acting as a user, in this process.

        Args:
            user: The user's name.
            **options: More arguments of the client, as serialization strategies.
        """
        from globus_compute_sdk import Client
        from globus_sdk import ClientCredentialsAuthorizer, ConfidentialAppAuthClient

        known = self.users[user]
        auth = ConfidentialAppAuthClient(known.client_id, known.client_secret, base_url=self.url)
        authorizer = ClientCredentialsAuthorizer(auth, COMPUTE_SCOPE)
        client = Client(
            environment="local", authorizer=authorizer, do_version_check=False, **options
        )
        web = client._compute_web_client
        for version in (web.v2, web.v3):
            version.base_url = f"{self.url}/"
        return client

    @contextmanager
    def endpoint(
        self,
        name: str,
        *,
        owner: str = "site-a",
        allowed_functions: Iterable[UUID | str] | None = None,
        template: Path | None = None,
        config: Mapping[str, Any] | None = None,
        task_environ: Mapping[str, str] | None = None,
    ) -> Iterator[Endpoint]:
        """Yield a real endpoint agent that is online, and end it and all it started.

        Args:
            name: Its name, as ``polaris``.
            owner: Whose it is; only the owner's tasks run.
            allowed_functions: The only functions it runs.
            template: A folder with the endpoint's files; see ``Endpoint.configure``.
            config: More of its ``config.yaml``.
            task_environ: What goes into the environment of tasks.
        """
        home = self._home / "endpoints" / f"{name}-{os.urandom(3).hex()}"
        home.mkdir(parents=True)
        endpoint = Endpoint(name=name, home=home, environ=self.environ(owner), store=self._store)
        endpoint.configure(
            template=template,
            allowed_functions=allowed_functions,
            config=config,
            task_environ=task_environ,
        )
        try:
            endpoint.start_core()
            yield endpoint
        finally:
            endpoint.close()

    def start_service(self) -> None:
        """Start the service where it was before; return once it answers.

        Raises:
            TimeoutError: It does not.
        """
        settings = self._home / "service.json"
        settings.touch(mode=0o600)
        settings.write_text(self._settings.model_dump_json())
        command = [sys.executable, "-m", "fabric.testing.globus.service", str(settings)]
        self._service = Guarded(command, self._home / "service.log")
        until = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < until and self._service.running:
            try:
                answer = httpx.get(f"{self.url}/v2/version", timeout=10, trust_env=False)
                answer.raise_for_status()
                return
            except httpx.HTTPError:
                time.sleep(0.05)
        raise TimeoutError(f"the service did not start: {self._service.log_tail}")

    def stop_service(self) -> None:
        """Kill the service: what it promised it must have written down."""
        if self._service is not None:
            self._service.kill()
            self._service = None

    @contextmanager
    def limited(self, limits: PublishedLimits) -> Iterator[None]:
        """Restart the service so that it allows something else, and again afterwards."""
        usual = self._settings
        self._restart_service(usual.model_copy(update={"limits": limits}))
        try:
            yield
        finally:
            self._restart_service(usual)

    def expire_tokens(self) -> None:
        """Let the time of every access token be over; the service is away for a moment."""
        self.stop_service()
        AuthDirectory(path=self._settings.directory).expire_tokens()
        self.start_service()

    def _restart_service(self, settings: ServiceSettings) -> None:
        self.stop_service()
        self._settings = settings
        self.start_service()

    def restart_broker(self) -> None:
        """Stop RabbitMQ and start it again; it is away for some ten seconds."""
        self._rabbit.stop()
        self._rabbit.start()

    def close(self) -> None:
        """End the service, and what waits for results in this process."""
        # The SDK's threads would go on looking for a broker that is gone.
        if (executor := sys.modules.get("globus_compute_sdk.sdk.executor")) is not None:
            for watcher in [*executor._RESULT_WATCHERS.values()]:
                watcher.shutdown(wait=True, cancel_futures=True)
        self.stop_service()

    def requests(self) -> list[RequestLog]:
        """Return the requests that the service has answered."""
        return self._store.requests()

    def violations(self) -> list[str]:
        """Return every time a client exceeded a published limit; each begins with its name."""
        return self._store.violations()

    def task(self, task_id: str) -> Task | None:
        """Return what the service knows of a task."""
        return self._store.task(task_id)

    def report(self, endpoint_id: UUID | str) -> Json | None:
        """Return what an endpoint said in its last heartbeat."""
        report = self._store.get(Report, str(endpoint_id))
        return report.state if report is not None else None

    @property
    def log(self) -> str:
        """What the service logged."""
        return (self._home / "service.log").read_text(errors="replace")


@contextmanager
def running_globus(
    directory: Path,
    *,
    limits: PublishedLimits | None = None,
    prepare: Callable[[AuthDirectory], None] | None = None,
) -> Iterator[Globus]:
    """Yield a Globus Compute of one's own, on random ports of loopback, and end it.

    Args:
        directory: What it writes.
        limits: What the service allows; the published figures by default.
        prepare: Adds more accounts, clients, scopes and groups before the service starts.
    """
    home = directory / "globus"
    home.mkdir(parents=True, mode=0o700)
    accounts = AuthDirectory(path=home / "accounts.json")
    users, group = add_users(accounts)
    if prepare is not None:
        prepare(accounts)
    store = Store(home / "service.sqlite")
    with reserved_port() as port, running_rabbit(home / "rabbit") as rabbit:
        settings = ServiceSettings(
            port=port,
            database=home / "service.sqlite",
            directory=home / "accounts.json",
            broker=rabbit.address,
            limits=limits or PublishedLimits(),
        )
        globus = Globus(
            users=users,
            group_id=group.id,
            _settings=settings,
            _rabbit=rabbit,
            _home=home,
            _store=store,
        )
        store.open()
        try:
            globus.start_service()
            yield globus
        finally:
            globus.close()
            store.close()
