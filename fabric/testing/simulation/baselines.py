"""Other ways to choose, in place of the broker's own: what it is compared with.

They know which replicas may serve, send a retry elsewhere, and start none that sleeps while one is
awake: all that a hub does without thinking.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from fabric.broker.cost import barred_site
from fabric.broker.facts import Context
from fabric.broker.pool import Pool, Replicas, Rows, as_pool
from fabric.broker.rank import Ranking
from fabric.broker.select import Decision, decide
from fabric.broker.state import Decide
from fabric.errors import NoReplica
from fabric.messages import Placement, Request
from fabric.testing.simulation.world import World


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What a baseline picks from: the rows that may serve, awake ones and all."""

    request: Request
    pool: Pool
    context: Context
    awake: Rows
    usable: Rows

    def at(self, rows: Rows, site: str) -> Rows:
        """Return those of the rows that are at a site."""
        group = self.pool.groups[self.context.digest].get(site, -1)
        here: Rows = rows[self.pool.group_N[rows] == group]
        return here

    def idlest(self, rows: Rows) -> int:
        """Return the row with the smallest share of its own rows in use."""
        busy = self.pool.column("num_in_flight")[rows] / self.pool.column("max_rows")[rows]
        row: int = rows[busy.argmin()].item()
        return row


class _Untold(Decision):
    """A choice without a table: its reasons are not ours."""

    __slots__ = ()

    def placement(self, *, whole: bool = False) -> Placement:  # noqa: ARG002
        return self.bare()


def of_pick(pick: Callable[[Choice], int]) -> Decide:
    """Return the way to choose that picks so."""

    def choose(request: Request, replicas: Replicas, context: Context) -> Decision:
        pool = as_pool(replicas)
        usable = _usable(request, pool, context)
        if not len(usable):
            raise NoReplica(model=context.model, reasons={})
        awake = usable[pool.column("cold_s")[usable] == 0.0]
        choice = Choice(
            request=request,
            pool=pool,
            context=context,
            awake=awake if len(awake) else usable,
            usable=usable,
        )
        return _Untold(request, pool, context, pick(choice), Ranking(request, pool, context))

    return choose


def ours(_: World) -> Decide:
    """The broker's own choice; nobody reads the tables of a simulation."""

    def choose(request: Request, replicas: Replicas, context: Context) -> Decision:
        made = decide(request, replicas, context)
        return _Untold(request, made.pool, context, made.row, made.ranking, made.is_trial)

    return choose


def random_choice(_: World) -> Decide:
    """Any replica."""
    drawn = random.Random(0)  # noqa: S311
    return of_pick(lambda choice: int(drawn.choice(choice.awake)))


def round_robin(_: World) -> Decide:
    """One after the other."""
    turn = 0

    def pick(choice: Choice) -> int:
        nonlocal turn
        turn += 1
        return int(choice.awake[turn % len(choice.awake)])

    return of_pick(pick)


def least_load(_: World) -> Decide:
    """The replica with the smallest share of its rows in use."""
    return of_pick(lambda choice: choice.idlest(choice.awake))


def first_running(world: World) -> Decide:
    """The first site in the order of registration where it runs and a row is free, then the first
    that would have to start it, then any.

    Kinder than the rule it stands for, which asks whether the model runs there and not how busy
    it is. Source: FIRST's federated routing (first running, then queued, then any).
    """
    order = [site.name for site in world.sites]

    def pick(choice: Choice) -> int:
        for rows in (choice.awake, choice.usable):
            free = rows[choice.pool.column("share")[rows] < 1.0]
            for site in order:
                here = choice.at(free, site)
                if len(here):
                    return choice.idlest(here)
        return choice.idlest(choice.awake)

    return of_pick(pick)


def nearest(world: World) -> Decide:
    """The site of the request's data, or the best linked to it; there the least busy replica."""

    def pick(choice: Choice) -> int:
        home = choice.request.data_site
        if home is None:
            return choice.idlest(choice.awake)
        names = sorted(
            (site.name for site in world.sites),
            key=lambda name: (name != home, -world.bandwidth(home, name)),
        )
        nearest_rows = (choice.at(choice.awake, name) for name in names)
        return choice.idlest(next(rows for rows in nearest_rows if len(rows)))

    return of_pick(pick)


BASELINES: Mapping[str, Callable[[World], Decide]] = {
    "fabric": ours,
    "random": random_choice,
    "round-robin": round_robin,
    "least-load": least_load,
    "first-running": first_running,
    "nearest": nearest,
}


def _usable(request: Request, pool: Pool, context: Context) -> Rows:
    allowed = np.zeros(pool.num_groups, bool)
    for site, group in pool.groups.get(context.digest, {}).items():
        allowed[group] = barred_site(request, site, context) is None
    rows: Rows = np.flatnonzero(allowed[pool.group_N] & (pool.column("blocked_s") == 0.0))
    tried = [row for name in context.tried if (row := pool.row(name)) is not None]
    fresh: Rows = rows[~np.isin(rows, tried)] if tried else rows
    return fresh if len(fresh) else rows
