"""What is granted and how much of it, as one snapshot that is never more than a second old."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal

from sqlalchemy import Connection, RowMapping, select, update

from fabric.auth.decide import ANY, Grant, Permits
from fabric.auth.identity import Identity
from fabric.auth.tables import (
    access_version,
    grants,
    limits,
    private_objects,
    project_sites,
    tiers,
)
from fabric.sql import Database, Offload

FRESH_S = 0.4
"""How long a snapshot serves without a question to the database."""
MAX_AGE_S = 0.9
"""How old it may be while a newer one is on its way; then callers wait for that."""

_VERSION = select(access_version.c.version)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """How much one subject may do; ``None`` leaves it open.

    Attributes:
        subject: ``project:``, ``key:`` or ``user:`` and a name or id, or ``*`` for each of the kind
            that has no limit of its own.
        requests_per_min: Requests in any 60 s.
        tokens_per_min: Tokens of prompts and answers in any 60 s.
        max_concurrent: Requests in flight at once.
    """

    subject: str
    requests_per_min: int | None = None
    tokens_per_min: int | None = None
    max_concurrent: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TierTerms:
    """What was changed of one tier; ``None`` is as the release has it.

    Attributes:
        tier: Its name.
        charge_factor: What it multiplies a charge by.
        weight: Its part of a project's share.
        first_token_s: Within how many seconds the first token is promised.
        token_s: And every further one, on average over a request.
        share_in_time: The part of the requests for which these two hold.
        share_answered: The part that is answered at all.
    """

    tier: str
    charge_factor: Decimal | None = None
    weight: float | None = None
    first_token_s: float | None = None
    token_s: float | None = None
    share_in_time: float | None = None
    share_answered: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """All grants, limits, changes of tiers and homes of projects as they were at one version."""

    version: int = -1
    models: frozenset[str] = frozenset()
    sites: frozenset[str] = frozenset()
    grants: Mapping[str, Sequence[Grant]] = field(default_factory=dict)
    """By subject."""
    limits: Mapping[str, Limit] = field(default_factory=dict)
    """By subject."""
    tiers: Mapping[str, TierTerms] = field(default_factory=dict)
    """By name."""
    homes: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """By project."""

    def permits(self, caller: Identity) -> Permits:
        """Return what a caller may do."""
        mine = (grant for subject in caller.subjects for grant in self.grants.get(subject, ()))
        return Permits(
            project=caller.project,
            key_id=caller.key_id,
            models=self.models,
            sites=self.sites,
            grants=tuple(mine),
            homes=self.homes.get(caller.project),
        )

    def limits_of(self, caller: Identity) -> Iterator[tuple[str, Limit]]:
        """Yield the limits that hold for a caller, each with the name of who shares it."""
        _, project, *who = caller.subjects
        kind = who[0].partition(":")[0]
        for shared_by, subjects in (
            (who[0], (*who, f"{kind}:{ANY}")),
            (project, (project, f"project:{ANY}")),
        ):
            found = (self.limits[subject] for subject in subjects if subject in self.limits)
            if (limit := next(found, None)) is not None:
                yield shared_by, limit

    def serves(self, model: str, site: str) -> bool:
        """Return whether a site may run a model: a private one only where somebody may use it."""
        return model not in self.models or any(
            grant.opens_model(model, site) for some in self.grants.values() for grant in some
        )


class Rulebook:
    """Keeps the rules of one hub at hand, for callers on its event loop.

    What an administrator changes is heard of by a number that every change raises: it is asked for
    at most every ``FRESH_S``, and only if it has changed the rest is read again.

    Args:
        offload: The database's thread.
        monotonic: Seconds that only grow.
    """

    def __init__(self, offload: Offload, *, monotonic: Callable[[], float] = time.monotonic):
        self._offload = offload
        self._monotonic = monotonic
        self._reading: asyncio.Task[Rules] | None = None
        self._read_at_s = float("-inf")
        self.known = Rules()
        """What was read last; for those who have just waited for ``current``."""

    async def current(self) -> Rules:
        """Return rules that were true less than ``MAX_AGE_S`` ago.

        Raises:
            StorageBusy: The database cannot be asked.
        """
        age_s = self._monotonic() - self._read_at_s
        if age_s < FRESH_S:
            return self.known
        reading = self._reading
        if reading is None or reading.done():
            reading = self._reading = asyncio.create_task(self._read())
            # Nobody may be left to hear that it failed; whoever comes next asks again.
            reading.add_done_callback(lambda done: done.cancelled() or done.exception())
        if age_s < MAX_AGE_S:
            return self.known
        return await asyncio.shield(reading)

    async def permits(self, caller: Identity) -> Permits:
        """Return what a caller may do now. Raises as ``current`` does."""
        return (await self.current()).permits(caller)

    def forget(self) -> None:
        """Ask the database at the next question, because this process has just changed it."""
        self._read_at_s = float("-inf")

    async def _read(self) -> Rules:
        # It counts from before the question: what came between may not be in the answer.
        began_at_s = self._monotonic()
        self.known = await self._offload.urgent(_read, self._offload.database, self.known)
        self._read_at_s = began_at_s
        return self.known


def raise_version(connection: Connection) -> None:
    """Let all hubs of a database hear that what callers may do has changed."""
    connection.execute(update(access_version).values(version=access_version.c.version + 1))


def _read(database: Database, known: Rules) -> Rules:
    with database.read() as connection:
        version: int = connection.execute(_VERSION).scalar_one()
        if version == known.version:
            return known
        private = {(row.kind, row.name) for row in connection.execute(select(private_objects))}
        by_subject: dict[str, list[Grant]] = {}
        for row in connection.execute(select(grants).order_by(grants.c.id)):
            grant = to_grant(row._mapping)
            by_subject.setdefault(grant.subject, []).append(grant)
        homes: dict[str, set[str]] = {}
        for row in connection.execute(select(project_sites)):
            homes.setdefault(row.project, set()).add(row.site)
        return Rules(
            version=version,
            models=frozenset(name for kind, name in private if kind == "model"),
            sites=frozenset(name for kind, name in private if kind == "site"),
            grants=by_subject,
            limits={row.subject: Limit(**row._mapping) for row in connection.execute(_LIMITS)},
            tiers=read_tiers(connection),
            homes={project: frozenset(sites) for project, sites in homes.items()},
        )


def read_tiers(connection: Connection) -> dict[str, TierTerms]:
    """Return what was changed of tiers, by name."""
    found = {}
    for row in connection.execute(select(tiers).order_by(tiers.c.tier)):
        terms = dict(row._mapping)
        if (millionths := terms.pop("charge_factor_millionths")) is not None:
            terms["charge_factor"] = Decimal(millionths) / 1_000_000
        found[row.tier] = TierTerms(**terms)
    return found


_LIMITS = select(*(limits.c[name] for name in Limit.__dataclass_fields__))


def to_grant(row: RowMapping) -> Grant:
    """Return a row of the table as a grant."""
    return Grant(
        id=str(row["id"]),
        subject=str(row["subject"]),
        model=str(row["model"]) or None,
        site=str(row["site"]) or None,
        modes=frozenset(str(row["modes"]).split()),
        tiers=frozenset(str(row["tiers"]).split()),
    )
