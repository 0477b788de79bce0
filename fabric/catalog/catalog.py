"""The catalog: every method is one transaction, or part of the caller's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Literal

from fabric.catalog import functions, launches, models, names, redemptions, rules, runs, sites
from fabric.catalog.records import (
    FunctionRecord,
    LaunchRecord,
    Maintenance,
    ModelVersion,
    RedemptionRecord,
    RunRecord,
    SiteRecord,
    SiteRules,
    SiteState,
    UsageSum,
    UserSum,
    Visibility,
)
from fabric.catalog.view import CatalogView, Viewer
from fabric.messages import InstanceState
from fabric.sql import Database, utc_now

LAUNCH_LIFETIME_S = 7 * 86_400.0  # of a launch's token, sessions that reconnect included


class Catalog:
    """Sites, model versions, launches and runs over one database.

    In every ``modify_*``, ``None`` leaves a field as it is.

    Args:
        database: An open, migrated database.
        clock: The wall clock.
    """

    def __init__(self, database: Database, *, clock: Callable[[], datetime] = utc_now) -> None:
        self._database = database
        self._clock = clock

    def seen_by(self, viewer: Viewer) -> CatalogView:
        """Return the catalog as a caller sees it."""
        return CatalogView(self, viewer)

    # Sites

    def add_site(
        self,
        name: str,
        *,
        display: str = "",
        channel: Literal["session", "parsl"] = "session",
        state: SiteState = "enabled",
        facts: Mapping[str, object] | None = None,
    ) -> SiteRecord:
        """Store a new site; ``facts`` is what its file says of it.

        Raises:
            Duplicate: There is a site of this name.
            RequestInvalid: It is not a name.
        """
        names.check_site(name)
        site = SiteRecord(
            name=name,
            display=display or name,
            channel=channel,
            state=state,
            facts=facts or {},
            created_at=self._clock(),
        )
        with self._database.transaction() as connection:
            sites.add(connection, site)
        return site

    def get_site(self, name: str) -> SiteRecord:
        """Return a site.

        Raises:
            UnknownSite: There is none of this name.
        """
        with self._database.read() as connection:
            return sites.get(connection, name)

    def sites(self) -> list[SiteRecord]:
        """Return all sites, in order of name."""
        with self._database.read() as connection:
            return sites.listed(connection)

    def modify_site(
        self,
        name: str,
        *,
        display: str | None = None,
        channel: Literal["session", "parsl"] | None = None,
        state: SiteState | None = None,
        facts: Mapping[str, object] | None = None,
    ) -> SiteRecord:
        """Change a site's fields; its ``rules`` stay among its facts.

        Raises:
            UnknownSite: There is none of this name.
        """
        with self._database.transaction() as connection:
            kept = sites.get(connection, name).facts.get("rules")
            if facts is not None and kept is not None:
                facts = {**facts, "rules": kept}
            changes = _given(display=display, channel=channel, state=state, facts=facts)
            return sites.modify(connection, name, changes)

    def delete_site(self, name: str) -> None:
        """Forget a site and its launches, whose tokens are void at once. Its runs stay on record.

        Raises:
            UnknownSite: There is none of this name.
        """
        with self._database.transaction() as connection:
            sites.remove(connection, name)

    def add_maintenance(
        self, site: str, *, starts_at: datetime, ends_at: datetime, reason: str = ""
    ) -> Maintenance:
        """Plan a time in which a site takes no requests, nor before it those that would not be
        done by then.

        Raises:
            UnknownSite: There is none of this name.
            RequestInvalid: The times are in the wrong order, over, without a zone, or overlap
                another maintenance.
        """
        with self._database.transaction() as connection:
            now = self._clock()
            return rules.add_maintenance(connection, site, starts_at, ends_at, reason, now)

    def modify_maintenance(
        self,
        site: str,
        name: str,
        *,
        starts_at: datetime | None = None,
        ends_at: datetime | None = None,
        reason: str | None = None,
    ) -> Maintenance:
        """Change a maintenance, also one that is going on.

        Raises:
            UnknownSite: There is no such site.
            NotFound: It has no maintenance of this id.
            RequestInvalid: See ``add_maintenance``.
        """
        with self._database.transaction() as connection:
            changes = (starts_at, ends_at, reason)
            return rules.modify_maintenance(connection, site, name, *changes, self._clock())

    def delete_maintenance(self, site: str, name: str) -> Maintenance:
        """Forget a maintenance and return it; one that is going on is over.

        Raises:
            UnknownSite: There is no such site.
            NotFound: It has no maintenance of this id.
        """
        with self._database.transaction() as connection:
            return rules.delete_maintenance(connection, site, name)

    def set_max_in_flight(self, site: str, number: int | None) -> SiteRules:
        """Set how many requests of a hub a site takes at once; ``None`` lifts the limit.

        Raises:
            UnknownSite: There is none of this name.
            RequestInvalid: The number is not positive, or over a million.
        """
        with self._database.transaction() as connection:
            return rules.set_max_in_flight(connection, site, number)

    # Models

    def add_model(
        self,
        name: str,
        revision: str,
        *,
        context_tokens: int,
        source: str,
        dtype: str | None = None,
        digest: str | None = None,
    ) -> ModelVersion:
        """Store a new version, which is from now on what ``name`` alone resolves to.

        Args:
            name: The model's name.
            revision: The version's.
            context_tokens: The most tokens of prompt and output together.
            source: Where the weights are.
            dtype: What they are computed in; ``None`` leaves it to the sites.
            digest: Of the tensors; by default the first instance to report one fixes it.

        Raises:
            Duplicate: The model has this revision.
            RequestInvalid: A name is not one, or the context is not positive or over 2^31.
        """
        names.check_version(name, revision, digest)
        names.check_context(context_tokens)
        model = ModelVersion(
            name=name,
            revision=revision,
            digest=digest,
            context_tokens=context_tokens,
            dtype=dtype,
            source=source,
            created_at=self._clock(),
        )
        with self._database.transaction() as connection:
            models.add(connection, model)
        return model

    def resolve(self, ref: str) -> ModelVersion:
        """Return the version that ``name``, ``name@revision`` or ``name@digest`` names.

        A name alone names its newest version.

        Raises:
            UnknownModel: There is none; the error lists those there are.
        """
        with self._database.read() as connection:
            return models.resolve(connection, ref)

    def models(self) -> list[ModelVersion]:
        """Return all versions: by name, the newest of each first."""
        with self._database.read() as connection:
            return models.listed(connection)

    def modify_model(
        self,
        ref: str,
        *,
        context_tokens: int | None = None,
        source: str | None = None,
        dtype: str | None = None,
    ) -> ModelVersion:
        """Change a version's fields; its digest stays what it is.

        Raises:
            UnknownModel: There is no such version.
            RequestInvalid: The context is not positive, or over 2^31.
        """
        names.check_context(context_tokens)
        changes = _given(context_tokens=context_tokens, source=source, dtype=dtype)
        with self._database.transaction() as connection:
            return models.modify(connection, ref, changes)

    def delete_model(self, ref: str) -> ModelVersion:
        """Forget one version and return it. Its runs stay on record.

        Raises:
            UnknownModel: There is no such version.
            RequestInvalid: A name alone was given, and it has several versions.
        """
        with self._database.transaction() as connection:
            return models.remove(connection, ref)

    def register_digest(self, ref: str, digest: str) -> ModelVersion:
        """Fix a version's digest by the first report of it; check it at every later one.

        Raises:
            UnknownModel: There is no such version.
            DigestMismatch: The version has another digest.
        """
        with self._database.transaction() as connection:
            return models.register_digest(connection, ref, digest)

    # Launches

    def add_launch(
        self, site: str, model: str, *, lifetime_s: float = LAUNCH_LIFETIME_S
    ) -> tuple[LaunchRecord, str]:
        """Permit one instance to join; return its record and its token, shown only here.

        Args:
            site: Where it will run.
            model: What it will run, in any form ``resolve`` takes.
            lifetime_s: Seconds the token is good for.

        Raises:
            UnknownSite: There is no such site.
            UnknownModel: There is no such version.
        """
        with self._database.transaction() as connection:
            return launches.add(connection, site, model, lifetime_s, self._clock())

    def authenticate_launch(self, token: str | None) -> LaunchRecord:
        """Return the launch a token was given to.

        Raises:
            KeyInvalid: The token is unknown, or its launch has ended.
            KeyExpired: The token's time is over.
        """
        with self._database.read() as connection:
            return launches.authenticate(connection, token, self._clock())

    def launch(self, instance: str, *, site: str | None = None) -> LaunchRecord:
        """Return a launch, of any site or of one.

        Raises:
            NotFound: There is none, or it is another site's.
        """
        with self._database.read() as connection:
            return launches.get(connection, instance, site=site)

    def launches(self, *, site: str | None = None, ended: bool = False) -> list[LaunchRecord]:
        """Return launches that have not ended (or all, with ``ended``), newest first."""
        with self._database.read() as connection:
            return launches.listed(connection, site=site, ended=ended)

    def set_launch_state(self, instance: str, state: InstanceState) -> LaunchRecord:
        """Note where an instance is in its life; one that has ended stays ended.

        Raises:
            NotFound: There is no such launch.
        """
        with self._database.transaction() as connection:
            return launches.change(connection, instance, {"state": state}, site=None)

    def end_launch(
        self, instance: str, reason: str, *, failed: bool = False, site: str | None = None
    ) -> LaunchRecord:
        """Void a launch's token. The first ending and its reason stay.

        Args:
            instance: The launch.
            reason: Why it ended.
            failed: Whether by an error.
            site: If given, only this site's launches are there.

        Raises:
            NotFound: There is none, or it is another site's.
        """
        changes = {
            "state": InstanceState.FAILED if failed else InstanceState.STOPPED,
            "ended_at": self._clock(),
            "ended_reason": reason,
        }
        with self._database.transaction() as connection:
            return launches.change(connection, instance, changes, site=site)

    # Runs

    def record_runs(self, records: Sequence[RunRecord]) -> None:
        """Store runs as they are now, in place of what was stored of them before; one whose id
        belongs to another project is left alone."""
        with self._database.joined() as connection:
            runs.record(connection, records)

    def run(self, run: str, *, project: str | None = None) -> RunRecord:
        """Return a run, of any project (``None``, for administrators) or of one.

        Raises:
            NotFound: There is none, or it is another project's.
        """
        with self._database.read() as connection:
            return runs.get(connection, run, project=project)

    def runs(
        self,
        project: str | None = None,
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        limit: int = 100,
        model: str | None = None,
        site: str | None = None,
    ) -> list[RunRecord]:
        """Return at most ``limit`` runs made in a period (``until`` excluded), newest first: all,
        or those of a model (``name@revision``), or at a site."""
        with self._database.read() as connection:
            return runs.listed(
                connection, project, since=since, until=until, limit=limit, model=model, site=site
            )

    def usage(
        self,
        project: str | None = None,
        *,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> list[UsageSum]:
        """Return what the runs made in a period add up to, by model and site."""
        with self._database.read() as connection:
            return runs.usage(connection, project, since=since, until=until)

    def users(self, project: str | None = None, *, since: datetime | None = None) -> list[UserSum]:
        """Return who has asked, for any project or for one: the last to ask first."""
        with self._database.read() as connection:
            return runs.users(connection, project, since=since)

    # Raw calls

    def add_redemption(self, redemption: RedemptionRecord) -> None:
        """Store a raw call that was admitted; its run is new, because its hold is."""
        with self._database.transaction() as connection:
            redemptions.add(connection, redemption)

    def redemption(self, run: str) -> RedemptionRecord | None:
        """Return a raw call, or ``None`` if no ticket was redeemed for this run."""
        with self._database.read() as connection:
            return redemptions.find(connection, run)

    def open_redemptions(self) -> Sequence[RedemptionRecord]:
        """Return the raw calls whose books are open."""
        with self._database.read() as connection:
            return redemptions.still_open(connection)

    def committed_usu(self, ticket: str) -> int:
        """Return what the calls of a ticket were charged and hold together, in micro-SU."""
        with self._database.read() as connection:
            return redemptions.committed_usu(connection, ticket)

    def close_redemption(self, run: str, charge_usu: int) -> None:
        """Note what a raw call was charged; the first time counts."""
        with self._database.transaction() as connection:
            redemptions.close(connection, run, charge_usu)

    # Registered functions

    def add_function(
        self,
        id: str,
        name: str,
        *,
        sha256: str,
        fabric_version: str,
        visibility: Visibility = "private",
        group_id: str | None = None,
        endpoint_id: str | None = None,
    ) -> FunctionRecord:
        """Store a function that was registered with Globus Compute.

        Args:
            id: The UUID that the service gave it.
            name: The function's name.
            sha256: Of its source.
            fabric_version: The release that shipped the source.
            visibility: Who may call it.
            group_id: The Globus group, if ``visibility`` is ``group``.
            endpoint_id: The only endpoint it may run at.

        Raises:
            Duplicate: A function of this id is on record.
        """
        function = FunctionRecord(
            id=id,
            name=name,
            sha256=sha256,
            fabric_version=fabric_version,
            visibility=visibility,
            group_id=group_id,
            endpoint_id=endpoint_id,
            created_at=self._clock(),
        )
        with self._database.transaction() as connection:
            functions.add(connection, function)
        return function

    def functions(self, name: str | None = None, *, retired: bool = False) -> list[FunctionRecord]:
        """Return functions (with ``retired``, also those) by name, the newest of each first."""
        with self._database.read() as connection:
            return functions.listed(connection, name, retired=retired)

    def function(self, id: str) -> FunctionRecord:
        """Return a function, retired or not.

        Raises:
            NotFound: There is none of this id.
        """
        with self._database.read() as connection:
            return functions.get(connection, id)

    def function_for(self, name: str, *, endpoint_id: str | None = None) -> FunctionRecord:
        """Return the newest function of a name: one of this endpoint alone before one of all.

        Raises:
            NotFound: None is registered, or they are retired or other endpoints'.
        """
        with self._database.read() as connection:
            return functions.newest(connection, name, endpoint_id)

    def retire_function(self, id: str) -> FunctionRecord:
        """Note that a function is registered no more; the first time counts.

        Raises:
            NotFound: There is none of this id.
        """
        with self._database.transaction() as connection:
            return functions.retire(connection, id, self._clock())


def _given(**fields: object) -> dict[str, object]:
    return {name: value for name, value in fields.items() if value is not None}
