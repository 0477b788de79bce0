"""Instances of the caller's own: whether they keep a request from going elsewhere.

Who brings an allocation does not want to spend another beside it. So a request that says nothing
else waits for its caller's own instances, as long as there is one that can serve it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from fabric.broker.coming import Arrivals
from fabric.broker.cost import barred_site, times_s, unable
from fabric.broker.facts import Context
from fabric.broker.pool import Pool
from fabric.messages import InstanceState, Request


def get_own(
    request: Request, own: Mapping[str, bool], offered: Collection[str]
) -> Mapping[str, bool]:
    """Return the caller's own sites if some of them may keep the request.

    Args:
        request: What is asked; one that names its sites, or asks for ``overflow``, is kept nowhere.
        own: All sites of the caller's own, and whether they keep requests.
        offered: Where it may run.
    """
    if request.overflow or request.sites is not None or request.policy == "local-only":
        return {}
    mine = {site: keeps for site, keeps in own.items() if site in offered}
    return mine if any(mine.values()) else {}


def get_kept_by(
    request: Request, context: Context, pool: Pool, arrivals: Arrivals
) -> tuple[str, ...]:
    """Return the caller's own sites that keep the request now.

    An instance there is ready and has what the request needs, however busy it is, or is expected
    before the request's deadline. One that is lost, drains, or ends too soon keeps nothing.
    """
    free = replace(context, kept_by=())
    return tuple(
        site
        for site, keeps in context.own.items()
        if keeps
        and barred_site(request, site, free) is None
        and (_is_there(request, site, free, pool) or _comes(request, site, free, arrivals))
    )


def _is_there(request: Request, site: str, context: Context, pool: Pool) -> bool:
    group = pool.groups.get(context.digest, {}).get(site)
    if group is None:
        return False
    for row in pool.rows(group).tolist():
        one = pool.at(row)
        if one.state is not InstanceState.READY or unable(request, one) is not None:
            continue
        total_s = times_s(request, one, context.lengths).total_s
        if one.ends_in_s is None or total_s <= one.ends_in_s:
            return True
    return False


def _comes(request: Request, site: str, context: Context, arrivals: Arrivals) -> bool:
    there = replace(context, offers={site: context.offers[site]})
    return arrivals.in_time(request, there, context.now)
