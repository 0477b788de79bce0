"""What a federation on one machine needs in its database before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from fabric.auth import PROGRAM_SCOPES, Keys
from fabric.catalog import Catalog
from fabric.config import SiteSpec
from fabric.errors import Duplicate, RateMissing, UnknownModel
from fabric.ledger import Ledger
from fabric.sql import Database, migrate


@dataclass(frozen=True, slots=True, kw_only=True)
class Seeded:
    """The secrets that were made: the user's key, and each site's token."""

    api_key: str
    site_tokens: dict[str, str]


def seed(
    database_url: str, sites: Sequence[SiteSpec], *, project: str, label: str, grant_usu: int
) -> Seeded:
    """Add what is missing, and make new secrets in place of those made by an earlier call.

    Args:
        database_url: The hub's database; created if it is not there.
        sites: What runs where, and for how much.
        project: Whom the user's key belongs to.
        label: Marks the keys made here; the next call revokes them.
        grant_usu: What a new allocation starts with, in micro-SU.

    Raises:
        SettingInvalid: The database cannot be opened.
        DigestMismatch: A model is in the catalog with other weights under the same revision.
    """
    with Database(database_url) as database:
        migrate(database)
        with database.transaction():
            _add_sites(Catalog(database), Ledger(database), sites, project, grant_usu)
            return _make_keys(Keys(database), sites, project, label)


def _add_sites(
    catalog: Catalog, ledger: Ledger, sites: Sequence[SiteSpec], project: str, grant_usu: int
) -> None:
    for site in sites:
        with suppress(Duplicate):
            catalog.add_site(site.name, display=site.title)
        with suppress(Duplicate):
            ledger.grant(ledger.open_allocation(project, site.name), grant_usu, memo="initial")
        for model in site.models:
            ref = f"{model.name}@{model.revision}"
            try:
                catalog.resolve(ref)
            except UnknownModel:
                catalog.add_model(
                    model.name,
                    model.revision,
                    context_tokens=model.context_tokens,
                    source=model.source,
                    dtype=model.options.dtype,
                )
            try:
                ledger.rate(ref, site.name)
            except RateMissing:
                ledger.set_rate(ref, site.name, **site.prices.model_dump())


def _make_keys(keys: Keys, sites: Sequence[SiteSpec], project: str, label: str) -> Seeded:
    with suppress(Duplicate):
        keys.add_project(project, title="This machine")
    for key in keys.keys(project):
        if key.label == label and key.revoked_at is None:
            keys.revoke(key.id)
    # It is the user's own machine: nothing of its models is anybody else's.
    scopes = {"query", "launch"} | PROGRAM_SCOPES
    _, api_key = keys.add_key(project, label=label, scopes=scopes)
    tokens = {
        site.name: keys.add_key(project, label=label, scopes=("site",), site=site.name)[1]
        for site in sites
    }
    return Seeded(api_key=api_key, site_tokens=tokens)
