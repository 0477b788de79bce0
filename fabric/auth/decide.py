"""The one decision about access: may this caller do this, with this model, at this site?

Models and sites are public until an administrator makes one private, which its first grant does.
From then on nobody may see or use it without a grant, and that no grant is left opens it to nobody.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from typing import get_args

from fabric.messages import Request

ANY = "*"
"""In a grant: every private model, every private site, or everybody."""

MODES = ("query", "embed", "read", "write", "gradient", "weights", "fine-tune", "launch")
"""What may be done with a model: generate, embed, read and write inside its forward passes, take
gradients, read and overlay weights, train it, bring instances of it."""

TIERS: tuple[str, ...] = get_args(Request.model_fields["tier"].annotation)

EVERYTHING = frozenset(MODES)
EVERY_TIER = frozenset(TIERS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """What one subject may do with one private model, at one private site, or with both.

    Attributes:
        id: Names it in lists.
        subject: ``project:``, ``key:``, ``user:`` or ``group:`` and a name, or ``*``.
        model: A model's name; ``*`` for all; ``None`` for a grant of a site with any model that the
            caller may use there.
        site: A site's name; ``*`` for all; ``None`` for a grant of a model wherever the caller may
            run.
        modes: Some of ``MODES``.
        tiers: Some of ``TIERS``.
    """

    id: str
    subject: str
    model: str | None
    site: str | None
    modes: frozenset[str] = EVERYTHING
    tiers: frozenset[str] = EVERY_TIER

    def opens_model(self, model: str, site: str | None) -> bool:
        """Return whether it is a grant of a model (at a site, if one is asked for)."""
        return self.model in (model, ANY) and (site is None or self.site in (None, site, ANY))

    def opens_site(self, site: str, model: str | None) -> bool:
        """Return whether it is a grant of a site (with a model, if one is asked for)."""
        return self.site in (site, ANY) and (model is None or self.model in (None, model, ANY))


class Decision(StrEnum):
    """How a question is answered."""

    ALLOWED = "allowed"
    REFUSED = "refused"
    """The caller knows the object, and may not do this with it."""
    HIDDEN = "hidden"
    """For the caller there is no such object."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Permits:
    """What one caller may do: the private objects there are, and the grants that are the caller's.

    Attributes:
        project: For whom the caller acts.
        key_id: Who that is.
        models: The names of all private models.
        sites: The names of all private sites.
        grants: Those that the caller has.
        homes: The sites that data of the project may not leave; ``None`` if it may go anywhere.
    """

    project: str
    key_id: str
    models: frozenset[str] = frozenset()
    sites: frozenset[str] = frozenset()
    grants: tuple[Grant, ...] = ()
    homes: frozenset[str] | None = None

    def may_send_to(self, site: str | None) -> bool:
        """Return whether data of the project may go to a site."""
        return self.homes is None or site is None or site in self.homes

    def sees_model(self, model: str) -> bool:
        """Return whether there is such a model for the caller, if there is one at all."""
        return model not in self.models or any(
            grant.opens_model(model, None) for grant in self.grants
        )

    def sees_site(self, site: str) -> bool:
        """Return whether there is such a site for the caller, if there is one at all."""
        return site not in self.sites or any(grant.opens_site(site, None) for grant in self.grants)

    def decide(
        self,
        *,
        model: str,
        site: str | None = None,
        modes: Collection[str] = (),
        tier: str | None = None,
    ) -> Decision:
        """Return whether the caller may use a model so.

        Every mode needs a grant of the private model and one of the private site, each with the
        mode and the tier; different modes may rest on different grants. No grant takes a project's
        data where it may not go.

        Args:
            model: Its name, without a revision.
            site: Where; ``None`` asks of the model alone.
            modes: All that is asked for.
            tier: How urgent; ``None`` for what has no tier.
        """
        if model not in self.models and site not in self.sites:
            return Decision.ALLOWED if self.may_send_to(site) else Decision.REFUSED
        if not self.sees_model(model) or (site is not None and not self.sees_site(site)):
            return Decision.HIDDEN
        if not self.may_send_to(site):
            return Decision.REFUSED
        for mode in modes:
            fit = [
                grant
                for grant in self.grants
                if mode in grant.modes and (tier is None or tier in grant.tiers)
            ]
            if model in self.models and not any(one.opens_model(model, site) for one in fit):
                return Decision.REFUSED
            if site in self.sites and not any(one.opens_site(site, model) for one in fit):
                return Decision.REFUSED
        return Decision.ALLOWED


def get_modes(request: Request, scopes: Collection[str] = ()) -> frozenset[str]:
    """Return the modes that a request takes.

    Args:
        request: What is asked.
        scopes: Of a program, the permissions that it takes, such as ``program:write``.
    """
    if request.mode != "program":
        return frozenset({request.mode})
    return frozenset(scope.removeprefix("program:") for scope in scopes) | {"read"}
