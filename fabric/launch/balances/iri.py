"""The DOE's Integrated Research Infrastructure: a facility's API instead of a command."""

from __future__ import annotations

from dataclasses import dataclass, field
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from fabric.errors import BalanceUnavailable, PackageMissing
from fabric.launch.balances.command import check_project, no_allocation
from fabric.launch.balances.protocol import Balance

if TYPE_CHECKING:
    import httpx

TIMEOUT_S = 30.0
_UNITS = {
    "urn:doe-iri:allocation:compute:node-hours": "node-hours",
    "node-hours": "node-hours",
    "node_hours": "node-hours",
}
"""Compute allocations by their names in both versions of the API; the others are of storage."""


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class _Project(_Answer):
    id: str
    name: str


class _Entry(_Answer):
    allocation: Decimal
    usage: Decimal
    unit: str


class _Allocation(_Answer):
    id: str
    capability_uri: str = ""
    entries: tuple[_Entry, ...]

    @property
    def capability(self) -> str:
        """The last part of the capability's address."""
        return self.capability_uri.rstrip("/").rpartition("/")[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class FacilityBalance:
    """A project's compute allocation by a facility's API.

    Args:
        url: Where the API is, its version included.
        token: The bearer token of a member of the project.
        capability: Which allocation, where a project has several; ids are the facility's own.
        timeout_s: How long one answer may take.

    Source: app/routers/account of https://github.com/doe-iri/iri-facility-api-python.
    """

    url: str
    token: str = field(repr=False)
    capability: str | None = None
    timeout_s: float = TIMEOUT_S

    async def balance(self, project: str) -> Balance:
        """Return a project's balance; the project may be named by its id, too."""
        check_project(project)
        try:
            import httpx
        except ModuleNotFoundError as error:
            raise PackageMissing(package="httpx", extra="sdk") from error
        headers = {"Authorization": f"Bearer {self.token}"}
        try:
            async with httpx.AsyncClient(headers=headers, timeout=self.timeout_s) as client:
                projects = await self._get(client, "/account/projects", list[_Project])
                for each in projects:
                    if project in (each.id, each.name):
                        path = f"/account/projects/{quote(each.id, safe='')}/project_allocations"
                        found = await self._get(client, path, list[_Allocation])
                        return self._choose(project, found)
        except httpx.HTTPError as error:
            raise BalanceUnavailable(
                command=f"GET {self.url}",
                reason=f"the facility cannot be reached ({type(error).__name__})",
                remedy="see that this machine reaches it, and ask again later",
            ) from error
        raise no_allocation(f"GET {self.url}/account/projects", project)

    async def _get(self, client: httpx.AsyncClient, path: str, kind: Any) -> Any:
        url = self.url.rstrip("/") + path
        answer = await client.get(url)
        if answer.status_code != 200:
            remedy = "get a new token of the facility" if answer.status_code in (401, 403) else ""
            raise BalanceUnavailable(
                command=f"GET {url}",
                reason=f"the facility answered with {answer.status_code}",
                remedy=remedy or "ask again later",
            )
        try:
            return TypeAdapter(kind).validate_json(answer.content)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise BalanceUnavailable(
                command=f"GET {url}",
                reason=f"its answer is not of the known form ({where}: {first['msg']})",
                remedy="see that url names the API with its version",
            ) from error

    def _choose(self, project: str, found: list[_Allocation]) -> Balance:
        compute = [
            (allocation.capability, entry)
            for allocation in found
            for entry in allocation.entries
            if entry.unit in _UNITS and self.capability in (None, allocation.capability)
        ]
        if not compute:
            raise no_allocation(f"GET {self.url}/account/projects", project)
        if len(compute) > 1:
            raise BalanceUnavailable(
                command=f"GET {self.url}/account/projects",
                reason=f"{project!r} has {len(compute)} compute allocations",
                remedy="name one as the balance's resource in the site's file:"
                f" {', '.join(capability for capability, _ in compute)}",
            )
        ((_, entry),) = compute
        return Balance(
            unit=_UNITS[entry.unit],
            granted=entry.allocation,
            used=entry.usage,
            available=entry.allocation - entry.usage,
        )
