"""Globus Compute: the service, the queue that results come by, and the site's endpoint."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from urllib.parse import urlsplit

import httpx

from fabric.cli.doctor.check import ASK_S, Finding
from fabric.config import ComputeExecutor
from fabric.errors import CredentialsRefused, ServiceRefused, ServiceUnreachable

AMQPS_PORT = 443
"""Where the hosted service's queue is, unless it says otherwise."""

_FIREWALL = "let this machine dial {where} (no inbound port is needed)"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceCheck:
    """Does Globus Compute answer, and does it still take the SDK that is installed?

    Args:
        url: Of the service.
    """

    url: str
    name: str = "globus compute"

    def run(self) -> Iterator[Finding]:
        """Ask for its version, which needs no login."""
        from packaging.version import Version

        try:
            answer = httpx.get(f"{self.url}/v2/version", params={"service": "all"}, timeout=ASK_S)
            lowest = str(answer.raise_for_status().json()["min_sdk_version"])
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
            yield Finding(
                check=self.name,
                level="wrong",
                detail=f"{self.url} does not answer: {error or type(error).__name__}",
                remedy=_FIREWALL.format(where=self.url) + "; see https://status.globus.org too",
            )
            return
        installed = metadata.version("globus-compute-sdk")
        if Version(installed) < Version(lowest):
            yield Finding(
                check=self.name,
                level="wrong",
                detail=f"it takes SDKs from {lowest} on, and {installed} is installed",
                remedy="pip install --upgrade globus-compute-sdk globus-compute-endpoint",
            )
            return
        yield Finding(check=self.name, level="ok", detail=f"{self.url} takes SDK {installed}")


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueCheck:
    """Can this machine dial the queue that tasks and results come by?

    Args:
        host: Where the queue is.
        port: Its port.
    """

    host: str
    port: int = AMQPS_PORT
    name: str = "queue"

    def run(self) -> Iterator[Finding]:
        """Open a connection and close it."""
        where = f"{self.host}:{self.port}"
        try:
            with socket.create_connection((self.host, self.port), timeout=ASK_S):
                pass
        except OSError as error:
            yield Finding(
                check=self.name,
                level="wrong",
                detail=f"{where} cannot be dialled: {error}",
                remedy=_FIREWALL.format(where=where),
            )
            return
        yield Finding(check=self.name, level="ok", detail=f"{where} takes connections")


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointCheck:
    """Is the site's endpoint online, and does the queue answer that the service names?"""

    executor: ComputeExecutor
    name: str = "endpoint"

    def run(self) -> Iterator[Finding]:
        """Ask the service, as whoever is logged in here."""
        from fabric.compute.client import get_client, service_errors

        endpoint_id = self.executor.endpoint_id
        try:
            with service_errors():
                client = get_client()
                status = client.get_endpoint_status(endpoint_id).get("status")
                queue = urlsplit(client.get_result_amqp_url()["connection_url"])
        except CredentialsRefused as error:
            yield Finding(
                check=self.name,
                level="skipped",
                detail=f"the service was not asked: {error.detail['reason']}",
                remedy="set GLOBUS_COMPUTE_CLIENT_ID and GLOBUS_COMPUTE_CLIENT_SECRET, or log in"
                " with `globus-compute-endpoint login`",
            )
            return
        except (ServiceRefused, ServiceUnreachable) as error:
            yield Finding(
                check=self.name,
                level="wrong",
                detail=f"{endpoint_id}: {error.message}",
                remedy="see that endpoint_id in the site's file is what"
                " `fabric-admin endpoint install` tells",
            )
            return
        if status == "online":
            yield Finding(check=self.name, level="ok", detail=f"{endpoint_id} is online")
        else:
            yield Finding(
                check=self.name,
                level="wrong",
                detail=f"{endpoint_id} is {status or 'not known'}",
                remedy="start it on the site's login node: globus-compute-endpoint start NAME",
            )
        if queue.hostname:
            yield from QueueCheck(host=queue.hostname, port=queue.port or AMQPS_PORT).run()
