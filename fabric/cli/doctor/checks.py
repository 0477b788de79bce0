"""Which checks there are for a site, and for a hub without one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from fabric.cli.doctor.books import BooksCheck
from fabric.cli.doctor.check import Check
from fabric.cli.doctor.cluster import BalanceCheck, SchedulerCheck
from fabric.cli.doctor.globus import EndpointCheck, ServiceCheck
from fabric.cli.doctor.here import DiskCheck, PackagesCheck
from fabric.cli.doctor.network import ClockCheck, HubCheck, TokenCheck
from fabric.cli.doctor.site import ConfigurationCheck
from fabric.cli.doctor.weights import WeightsCheck
from fabric.config import ComputeExecutor, Settings, SiteSpec, StateDir, inspect_site


def get_checks(
    settings: Settings,
    path: Path | None,
    *,
    token: str | None = None,
    project: str | None = None,
    balance_token: str | None = None,
    in_full: bool = False,
) -> Iterator[Check]:
    """Return what is to be looked at, the cheapest and most telling first.

    Args:
        settings: Where the hub and its database are.
        path: A site's file; ``None`` for the hub alone.
        token: The site's key.
        project: What jobs at the site are charged to; what its file says if ``None``.
        balance_token: Of the facility's API.
        in_full: Read weights in full.
    """
    url = settings.client.base_url
    site = None if path is None else inspect_site(path)[0]
    if path is not None:
        yield ConfigurationCheck(path=path)
    yield PackagesCheck(extra="hub" if path is None else "site")
    yield DiskCheck(path=settings.state_dir)
    yield HubCheck(url=url)
    yield ClockCheck(url=url)
    if is_hub_here(settings):
        yield BooksCheck(database_url=settings.get_database_url(), site=site)
    if site is not None:
        yield from _get_site_checks(site, settings, project, balance_token, in_full=in_full)
        if token is not None:
            yield TokenCheck(url=url, token=token, site=site.name)


def is_hub_here(settings: Settings) -> bool:
    """Return whether the hub's database is within reach of this machine."""
    here = StateDir(settings.state_dir).path / "fabric.db"
    return settings.hub.database_url is not None or here.exists()


def _get_site_checks(
    site: SiteSpec,
    settings: Settings,
    project: str | None,
    balance_token: str | None,
    *,
    in_full: bool,
) -> Iterator[Check]:
    if isinstance(site.executor, ComputeExecutor):
        from fabric.compute.client import get_service_url

        yield ServiceCheck(url=get_service_url())
        yield EndpointCheck(executor=site.executor)
    endpoint = site.endpoint
    if endpoint is not None:
        yield SchedulerCheck(endpoint=endpoint)
        yield BalanceCheck(site=site, project=project or endpoint.account, token=balance_token)
    digests = _get_digests(settings) if in_full else {}
    for model in site.models:
        digest = digests.get(f"{model.name}@{model.revision}")
        yield WeightsCheck(model=model, digest=digest, in_full=in_full)


def _get_digests(settings: Settings) -> dict[str, str | None]:
    """Return the digests that the hub knows versions by, where it can be asked."""
    from fabric.cli.admin.database import get_books
    from fabric.errors import FabricError
    from fabric.sdk import Fabric
    from fabric.sql import Database

    with suppress(FabricError):
        if is_hub_here(settings):
            with Database(settings.get_database_url()) as database:
                return {one.ref: one.digest for one in get_books(database).catalog.models()}
        with Fabric(settings.client.base_url, settings.client.api_key) as fabric:
            return {f"{one.name}@{one.revision}": one.digest for one in fabric.models()}
    return {}
