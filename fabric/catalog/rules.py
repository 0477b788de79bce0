"""What administrators set for the broker at a site, kept among the site's facts."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import Connection

from fabric.catalog import sites
from fabric.catalog.records import Maintenance, SiteRules
from fabric.errors import NotFound, RequestInvalid

MAX_WINDOWS = 100
"""Of one site; those that are over are forgotten when one is added."""
MAX_IN_FLIGHT = 10**6


def add_maintenance(
    connection: Connection,
    site: str,
    starts_at: datetime,
    ends_at: datetime,
    reason: str,
    now: datetime,
) -> Maintenance:
    """Plan a time without requests. See ``Catalog.add_maintenance``."""
    rules = sites.get(connection, site).rules
    planned = [one for one in rules.maintenance if one.ends_at > now]
    _check_times(starts_at, ends_at, planned, now)
    if len(planned) >= MAX_WINDOWS:
        raise _refuse("starts_at", starts_at, f"{site} has {MAX_WINDOWS} planned; delete some")
    added = Maintenance(
        id=f"mnt_{secrets.token_hex(4)}", starts_at=starts_at, ends_at=ends_at, reason=reason
    )
    _write_planned(connection, site, rules, [*planned, added])
    return added


def modify_maintenance(
    connection: Connection,
    site: str,
    name: str,
    starts_at: datetime | None,
    ends_at: datetime | None,
    reason: str | None,
    now: datetime,
) -> Maintenance:
    """Change what is planned, or goes on. See ``Catalog.modify_maintenance``."""
    rules = sites.get(connection, site).rules
    old = _find(rules, site, name)
    others = [one for one in rules.maintenance if one is not old and one.ends_at > now]
    starts_at, ends_at = starts_at or old.starts_at, ends_at or old.ends_at
    _check_times(starts_at, ends_at, others, now)
    new = Maintenance(
        id=name,
        starts_at=starts_at,
        ends_at=ends_at,
        reason=old.reason if reason is None else reason,
    )
    _write_planned(connection, site, rules, [*others, new])
    return new


def delete_maintenance(connection: Connection, site: str, name: str) -> Maintenance:
    """Forget a maintenance and return it. See ``Catalog.delete_maintenance``."""
    rules = sites.get(connection, site).rules
    found = _find(rules, site, name)
    left = tuple(one for one in rules.maintenance if one is not found)
    _write(connection, site, rules.model_copy(update={"maintenance": left}))
    return found


def set_max_in_flight(connection: Connection, site: str, number: int | None) -> SiteRules:
    """Set how many requests a site takes at once. See ``Catalog.set_max_in_flight``."""
    if number is not None and not 1 <= number <= MAX_IN_FLIGHT:
        why = f"it is not from 1 to {MAX_IN_FLIGHT}; to stop a site, disable it"
        raise RequestInvalid(param="max_in_flight", value=number, reason=why)
    rules = sites.get(connection, site).rules.model_copy(update={"max_in_flight": number})
    _write(connection, site, rules)
    return rules


def _check_times(
    starts_at: datetime, ends_at: datetime, others: Sequence[Maintenance], now: datetime
) -> None:
    for param, at in (("starts_at", starts_at), ("ends_at", ends_at)):
        if at.tzinfo is None:
            raise _refuse(param, at, "it has no time zone; give it in UTC")
    if ends_at <= starts_at:
        raise _refuse("ends_at", ends_at, f"it is not after starts_at, {starts_at.isoformat()}")
    if ends_at <= now:
        raise _refuse("ends_at", ends_at, "it is over; give a time to come")
    for one in others:
        if starts_at < one.ends_at and one.starts_at < ends_at:
            why = f"the maintenance {one.id} is planned then; delete it first"
            raise _refuse("starts_at", starts_at, why)


def _write_planned(
    connection: Connection, site: str, rules: SiteRules, planned: Sequence[Maintenance]
) -> None:
    ordered = sorted(planned, key=lambda one: one.starts_at)
    _write(connection, site, rules.model_copy(update={"maintenance": tuple(ordered)}))


def _find(rules: SiteRules, site: str, name: str) -> Maintenance:
    for one in rules.maintenance:
        if one.id == name:
            return one
    raise NotFound(kind=f"maintenance at {site}", name=name)


def _write(connection: Connection, site: str, rules: SiteRules) -> None:
    facts = {**sites.get(connection, site).facts, "rules": rules.model_dump(mode="json")}
    sites.modify(connection, site, {"facts": facts})


def _refuse(param: str, at: datetime, reason: str) -> RequestInvalid:
    return RequestInvalid(param=param, value=at.isoformat(), reason=reason)
