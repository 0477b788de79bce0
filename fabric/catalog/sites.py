"""Records of sites."""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import Connection, bindparam, delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from fabric.catalog.records import SiteRecord
from fabric.catalog.tables import sites
from fabric.errors import Duplicate, UnknownSite

_SITE = select(sites).where(sites.c.name == bindparam("site"))


def add(connection: Connection, site: SiteRecord) -> None:
    """Store a new site. See ``Catalog.add_site``."""
    row = {column.name: getattr(site, column.name) for column in sites.c}
    try:
        connection.execute(insert(sites), row)
    except IntegrityError as error:
        raise Duplicate(kind="site", name=site.name) from error


def get(connection: Connection, name: str) -> SiteRecord:
    """Return a site. See ``Catalog.get_site``."""
    row = connection.execute(_SITE, {"site": name}).first()
    if row is None:
        raise UnknownSite(site=name, known=[site.name for site in listed(connection)])
    return SiteRecord(**row._mapping)


def listed(connection: Connection) -> list[SiteRecord]:
    """Return all sites, in order of name."""
    rows = connection.execute(select(sites).order_by(sites.c.name))
    return [SiteRecord(**row._mapping) for row in rows]


def modify(connection: Connection, name: str, changes: Mapping[str, object]) -> SiteRecord:
    """Change a site's fields. See ``Catalog.modify_site``."""
    if changes:
        connection.execute(update(sites).where(sites.c.name == name).values(**changes))
    return get(connection, name)


def remove(connection: Connection, name: str) -> None:
    """Forget a site. See ``Catalog.delete_site``."""
    if not connection.execute(delete(sites).where(sites.c.name == name)).rowcount:
        get(connection, name)
