"""The hub's database: what a site still lacks there before it can serve anybody."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from fabric.cli.admin.database import Books, get_books
from fabric.cli.doctor.check import Finding
from fabric.config import SiteSpec
from fabric.errors import RateMissing, UnknownModel, UnknownSite
from fabric.sql import Database, is_current

Lack = tuple[str, str]
"""What is not there, and the command that adds it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BooksCheck:
    """Do the balances add up, and is a site known with all that requests need?

    Args:
        database_url: The hub's database.
        site: The site; ``None`` for the balances alone.
    """

    database_url: str
    site: SiteSpec | None = None
    name: str = "database"

    def run(self) -> Iterator[Finding]:
        """Read what is there."""
        with Database(self.database_url) as database:
            if not is_current(database):
                yield Finding(
                    check=self.name,
                    level="warning",
                    detail="it has another release's schema, and was not read",
                    remedy="fabric-admin db migrate",
                )
                return
            books = get_books(database)
            books.ledger.verify()
            yield Finding(check=self.name, level="ok", detail="the ledger adds up")
            lacks = [] if self.site is None else [*get_lacks(books, self.site)]
        for detail, remedy in lacks:
            yield Finding(check=self.name, level="wrong", detail=detail, remedy=remedy)
        if self.site is not None and not lacks:
            detail = f"{self.site.name} has all that requests need"
            yield Finding(check=self.name, level="ok", detail=detail)


def get_lacks(books: Books, site: SiteSpec) -> Iterator[Lack]:
    """Return what a site lacks before anybody can be served there."""
    now = datetime.now(UTC)
    agents = books.keys.keys()
    try:
        record = books.catalog.get_site(site.name)
    except UnknownSite:
        yield f"the hub does not know {site.name}", "fabric-admin site add --file FILE"
        return
    if record.state == "disabled":
        enable = f"fabric-admin site modify {site.name} --state enabled"
        yield f"{site.name} is disabled and gets no requests", enable
    for model in site.models:
        ref = f"{model.name}@{model.revision}"
        try:
            books.catalog.resolve(ref)
        except UnknownModel:
            yield (
                f"there is no model {ref}",
                f"fabric-admin model add {model.name} --revision {model.revision}"
                f" --source '{model.source}' --context-tokens {model.context_tokens}",
            )
        try:
            books.ledger.rate(ref, site.name)
        except RateMissing:
            yield (
                f"nothing says what {ref} costs at {site.name}",
                f"fabric-admin rate add {model.name} {site.name} --prompt 10 --output 40",
            )
    if not any(
        one.is_open(now) and one.available_usu > 0 and one.site in (site.name, "*")
        for one in books.ledger.allocations()
    ):
        add = f"fabric-admin alloc add PROJECT --site {site.name} --su 100"
        yield f"no project has anything to spend at {site.name}", add
    if not any(
        key.site == site.name
        and key.revoked_at is None
        and (key.expires_at is None or key.expires_at > now)
        for key in agents
    ):
        add = f"fabric-admin key add PROJECT --scope site --site {site.name} > FILE"
        yield f"no key lets an agent serve {site.name}", add
